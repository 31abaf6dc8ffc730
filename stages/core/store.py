"""The store: blobs by content, manifests written last, memos, runs. The one truth about what is done.

artifacts/<stage>/<fingerprint>/manifest.json   create-only; its existence is the commit
blobs/<aa>/<sha256><suffix>                     shards and files by content
memo/<stage>/<key>.json                         what a map stage made of one unit of its input
runs/<name>/...                                 pointers, checkpoints in progress, reports
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from stages.core.artifact import KEYS, SCHEMA_VERSION, ArtifactRef, Blob, Manifest, Shard, manifest_path
from stages.core.config import Section
from stages.core.errors import CorruptBlobError, StoreError
from stages.core.filesystem import Files, LocalFiles, ObjectFiles
from stages.core.fingerprint import digest_file
from stages.core.shard import MappedShard
from stages.core.statcache import StatCache


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
    """Blobs that were used longest ago are dropped from the local cache above this size, in 10^9 bytes."""
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
        self.files = files or open_files(section)
        self._digests: StatCache | None = None
        self._probed = False

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
            A warning for the person, or None.
        Raises:
            StoreError: no permission, or create-only writes are ignored and `store.allow_unconditional` is off.
        """
        if self._probed:
            return None
        path = f"runs/.probe/{uuid.uuid4().hex}"
        self.files.create(path, b"first")
        try:
            second = self.files.create(path, b"second")
            kept = self.files.read(path)
        finally:
            self.files.delete(path)
        self._probed = True
        if kept is None:
            raise StoreError(f"{self.url}: an object that was just written cannot be read back")
        if not second and kept == b"first":
            return None
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
        return self.files.size(blob.path) == blob.bytes

    def put_file(self, path: Path, suffix: str | None = None) -> Blob:
        """Uploads a local file as a blob, unless the store has it. Verified before this returns.

        Raises:
            CorruptBlobError: what arrived is not what was sent.
        """
        blob = Blob(sha256=digest_file(path), bytes=path.stat().st_size, suffix=suffix or path.suffix)
        if self.has(blob):
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
        if self.section.verify_uploads == "size":
            return True
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
        if target.exists() and target.stat().st_size == blob.bytes:
            os.utime(target)
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

    def _trim_cache(self) -> None:
        limit = self.section.cache_gb * 1e9
        folder = self.cache_dir / "blobs"
        entries = []
        for path in folder.glob("??/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            entries.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        # A file that is mapped into a running training stays readable after its name is gone.
        for _, size, path in sorted(entries)[:-1]:
            if total <= limit:
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

    def commit(self, manifest: Manifest) -> Manifest:
        """Makes an artifact exist. The first one to commit wins; a later one gets the winner's manifest back."""
        data = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True).encode()
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

    def create_json(self, path: str, record: Any) -> bool:
        """Writes a record once; False if another one stands there."""
        return self.files.create(path, _encode(record))

    def put_json(self, path: str, record: Any) -> None:
        """Writes or replaces a record: for pointers, never for truths."""
        self.files.put_bytes(path, _encode(record))


def open_files(section: StoreSection) -> Files:
    """What a store's URL means.

    Raises:
        StoreError: the URL is of no known kind.
    """
    url = section.url
    if "://" not in url:
        return LocalFiles(Path(url).expanduser())
    protocol, _, rest = url.partition("://")
    if protocol == "file":
        return LocalFiles(Path(rest).expanduser())
    if not rest.strip("/"):
        raise StoreError(f"store.url {url}: names no bucket")
    if protocol != "s3":
        return ObjectFiles(url, {})
    endpoint = section.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = section.region or os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION")
    style = section.addressing_style
    if style == "auto" and endpoint:
        style = "path"
    options: dict[str, Any] = {
        "use_listings_cache": False,
        "skip_instance_cache": True,
        "max_concurrency": 4,
        "config_kwargs": {
            "signature_version": "s3v4",
            "s3": {"addressing_style": style},
            "connect_timeout": 5,
            "read_timeout": 60,
            "retries": {"mode": "standard", "total_max_attempts": 3},
            # Several servers return the whole object's checksum for a range, or reject the trailer.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    }
    if endpoint:
        options["endpoint_url"] = endpoint
    if region:
        options["client_kwargs"] = {"region_name": region}
    return ObjectFiles(url, options)


def _encode(record: Any) -> bytes:
    return json.dumps(record, sort_keys=True, indent=1).encode()


def _lost(url: str, blob: Blob) -> StoreError:
    return StoreError(
        f"{url}/{blob.path}: named by a manifest but gone from the store. Run the stage that made it with --force."
    )


def _damaged(url: str, blob: Blob) -> CorruptBlobError:
    return CorruptBlobError(
        f"{url}/{blob.path}: its bytes do not match its sha256. Delete it and run the stage that made it with --force."
    )
