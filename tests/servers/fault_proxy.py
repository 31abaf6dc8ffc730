"""A reverse proxy in front of an HTTP server, which fails on command and keeps a log.

The client talks (and signs) to the proxy's address. The server is reached over another socket but is sent the `Host`
header as it came, so signatures that cover it stay valid. Bodies pass whole through memory: this is for tests.

    with FaultProxy(server.endpoint) as proxy:
        proxy.answer(503, code="SlowDown", method="PUT", times=2)
        proxy.lose_answer(method="PUT", path=r"manifest\\.json$")
        ...
        assert proxy.count("PUT") == 4

Faults are tried in the order in which they were added; the first that fits a request strikes it, `times` times
(None: for ever), after letting `skip` fitting requests pass.
"""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

Kind = Literal["answer", "reset", "lose_answer", "truncate", "corrupt", "delay"]
HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect"}
UPSTREAM_TIMEOUT_S = 120.0


@dataclass
class Fault:
    """One scripted failure and which requests it strikes; `struck` counts those it has."""

    kind: Kind
    method: str | None
    path: re.Pattern[str]
    times: int | None
    skip: int
    status: int = 500
    code: str = "InternalError"
    headers: dict[str, str] = field(default_factory=dict)
    at_byte: int = 0
    seconds: float = 0.0
    struck: int = 0

    def strikes(self, method: str, path: str) -> bool:
        """Whether this request is to fail; counts it. Called under the proxy's lock."""
        if (self.method and self.method != method) or not self.path.search(path) or self.struck == self.times:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.struck += 1
        return True


@dataclass
class Exchange:
    """A request that reached the proxy; `status` is the upstream's, None if it was not asked or has not answered."""

    method: str
    path: str
    headers: dict[str, str]
    fault: Kind | None = None
    status: int | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer: header fields are those that belong to the message, the length apart."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes
    length: int | None


class FaultProxy:
    """Listens on 127.0.0.1 while used as a context manager; afterwards its port refuses connections."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"the proxy speaks plain HTTP to its server; {upstream!r} is not an http:// address")
        self.upstream = (parts.hostname, parts.port or 80)
        self.exchanges: list[Exchange] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._connections: set[socket.socket] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)

    @property
    def endpoint(self) -> str:
        """The proxy's own address."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        with self._lock:
            for connection in self._connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # the client was faster

    def answer(
        self,
        status: int,
        *,
        code: str = "InternalError",
        headers: dict[str, str] | None = None,
        method: str | None = None,
        path: str = "",
        times: int | None = 1,
        skip: int = 0,
    ) -> Fault:
        """Answer `status` with an S3 error document of this `code`; the server is not asked."""
        fault = Fault("answer", method, re.compile(path), times, skip, status=status, code=code, headers=headers or {})
        return self._add(fault)

    def reset(self, *, method: str | None = None, path: str = "", times: int | None = 1, skip: int = 0) -> Fault:
        """Reset the connection when the request is in; the server is not asked."""
        return self._add(Fault("reset", method, re.compile(path), times, skip))

    def lose_answer(self, *, method: str | None = None, path: str = "", times: int | None = 1, skip: int = 0) -> Fault:
        """Let the server do the work, then reset the connection instead of passing its answer on."""
        return self._add(Fault("lose_answer", method, re.compile(path), times, skip))

    def truncate(
        self, at_byte: int, *, method: str | None = None, path: str = "", times: int | None = 1, skip: int = 0
    ) -> Fault:
        """Announce the whole length, send `at_byte` bytes of the body, close the connection."""
        return self._add(Fault("truncate", method, re.compile(path), times, skip, at_byte=at_byte))

    def corrupt(
        self, at_byte: int = 0, *, method: str | None = None, path: str = "", times: int | None = 1, skip: int = 0
    ) -> Fault:
        """Flip every bit of one byte of the answer's body, which keeps its length."""
        return self._add(Fault("corrupt", method, re.compile(path), times, skip, at_byte=at_byte))

    def delay(
        self, seconds: float, *, method: str | None = None, path: str = "", times: int | None = 1, skip: int = 0
    ) -> Fault:
        """Hold the answer back, the server's work done, for `seconds` (or until the proxy closes)."""
        return self._add(Fault("delay", method, re.compile(path), times, skip, seconds=seconds))

    def clear(self) -> None:
        """Forget all faults; the log stays."""
        with self._lock:
            self._faults.clear()

    def count(self, method: str | None = None, path: str = "") -> int:
        """How many requests with this method and a path that `path` is found in came so far (query included)."""
        with self._lock:
            return sum(1 for e in self.exchanges if method in (None, e.method) and re.search(path, e.path))

    def _add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def _receive(self, method: str, path: str, headers: dict[str, str]) -> tuple[Exchange, Fault | None]:
        """Log a request and find the fault that it meets."""
        with self._lock:
            fault = next((fault for fault in self._faults if fault.strikes(method, path)), None)
            exchange = Exchange(method, path, headers, fault.kind if fault else None)
            self.exchanges.append(exchange)
            return exchange, fault

    def _ask(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> Answer:
        connection = http.client.HTTPConnection(*self.upstream, timeout=UPSTREAM_TIMEOUT_S)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                if name.lower() not in HOP_BY_HOP | {"content-length"}:
                    connection.putheader(name, value)
            if body or method in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(body)))
            connection.putheader("Connection", "close")
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
            announced = answer.getheader("Content-Length")
            length: int | None = int(announced) if method == "HEAD" and announced else len(content)
            if answer.status in (204, 304):
                length = None  # these have no body, nor the length of one
            kept = [(n, v) for n, v in answer.getheaders() if n.lower() not in HOP_BY_HOP | {"content-length"}]
            return Answer(answer.status, answer.reason, kept, content, length)
        finally:
            connection.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body are small writes that the client waits for

            def setup(self) -> None:
                super().setup()
                with proxy._lock:
                    proxy._connections.add(self.connection)

            def finish(self) -> None:
                with proxy._lock:
                    proxy._connections.discard(self.connection)
                super().finish()

            def log_message(self, *args: object) -> None:
                """Silent: the exchanges are the log."""

            def serve(self) -> None:
                body = self.read_body()
                exchange, fault = proxy._receive(self.command, self.path, dict(self.headers.items()))
                kind = fault.kind if fault else None
                if fault and kind == "answer":
                    self.send(_error_document(fault, self.command))
                    return
                try:
                    if kind == "reset":
                        raise ConnectionResetError
                    answer = proxy._ask(self.command, self.path, self.headers.items(), body)
                    exchange.status = answer.status
                    if kind == "lose_answer":
                        raise ConnectionResetError
                except (OSError, http.client.HTTPException):  # scripted, or what the client of a dying server would see
                    self.reset_connection()
                    return
                if fault and kind == "delay":
                    proxy._closing.wait(fault.seconds)
                if fault and kind == "corrupt" and answer.body:
                    spoiled = bytearray(answer.body)
                    spoiled[fault.at_byte] ^= 0xFF
                    answer = replace(answer, body=bytes(spoiled))
                self.send(answer, fault.at_byte if fault and kind == "truncate" else None)

            # The base class looks its methods up by these names.
            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

            def read_body(self) -> bytes:
                if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
                    chunks = []
                    while size := int(self.rfile.readline().split(b";")[0], 16):
                        chunks.append(self.rfile.read(size))
                        self.rfile.readline()
                    while self.rfile.readline().strip():
                        continue  # trailers
                    return b"".join(chunks)
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def send(self, answer: Answer, cut: int | None = None) -> None:
                fields = [*answer.headers]
                if answer.length is not None:
                    fields.append(("Content-Length", str(answer.length)))
                if cut is not None:
                    self.close_connection = True
                    fields.append(("Connection", "close"))
                head = f"HTTP/1.1 {answer.status} {answer.reason}\r\n"
                head += "".join(f"{name}: {value}\r\n" for name, value in fields) + "\r\n"
                try:
                    self.wfile.write(head.encode("latin-1") + answer.body[:cut])
                except OSError:
                    self.close_connection = True  # the client did not wait for the answer

            def reset_connection(self) -> None:
                self.close_connection = True
                # Lingering for 0 s makes close() send RST at once; the reader holds the socket open, so it goes first.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()
                self.connection.close()

        return Handler


def _error_document(fault: Fault, method: str) -> Answer:
    """What an S3 server says in this case."""
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f"<Error><Code>{fault.code}</Code><Message>scripted by the test</Message><RequestId>0</RequestId></Error>"
    ).encode()
    headers = [("Content-Type", "application/xml"), *fault.headers.items()]
    content = b"" if method == "HEAD" else body
    return Answer(fault.status, http.client.responses.get(fault.status, "Scripted"), headers, content, len(body))
