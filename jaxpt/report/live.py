"""Serve the report of running runs on this machine's loopback, as a page that follows them."""

from __future__ import annotations

import datetime
import http.server
import logging
import threading
from collections.abc import Iterable

from jaxpt import io, stage
from jaxpt.report import head, page, read
from jaxpt.spec import UserError

log = logging.getLogger(__name__)
RUN_FILES = ("*.json", "metrics.jsonl", "eval/*.json")
SIGN_FILE = "spent.json"  # written every second: what it says counts, not that it changed

# The page asks every few seconds whether the runs have written something, and reloads then;
# a browser keeps its place.
FOLLOW_SCRIPT = """<script>
const note = document.querySelector("header p"), made = note.textContent;
const show = text => note.textContent = `${made} \u00b7 ${text}`;
show("live: it follows its runs");
let seen;
setInterval(async () => {
  try {
    const now = await fetch("stamp").then(r => r.text());
    if (seen !== undefined && now !== seen) location.reload();
    seen = now;
    show("live: it follows its runs");
  } catch { show("its server has ended, so it follows them no more") }
}, 5000)
</script>"""


def make_server(directories: Iterable[str | io.Path], port: int) -> http.server.ThreadingHTTPServer:
    """Return a server of the page on 127.0.0.1. The caller runs and closes it.

    Args:
        directories: run directories or such that hold them, read again on each request.
        port: 0 takes a free one.

    Raises:
        UserError: a directory does not exist, or the port is taken.
    """
    directories = list(directories)
    readers: read.Readers = {}
    reading = threading.Lock()
    read.load_runs(read.find_runs(directories), readers)

    class Handler(http.server.BaseHTTPRequestHandler):
        """Answers with the page, or with a stamp of the runs' files."""

        def do_GET(self):
            """Answer a request."""
            try:
                if not is_loopback(self.headers.get("Host", "")):
                    self.send_error(403, "Ask for 127.0.0.1 or localhost")
                elif self.path == "/stamp":
                    self.answer(hash_run_files(read.find_runs(directories)), "text/plain")
                elif self.path == "/":
                    with reading:
                        runs = read.load_runs(read.find_runs(directories), readers)
                    self.answer(render_live_page(runs), "text/html")
                else:
                    self.send_error(404)
            except UserError as error:  # a run was moved away meanwhile
                self.answer(str(error), "text/plain", 404)
            except OSError:  # the reader has gone, or a file vanished: the page asks again
                self.close_connection = True

        def answer(self, text: str, content_type: str, status: int = 200) -> None:
            """Send a text."""
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{content_type}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            """Log nothing: a line per request would bury the others."""

    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--serve {port}: cannot listen there ({error}). Give another port, or 0 for any."
        ) from None


def is_loopback(host: str) -> bool:
    """Return whether a Host header names this machine's loopback.

    A web page can point a name of its own at 127.0.0.1, and read what it is answered.
    """
    name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
    return name.lower() in ("127.0.0.1", "localhost", "[::1]")


def render_live_page(runs: list[read.RunData]) -> str:
    """Return the page with the script that follows the runs."""
    html = page.render_page(runs)
    head, end, rest = html.rpartition("</body>")  # the plot library's code holds another
    return head + FOLLOW_SCRIPT + end + rest


def hash_run_files(directories: Iterable[io.Path]) -> str:
    """Return a stamp that changes when a file that the page is made from does, or a run dies."""
    stamps = []
    now = datetime.datetime.now(datetime.UTC)
    for directory in directories:
        is_alive = head.is_recent(read.read_last_sign(directory), now)
        stamps.append([str(directory), str(is_alive)])
        for pattern in RUN_FILES:
            for file in io.find(directory, pattern):
                if file.name != SIGN_FILE:
                    stamps.append([str(file), io.version(file)])
    return stage.fingerprint(sorted(stamps))


def serve_report(directories: Iterable[str | io.Path], port: int) -> None:
    """Serve the page until Ctrl-C."""
    with make_server(directories, port) as server:
        log.info(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C to stop)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log.info("stopped")
