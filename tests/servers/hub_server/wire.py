"""HTTP/1.1 on a loopback port: requests in, responses out, with the scripted faults of the transport."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

from .errors import HubError
from .faults import Faults, flip_byte


@dataclass(frozen=True)
class LogEntry:
    """One request the server saw. `status` 0 means that the connection was closed without an answer."""

    origin: str  # "hub" or "storage"
    method: str
    path: str  # decoded, without the query
    status: int
    fault: str | None = None


@dataclass
class Request:
    """`raw_path` is still percent-encoded: a slash inside a revision is told from one between segments."""

    method: str
    raw_path: str
    query: dict[str, list[str]]
    headers: dict[str, str]  # lower-case names
    body: bytes

    @property
    def path(self) -> str:
        return unquote(self.raw_path)

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("true", "1")

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise HubError(400, f"the request body is not JSON: {error}") from error


@dataclass
class Response:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


def error_response(error: HubError) -> Response:
    headers = {"X-Error-Message": error.message.replace("\n", " ")}
    if error.code:
        headers["X-Error-Code"] = error.code
    return json_response({"error": error.message, **error.details}, error.status, headers)


def file_response(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    """The bytes, or the part of them that a `Range` header asks for (206, or 416 when it lies past the end)."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if match is None or match.group(0) == "bytes=-":
        return Response(200, content, headers)
    first, last = match.groups()
    start = int(first) if first else max(len(content) - int(last), 0)
    end = min(int(last), len(content) - 1) if first and last else len(content) - 1
    if start >= len(content) or start > end:
        return Response(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
    return Response(206, content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"})


class Origin:
    """One listening port with a handler behind it; requests are logged before their answer leaves."""

    def __init__(
        self, name: str, application: Callable[[Request], Response], faults: Faults, log: list[LogEntry]
    ) -> None:
        self.name = name
        self.crashes: list[str] = []  # tracebacks of errors in this server itself
        self._application = application
        self._faults = faults
        self._log = log
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"origin": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.close_connections()
        self._server.server_close()

    def answer(self, request: Request) -> tuple[Response, str | None, int]:
        """The response, the transport fault to send it with ("cut", "lose" or None), and the body bytes to send."""
        spot = (request.method, request.path)
        held = self._faults.take("hold", *spot)
        if held:
            held.hold.reached.set()
            held.hold.release.wait()
        name: str | None = None
        fault = self._faults.take("status", *spot)
        if fault:
            name, response = "status", error_response(HubError(fault.status, f"scripted fault {fault.status}"))
            response.headers.update(fault.headers)
        else:
            response = self._run(request)
        if self._faults.take("lose", *spot):
            self._log.append(LogEntry(self.name, *spot, 0, "lose"))
            return response, "lose", 0
        sent = 0 if request.method == "HEAD" else len(response.body)
        if sent and response.status in (200, 206):
            if self._faults.take("corrupt", *spot):
                name, response.body = "corrupt", flip_byte(response.body)
            cut = self._faults.take("cut", *spot)
            if cut:
                name, sent = "cut", min(sent - 1, sent // 2 if cut.after is None else cut.after)
        self._log.append(LogEntry(self.name, *spot, response.status, name or ("hold" if held else None)))
        return response, name if name == "cut" else None, sent

    def _run(self, request: Request) -> Response:
        try:
            return self._application(request)
        except HubError as error:
            return error_response(error)
        except Exception:  # an error of this server must fail the test, not end a thread unseen
            self.crashes.append(f"{request.method} {request.path}\n{traceback.format_exc()}")
            return error_response(HubError(500, "the test server itself failed"))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """Hang up on clients that keep their connection open."""
        with self._lock:
            for connection in self._connections:
                _hang_up(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is everyday life here (clients get killed in tests)."""


class _Handler(BaseHTTPRequestHandler):
    origin: Origin
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        raw_path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, raw_path, parse_qs(query, keep_blank_values=True), headers, self._read_body())
        response, fault, sent = self.origin.answer(request)
        if fault == "lose":
            self._drop()
            return
        self.send_response(response.status)
        for name, value in {"Content-Length": str(len(response.body)), **response.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(response.body[:sent])
        if fault == "cut":
            self.wfile.flush()
            self._drop()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers
        return b"".join(parts)

    def _drop(self) -> None:
        self.close_connection = True
        _hang_up(self.connection)

    def log_message(self, *args: Any, **kwargs: Any) -> None:
        """Quiet: the request log is kept by the origin."""


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other side was faster
        connection.shutdown(socket.SHUT_RDWR)
