"""The second origin: large-file storage behind signed URLs, where an access token has no business."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from urllib.parse import quote

from .errors import HubError
from .faults import Faults, flip_byte
from .objects import ObjectStore
from .wire import LogEntry, Origin, Request, Response, file_response


class LargeFileStorage:
    """Serves and receives large files; every URL is signed for one method and one path."""

    def __init__(self, objects: ObjectStore, faults: Faults, log: list[LogEntry], part_size: int):
        self.origin = Origin("storage", self.handle, faults, log)
        self.leaks: list[str] = []  # "METHOD path" of every request that carried an Authorization header
        self._objects = objects
        self._faults = faults
        self._part_size = part_size
        self._secret = secrets.token_bytes(16)
        self._lock = threading.Lock()
        self._parts: dict[str, dict[int, bytes]] = {}  # announced SHA-256 -> part number -> bytes
        self._damaged: set[str] = set()

    def signed_url(self, method: str, path: str) -> str:
        raw_path = quote(path)
        return f"{self.origin.url}{raw_path}?signature={self._signature(method, path)}"

    def download_url(self, repository: str, path: str, sha256: str) -> str:
        """`repository` as in its web address ("datasets/user/name"); the file's path keeps the URL readable in logs."""
        return self.signed_url("GET", f"/objects/{sha256}/{repository}/{path}")

    def upload_action(self, repository: str, sha256: str, size: int) -> dict[str, object]:
        """The upload part of a Git LFS batch answer: one PUT, or (from `part_size` bytes on) several and a POST."""
        if size <= self._part_size:
            return {"href": self.signed_url("PUT", f"/uploads/{sha256}/{repository}"), "header": {}}
        count = -(-size // self._part_size)
        with self._lock:
            self._parts[sha256] = {}
        numbers = range(1, count + 1)
        header = {str(n): self.signed_url("PUT", f"/parts/{sha256}/{n}/{repository}") for n in numbers}
        href = self.signed_url("POST", f"/complete/{sha256}/{repository}")
        return {"href": href, "header": {"chunk_size": str(self._part_size), **header}}

    def handle(self, request: Request) -> Response:
        if "authorization" in request.headers:
            self.leaks.append(f"{request.method} {request.path}")
            raise HubError(400, "a signed URL was requested with an Authorization header: the access token has leaked")
        method = "GET" if request.method == "HEAD" else request.method
        signature = request.query.get("signature", [""])[0]
        if not hmac.compare_digest(signature, self._signature(method, request.path)):
            raise HubError(403, "the signature does not fit this method and path")
        verb, sha256, *rest = request.path.lstrip("/").split("/")
        if verb == "objects":
            content = self._objects.read_large(sha256)
            return file_response(request, content, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})
        if verb == "complete":
            return self._complete(sha256, request.json()["parts"])
        fault = self._faults.take("damage", request.method, request.path)
        content = flip_byte(request.body) if fault else request.body
        if verb == "uploads":
            self._objects.receive(sha256, content, damaged=fault is not None)
        else:
            with self._lock:
                self._parts.setdefault(sha256, {})[int(rest[0])] = content
                if fault:
                    self._damaged.add(sha256)
        return Response(200, b"", {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def _complete(self, sha256: str, announced: list[dict[str, object]]) -> Response:
        with self._lock:
            parts = self._parts.pop(sha256, {})
            damaged = sha256 in self._damaged
            self._damaged.discard(sha256)
        etags = [(number, f'"{hashlib.md5(parts[number]).hexdigest()}"') for number in sorted(parts)]
        if etags != [(part["partNumber"], part["etag"]) for part in announced]:
            raise HubError(400, f"the announced parts of {sha256} are not the ones that were uploaded")
        self._objects.receive(sha256, b"".join(parts[number] for number, _ in etags), damaged)
        return Response(200)

    def _signature(self, method: str, path: str) -> str:
        return hmac.new(self._secret, f"{method} {path}".encode(), hashlib.sha256).hexdigest()
