"""The store: blobs by content, manifests written last, memos, runs. The one truth about what is done.

artifacts/<stage>/<fingerprint>/manifest.json   create-only (but for --force); its existence is the commit
blobs/<aa>/<sha256><suffix>                     shards and files by content
memo/<stage>/<key>.json                         what a map stage made of one unit of its input
runs/<name>/...                                 pointers, checkpoints in progress, reports
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from stages.core.artifact import KEYS, SCHEMA_VERSION, ArtifactRef, Blob, Manifest, Shard, manifest_path
from stages.core.config import Section
from stages.core.errors import CorruptBlobError, StoreError
from stages.core.filesystem import Files, LocalFiles
from stages.core.fingerprint import digest_file
from stages.core.locations import open_files
from stages.core.shard import MappedShard
from stages.core.statcache import StatCache

Record = TypeVar("Record", bound=BaseModel)
# What the read-through cache leaves alone: a blob that a running stage may be about to read, a download of another
# process. A download's file that has stood for a day is left over from a process that was killed.
IN_USE_S = 3600.0
LEFT_OVER_S = 24 * 3600.0


class StoreSection(Section):
    """Where artifacts live. Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...)."""

    url: str = "file://.loraline/store"
    """A folder ('file://...' or a plain path) or a bucket and prefix ('s3://bucket/prefix')."""
    endpoint_url: str | None = None
    """S3 endpoint of a server that is not AWS; the environment's AWS_ENDPOINT_URL where not given."""
    region: str | None = None
    """S3 region; the environment's AWS_DEFAULT_REGION where not given."""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """How the bucket is addressed; 'auto' is path style wherever an endpoint is given."""
    cache_dir: str = "~/.cache/loraline"
    """Local folder for the read-through cache of blobs and for remembered file digests."""
    cache_gb: float = Field(default=200.0, gt=0)
    """Blobs that were used longest ago (and not within the last hour) are dropped from the local cache above this
    size, in 10^9 bytes."""
    verify_uploads: Literal["readback", "size"] = "readback"
    """After an upload, read the object back and compare its sha256, or only look at its size."""
    allow_unconditional: bool = False
    """Use a store that ignores create-only writes (found out by a probe at the start) instead of refusing it."""


class Store:
    """A store, opened. Cheap to make; opens its connection at first use, anew in every process.

    Args:
        section: where it is.
        files: what it is on, where a test wants its own.
    """

    def __init__(self, section: StoreSection, files: Files | None = None) -> None:
        self.section = section
        self.cache_dir = Path(section.cache_dir).expanduser()
        self.files = files or open_files(section.url, section.endpoint_url, section.region, section.addressing_style)
        self._digests: StatCache | None = None
        self._probed = False
        self._warning: str | None = None
        self._trusts_sizes = True

    @property
    def url(self) -> str:
        return self.files.root

    @property
    def digests(self) -> StatCache:
        """Remembered digests of local files."""
        if self._digests is None:
            try:
                self._digests = StatCache(self.cache_dir / "digests.sqlite")
            except OSError as error:
                raise StoreError(f"cannot write to store.cache_dir {self.cache_dir} ({error.strerror})") from error
        return self._digests

    # -- probing ------------------------------------------------------------------------------------------------------

    def probe(self) -> str | None:
        """Finds out, once per process and before heavy work, whether the store can be written to and keeps its word.

        Returns:
            A warning for the person, or None; the same at every call.
        Raises:
            StoreError: no permission, or create-only writes are ignored and `store.allow_unconditional` is off.
        """
        if self._probed:
            return self._warning
        path = f"runs/.probe/{uuid.uuid4().hex}"
        self.files.create(path, b"first")
        try:
            second = self.files.create(path, b"second")
            kept = self.files.read(path)
        finally:
            self.files.delete(path)
        if kept is None:
            raise StoreError(f"{self.url}: an object that was just written cannot be read back")
        if second or kept != b"first":
            self._warning = self._unconditional()
        self._probed = True
        return self._warning

    def _unconditional(self) -> str:
        text = (
            f"{self.url}: this store silently ignores create-only writes (If-None-Match), so two runs that finish the "
            f"same artifact at once may overwrite each other's manifest"
        )
        if not self.section.allow_unconditional:
            raise StoreError(
                f"{text}. Use a store that honours them, or set store.allow_unconditional: true if only one run at a "
                f"time uses this one."
            )
        return text

    # -- blobs --------------------------------------------------------------------------------------------------------

    def has(self, blob: Blob) -> bool:
        """Whether a blob is there, judged by its size; its bytes are compared when it is fetched."""
        return self.files.size(blob.path) == blob.bytes

    @contextmanager
    def repairing(self) -> Iterator[None]:
        """Meanwhile, a blob that is put and is there already is read and compared first, and replaced if damaged."""
        before, self._trusts_sizes = self._trusts_sizes, False
        try:
            yield
        finally:
            self._trusts_sizes = before

    def put_file(self, path: Path, suffix: str | None = None) -> Blob:
        """Uploads a local file as a blob, unless the store has it. Verified before this returns.

        Raises:
            CorruptBlobError: what arrived is not what was sent.
        """
        blob = Blob(sha256=digest_file(path), bytes=path.stat().st_size, suffix=suffix or path.suffix)
        if self.has(blob) and (self._trusts_sizes or self._holds(blob)):
            return blob
        for attempt in (1, 2):
            self.files.put_file(path, blob.path)
            if self._arrived(blob):
                return blob
            self.files.delete(blob.path)
            if attempt == 2:
                break
        raise CorruptBlobError(f"{self.url}/{blob.path}: the uploaded bytes are not the ones that were sent (twice)")

    def put_bytes(self, data: bytes, suffix: str) -> Blob:
        """As `put_file`, for small content that is in memory."""
        with tempfile.NamedTemporaryFile(suffix=suffix) as file:
            file.write(data)
            file.flush()
            return self.put_file(Path(file.name), suffix)

    def _arrived(self, blob: Blob) -> bool:
        if self.files.size(blob.path) != blob.bytes:
            return False
        return self.section.verify_uploads == "size" or self._holds(blob)

    def _holds(self, blob: Blob) -> bool:
        """Whether the bytes in the store are the ones that the blob's name promises."""
        sha = hashlib.sha256()
        for chunk in self.files.chunks(blob.path):
            sha.update(chunk)
        return sha.hexdigest() == blob.sha256

    def fetch(self, blob: Blob) -> Path:
        """A verified local copy of a blob: the file itself in a local store, else one in the read-through cache.

        Raises:
            StoreError: the store does not have it.
            CorruptBlobError: the stored bytes are not the ones that the name promises.
        """
        if isinstance(self.files, LocalFiles):
            path = self.files.absolute(blob.path)
            if not path.exists():
                raise _lost(self.url, blob)
            if path.stat().st_size != blob.bytes or self.digests.digest(path) != blob.sha256:
                raise _damaged(self.url, blob)
            return path
        target = self.cache_dir / blob.path
        if self._is_cached(blob, target):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in (1, 2):
            handle, name = tempfile.mkstemp(prefix=".part-", dir=target.parent)
            temporary = Path(name)
            try:
                sha = hashlib.sha256()
                with os.fdopen(handle, "wb") as file:
                    for chunk in self.files.chunks(blob.path):
                        sha.update(chunk)
                        file.write(chunk)
                if sha.hexdigest() == blob.sha256:
                    temporary.replace(target)
                    self._trim_cache()
                    return target
            except FileNotFoundError:
                raise _lost(self.url, blob) from None
            finally:
                temporary.unlink(missing_ok=True)
            if attempt == 2:
                break
        raise _damaged(self.url, blob)

    def read_blob(self, blob: Blob) -> bytes:
        """The bytes of a small blob, verified."""
        return self.fetch(blob).read_bytes()

    def keys(self, shard: Shard) -> list[str]:
        """The keys of a shard's samples in order: from its sidecar, without the shard, where it has one."""
        if KEYS in shard.sidecars:
            return self.read_blob(shard.sidecars[KEYS]).decode().splitlines()
        return MappedShard(self.fetch(shard)).keys

    def _is_cached(self, blob: Blob, target: Path) -> bool:
        """Whether the cache holds a blob, whole; one that is damaged is dropped. Notes the use."""
        try:
            status = target.stat()
            if status.st_size != blob.bytes or self.digests.digest(target) != blob.sha256:
                target.unlink(missing_ok=True)
                return False
            # The time of the last use is kept as the time of access: by that of change its digest is remembered.
            os.utime(target, ns=(time.time_ns(), status.st_mtime_ns))
        except FileNotFoundError:  # not there, or trimmed by another process this moment
            return False
        return True

    def _trim_cache(self) -> None:
        limit, now = self.section.cache_gb * 1e9, time.time()
        entries = []
        for path in (self.cache_dir / "blobs").glob("??/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if not path.name.startswith(".part-"):
                entries.append((max(status.st_atime, status.st_mtime), status.st_size, path))
            elif now - status.st_mtime > LEFT_OVER_S:
                path.unlink(missing_ok=True)
        total = sum(size for _, size, _ in entries)
        # A file that is mapped into a running training stays readable after its name is gone.
        for used, size, path in sorted(entries):
            if total <= limit or now - used < IN_USE_S:
                break
            path.unlink(missing_ok=True)
            total -= size

    # -- manifests ----------------------------------------------------------------------------------------------------

    def manifest(self, stage: str, fingerprint: str) -> Manifest | None:
        """The manifest of an artifact, or None where it does not exist yet.

        Raises:
            StoreError: it is there but cannot be understood (damaged, or written by a newer loraline).
        """
        path = manifest_path(stage, fingerprint)
        data = self.files.read(path)
        if data is None:
            return None
        try:
            record = json.loads(data)
            if record.get("schema_version") != SCHEMA_VERSION:
                raise StoreError(
                    f"{self.url}/{path}: schema version {record.get('schema_version')}, this loraline reads "
                    f"{SCHEMA_VERSION}: use the loraline that wrote it, or another store"
                )
            return Manifest.model_validate(record)
        except (ValueError, AttributeError, ValidationError) as error:
            raise StoreError(
                f"{self.url}/{path}: damaged manifest ({error}); delete it and run the stage again"
            ) from error

    def commit(self, manifest: Manifest, replace: bool = False) -> Manifest:
        """Makes an artifact exist. The first one to commit wins; a later one gets the winner's manifest back, unless
        it was asked to replace it."""
        data = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True).encode()
        if replace:
            self.files.put_bytes(manifest.path, data)
            return manifest
        if self.files.create(manifest.path, data):
            return manifest
        winner = self.manifest(manifest.stage, manifest.fingerprint)
        if winner is None:
            raise StoreError(f"{self.url}/{manifest.path}: was there and is gone; run the stage again")
        return winner

    def resolve(self, reference: ArtifactRef) -> Manifest:
        """The manifest that a reference points to.

        Raises:
            StoreError: this store does not have it.
        """
        manifest = self.manifest(reference.stage, reference.fingerprint)
        if manifest is None:
            raise StoreError(f"{self.url}: has no {reference.stage} artifact {reference.fingerprint[:12]}")
        return manifest

    # -- small JSON records -------------------------------------------------------------------------------------------

    def get_json(self, path: str) -> Any:
        """A JSON record, or None where there is none (or it is damaged: records are only ever memories)."""
        data = self.files.read(path)
        if data is None:
            return None
        try:
            return json.loads(data)
        except ValueError:
            return None

    def get_record(self, path: str, kind: type[Record]) -> Record | None:
        """As `get_json`, of a known shape; None where the record has another one."""
        try:
            return kind.model_validate(self.get_json(path))
        except ValidationError:
            return None

    def create_json(self, path: str, record: Any) -> bool:
        """Writes a record once; False if another one stands there. One that is no JSON is replaced."""
        if self.files.create(path, _encode(record)):
            return True
        if self.get_json(path) is not None:
            return False
        self.put_json(path, record)
        return True

    def put_json(self, path: str, record: Any) -> None:
        """Writes or replaces a record: for pointers, never for truths."""
        self.files.put_bytes(path, _encode(record))


def _encode(record: Any) -> bytes:
    return json.dumps(record, sort_keys=True, indent=1).encode()


def _lost(url: str, blob: Blob) -> StoreError:
    return StoreError(
        f"{url}/{blob.path}: named by a manifest but gone from the store. Run the stage that made it with --force."
    )


def _damaged(url: str, blob: Blob) -> CorruptBlobError:
    return CorruptBlobError(
        f"{url}/{blob.path}: its bytes do not match its sha256. Run the stage that made it with --force."
    )
