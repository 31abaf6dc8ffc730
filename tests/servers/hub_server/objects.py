"""Git objects and large files, addressed by content.

Blob, tree and commit ids are git's own SHA-1s, so a client that hashes a file the way git does gets the id the
server reports. A large file is a git blob holding a pointer; its bytes live in a store of their own, under SHA-256.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path

from .errors import HubError

# Extensions the Hub's default .gitattributes sends to large-file storage (the ones a pipeline like ours meets).
LFS_EXTENSIONS = (
    *(".7z", ".arrow", ".bin", ".bz2", ".ckpt", ".gz", ".h5", ".msgpack", ".npy", ".npz", ".onnx", ".parquet", ".pt"),
    *(".pth", ".rar", ".safetensors", ".tar", ".tgz", ".xz", ".zip", ".zst", ".jpg", ".jpeg", ".png", ".webp", ".gif"),
)
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_EXTENSIONS).encode()


@dataclass(frozen=True)
class Entry:
    """One file of a commit. `oid` is the git blob id (of the pointer when the file is large); `size` is in bytes."""

    path: str
    oid: str
    size: int
    sha256: str | None = None  # set for large files only

    def pointer_size(self) -> int:
        return len(pointer(self.sha256, self.size)) if self.sha256 else 0


def git_id(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """The text git stores in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def tree_ids(entries: dict[str, Entry]) -> dict[str, str]:
    """Git tree id of every folder of a commit; the root's is under ""."""
    files: dict[str, list[tuple[str, str]]] = {"": []}
    for path, entry in entries.items():
        parent, _, name = path.rpartition("/")
        files.setdefault(parent, []).append((name, entry.oid))
        while parent:
            parent = parent.rpartition("/")[0]
            files.setdefault(parent, [])
    ids: dict[str, str] = {}
    for folder in sorted(files, key=lambda path: path.count("/") + 1 if path else 0, reverse=True):
        # git sorts a folder as if its name ended in a slash
        rows = [(name, "100644", name, oid) for name, oid in files[folder]]
        for child, oid in ids.items():
            parent, _, name = child.rpartition("/")
            if parent == folder:
                rows.append((f"{name}/", "40000", name, oid))
        content = b"".join(
            f"{mode} {name}".encode() + b"\0" + bytes.fromhex(oid) for _, mode, name, oid in sorted(rows)
        )
        ids[folder] = git_id("tree", content)
    return ids


def wants_lfs(path: str, sample: bytes, size: int, threshold: int) -> bool:
    """Whether the Hub keeps a file as a large one: by extension, by size, or because it is binary."""
    return size > 0 and (path.lower().endswith(LFS_EXTENSIONS) or size >= threshold or b"\0" in sample)


class ObjectStore:
    """Blobs and large files on disk, shared by all repositories of a server."""

    def __init__(self, root: Path):
        self._blobs = root / "blobs"
        self._large = root / "lfs"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._large.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        # claimed SHA-256 -> SHA-256 of what a scripted fault stored instead
        self._damaged: dict[str, str] = {}

    def add_regular(self, path: str, content: bytes) -> Entry:
        oid = git_id("blob", content)
        _write(self._blobs / oid, content)
        return Entry(path, oid, len(content))

    def add_large(self, path: str, content: bytes) -> Entry:
        sha256 = hashlib.sha256(content).hexdigest()
        _write(self._large / sha256, content)
        return self.large_entry(path, sha256)

    def receive(self, claimed: str, content: bytes, damaged: bool = False) -> None:
        """Keep an upload announced as `claimed`; bytes with another SHA-256 are refused unless a fault damaged them."""
        actual = hashlib.sha256(content).hexdigest()
        if actual != claimed and not damaged:
            raise HubError(400, f"uploaded bytes have sha256 {actual}, announced was {claimed}")
        _write(self._large / actual, content)
        with self._lock:
            self._damaged.pop(claimed, None)
            if actual != claimed:
                self._damaged[claimed] = actual

    def has_large(self, sha256: str) -> bool:
        """Whether the true bytes are here: a damaged upload does not count, so that it can be sent again."""
        return (self._large / sha256).exists()

    def large_entry(self, path: str, claimed: str) -> Entry:
        """The entry for an uploaded large file: it states what is really stored, damaged or not."""
        with self._lock:
            sha256 = claimed if self.has_large(claimed) else self._damaged.get(claimed, claimed)
        if not self.has_large(sha256):
            raise HubError(400, f"the large file {claimed} of {path!r} was never uploaded")
        size = (self._large / sha256).stat().st_size
        return Entry(path, git_id("blob", pointer(sha256, size)), size, sha256)

    def read(self, entry: Entry) -> bytes:
        return self.read_large(entry.sha256) if entry.sha256 else (self._blobs / entry.oid).read_bytes()

    def read_large(self, sha256: str) -> bytes:
        if not self.has_large(sha256):
            raise HubError(404, f"no object {sha256}")
        return (self._large / sha256).read_bytes()


def _write(path: Path, content: bytes) -> None:
    """Write once, visible only when whole: several request threads may bring the same content."""
    if not path.exists():
        part = path.with_name(f"{path.name}.{threading.get_ident()}.part")
        part.write_bytes(content)
        part.replace(path)
