"""The report of runs that still go on, as a page on this machine's loopback that follows them."""

from __future__ import annotations

import http.server
import logging
import pathlib
from collections.abc import Iterable

from jaxpt import stage
from jaxpt.report import page, read
from jaxpt.spec import UserError

log = logging.getLogger(__name__)

# The page asks every few seconds whether the runs have written something, and loads itself again then; a browser keeps its place.
FOLLOW_SCRIPT = """<script>
let seen; setInterval(async () => { const now = await fetch("stamp").then(r => r.text()).catch(() => seen);
  if (seen !== undefined && now !== seen) location.reload(); seen = now }, 5000)
</script>"""


def make_server(
    directories: Iterable[str | pathlib.Path], port: int
) -> http.server.ThreadingHTTPServer:
    """A server of the page of these run directories on 127.0.0.1; port 0 takes a free one. The caller runs and closes it.

    Each request reads the runs anew. Raises UserError where a directory is not there, or the port is taken.
    """
    directories = list(directories)
    read.load_runs(directories)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            try:
                if self.path == "/stamp":
                    self.answer(hash_run_files(directories), "text/plain")
                elif self.path == "/":
                    whole, end, rest = page.render_page(read.load_runs(directories)).rpartition(
                        "</body>"
                    )  # the plot library's code holds another
                    self.answer(whole + FOLLOW_SCRIPT + end + rest, "text/html")
                else:
                    self.send_error(404)
            except UserError as error:  # a run was moved away meanwhile
                self.answer(str(error), "text/plain", 404)
            except (
                OSError
            ):  # the reader has gone, or a file while it was looked at: the page asks again
                self.close_connection = True

        def answer(self, text: str, kind: str, status: int = 200) -> None:
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            """A line a request would bury what the terminal is for."""

    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--serve {port}: cannot listen there ({error}). Give another port, or 0 for any."
        ) from None


def hash_run_files(directories: Iterable[str | pathlib.Path]) -> str:
    """Changes when a file that the page is made from does."""
    files = (
        file
        for directory in directories
        for pattern in ("*.json", "metrics.jsonl", "eval/*.json")
        for file in pathlib.Path(directory).glob(pattern)
    )
    return stage.fingerprint(
        [[str(file), file.stat().st_mtime_ns, file.stat().st_size] for file in sorted(files)]
    )


def serve_report(directories: Iterable[str | pathlib.Path], port: int) -> None:
    """Serve until interrupted."""
    with make_server(directories, port) as running:
        log.info(
            f"http://127.0.0.1:{running.server_port}/ follows {', '.join(map(str, directories))}; Ctrl-C ends it"
        )
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            log.info("")
