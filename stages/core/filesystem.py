"""How bytes get to a store and back: a local folder, or any fsspec object store (s3:// through s3fs).

Both kinds have one face, and one promise: what can be seen is whole. On a local disk that is a temporary file and a
rename (or a hard link for create-only); on an object store it is a single PUT or a finished multipart upload, made
from a complete local file and never from an open remote one, because closing a half-written remote file commits it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from stages.core.errors import StoreError, TransientError

T = TypeVar("T")
ATTEMPTS = 5
READ_BLOCK = 8 << 20


class Files(Protocol):
    """A tree of files under a root; paths are relative and use '/'."""

    root: str

    def size(self, path: str) -> int | None: ...

    def read(self, path: str) -> bytes | None: ...

    def put_bytes(self, path: str, data: bytes) -> None: ...

    def put_file(self, source: Path, path: str) -> None: ...

    def create(self, path: str, data: bytes) -> bool:
        """Writes only where nothing is: False if the path was taken already (by other bytes)."""
        ...

    def chunks(self, path: str) -> Iterator[bytes]: ...

    def names(self, folder: str) -> list[str]: ...

    def delete(self, path: str) -> None: ...


class LocalFiles:
    """A folder on this machine (or on a network file system that knows rename and hard links)."""

    def __init__(self, root: Path) -> None:
        self.path = root.absolute()
        self.root = self.path.as_uri()

    def absolute(self, path: str) -> Path:
        return self.path / path

    def size(self, path: str) -> int | None:
        try:
            return self.absolute(path).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, path: str) -> bytes | None:
        try:
            return self.absolute(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    @contextmanager
    def _temporary(self, path: str) -> Iterator[Path]:
        """A fresh file beside the target, removed on the way out if it is still there."""
        target = self.absolute(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".part-", dir=target.parent)
            # mkstemp lets only the owner read; a store may be shared, and the umask says with whom.
            os.fchmod(handle, 0o666 & ~_UMASK)
        except OSError as error:
            raise StoreError(f"cannot write to the store {self.root} ({error.strerror}: {error.filename})") from error
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
        except OSError as error:
            raise StoreError(f"cannot write {target} ({error.strerror or error})") from error
        finally:
            temporary.unlink(missing_ok=True)

    def put_bytes(self, path: str, data: bytes) -> None:
        with self._temporary(path) as temporary:
            _write_durably(temporary, data)
            temporary.replace(self.absolute(path))

    def put_file(self, source: Path, path: str) -> None:
        with self._temporary(path) as temporary:
            with source.open("rb") as reader, temporary.open("wb") as writer:
                shutil.copyfileobj(reader, writer, READ_BLOCK)
                writer.flush()
                os.fsync(writer.fileno())
            temporary.replace(self.absolute(path))

    def create(self, path: str, data: bytes) -> bool:
        with self._temporary(path) as temporary:
            _write_durably(temporary, data)
            try:
                os.link(temporary, self.absolute(path))
            except FileExistsError:
                return self.read(path) == data
            return True

    def chunks(self, path: str) -> Iterator[bytes]:
        with self.absolute(path).open("rb") as file:
            while chunk := file.read(READ_BLOCK):
                yield chunk

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(
                entry.name for entry in self.absolute(folder).iterdir() if not entry.name.startswith(".part-")
            )
        except (FileNotFoundError, NotADirectoryError):
            return []

    def delete(self, path: str) -> None:
        self.absolute(path).unlink(missing_ok=True)


def _read_umask() -> int:
    mask = os.umask(0o077)  # there is no asking without setting; a file made meanwhile is too private, never too open
    os.umask(mask)
    return mask


# Read once: the umask belongs to the whole process, and other threads make files.
_UMASK = _read_umask()


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class ObjectFiles:
    """An object store behind fsspec. Every call is retried with backoff and jitter; s3fs's own nested retries are cut.

    Args:
        url: 's3://bucket/prefix', or any other URL fsspec knows.
        options: what fsspec's file system is made with. Never logged: they may hold credentials.
        attempts: how often a call is tried in all.
    """

    def __init__(self, url: str, options: dict[str, Any], attempts: int = ATTEMPTS) -> None:
        self.root = url.rstrip("/")
        self._protocol, _, self._base = self.root.partition("://")
        self._options = options
        self._attempts = attempts
        self._made: tuple[int, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("an object store is not pickled (it may hold credentials): open it anew in the other process")

    @property
    def fs(self) -> Any:
        """The fsspec file system of this process: s3fs refuses one that a parent made before a fork."""
        if self._made is None or self._made[0] != os.getpid():
            fs = fsspec.filesystem(self._protocol, **self._options)
            if self._protocol == "s3":
                # botocore retries inside s3fs, which retries again: 26 requests for one that fails for good. Ours is
                # the outer loop, s3fs's becomes a single try, botocore keeps its three.
                fs.retries = 1
            self._made = (os.getpid(), fs)
        return self._made[1]

    def _key(self, path: str) -> str:
        return f"{self._base}/{path}" if path else self._base

    def _try(self, what: str, path: str, call: Callable[[], T]) -> T:
        """Runs a call until it works, or is known not to.

        Raises:
            FileNotFoundError, FileExistsError: as the call does; the caller decides what they mean.
            StoreError: no permission, no credentials, no such bucket.
            TransientError: it still failed after the last attempt.
        """
        retrying = Retrying(
            stop=stop_after_attempt(self._attempts),
            wait=wait_random_exponential(multiplier=0.2, max=20),
            retry=retry_if_exception(is_transient),
            reraise=True,
        )
        try:
            return retrying(call)
        except Exception as error:
            code = error_code(error)
            if isinstance(error, StoreError | FileExistsError):
                raise
            if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
                raise
            text = f"{what} {self.root}/{path}: {_describe(error)}"
            if isinstance(error, PermissionError) or code in _DENIED:
                raise StoreError(
                    f"{text}. Check the credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) "
                    f"and what they may do."
                ) from error
            if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
                raise StoreError(f"{text}. No credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.") from error
            if code == "NoSuchBucket":
                raise StoreError(f"{text}. The bucket does not exist: create it first.") from error
            if is_transient(error):
                raise TransientError(f"{text} (after {self._attempts} attempts)") from error
            raise StoreError(text) from error

    def size(self, path: str) -> int | None:
        try:
            return int(self._try("look up", path, lambda: self.fs.info(self._key(path)))["size"])
        except FileNotFoundError:
            return None

    def read(self, path: str) -> bytes | None:
        def call() -> bytes:
            # open() pins the ETag and makes one request; cat_file copies twice and retries twice over.
            with self.fs.open(self._key(path), "rb", block_size=READ_BLOCK, cache_type="readahead") as file:
                data: bytes = file.read()
                return data

        try:
            return self._try("read", path, call)
        except FileNotFoundError:
            return None

    def put_bytes(self, path: str, data: bytes) -> None:
        self._try("write", path, lambda: self.fs.pipe_file(self._key(path), data))

    def put_file(self, source: Path, path: str) -> None:
        self._try("upload", path, lambda: self.fs.put_file(str(source), self._key(path)))

    def create(self, path: str, data: bytes) -> bool:
        def call() -> bool:
            try:
                self.fs.pipe_file(self._key(path), data, mode="create")
            except Exception as error:
                if not (isinstance(error, FileExistsError) or error_code(error) in _TAKEN):
                    raise
                # A lost answer makes the client send its own PUT again, and that one finds the path taken.
                return self.read(path) == data
            return True

        return self._try("create", path, call)

    def chunks(self, path: str) -> Iterator[bytes]:
        """The bytes in pieces. A cut connection raises: the caller starts over, since what was read is not verified."""
        file = self._try(
            "open", path, lambda: self.fs.open(self._key(path), "rb", block_size=READ_BLOCK, cache_type="readahead")
        )
        with file:
            while chunk := self._try("read", path, lambda: file.read(READ_BLOCK)):
                yield chunk

    def names(self, folder: str) -> list[str]:
        try:
            found = self._try("list", folder, lambda: self.fs.ls(self._key(folder), detail=False, refresh=True))
        except FileNotFoundError:
            return []
        return sorted(str(name).rstrip("/").rpartition("/")[2] for name in found if name != self._key(folder))

    def delete(self, path: str) -> None:
        try:
            self._try("delete", path, lambda: self.fs.rm_file(self._key(path)))
        except FileNotFoundError:
            return


_TAKEN = {"PreconditionFailed", "412"}
_DENIED = {"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AllAccessDisabled", "ExpiredToken"}
_PERMANENT = (
    StoreError,
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)
_TRANSIENT_CODES = {
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "409",
    "429",
    "500",
    "502",
    "503",
    "504",
}


def error_code(error: BaseException) -> str | None:
    """The S3 error code behind an exception of s3fs ('PreconditionFailed', '503'), looked up along its causes."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return str(response["Error"].get("Code"))
        seen = seen.__cause__ or seen.__context__
    return None


def is_transient(error: BaseException) -> bool:
    """Whether another try of a call to an object store may work."""
    if isinstance(error, TransientError):
        return True
    if isinstance(error, _PERMANENT):
        return False
    code = error_code(error)
    if code is not None:
        return code in _TRANSIENT_CODES
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError"):
        return False
    if type(error).__name__ == "FileExpired":
        return True
    return isinstance(error, OSError | TimeoutError) or type(error).__module__.split(".")[0] in (
        "botocore",
        "aiohttp",
        "aiobotocore",
        "http",
        "urllib3",
    )


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    code = error_code(error)
    return f"{code}: {text}" if code and code not in text else text
