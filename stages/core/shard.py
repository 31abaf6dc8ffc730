"""Shards: byte-for-byte deterministic WebDataset tars, written and read one sample at a time.

The same samples in the same order always give the same bytes (mtime 0, uid/gid 0, fixed mode, POSIX ustar headers
only), so the same content has the same digest. Plain `webdataset` reads them: a sample is a run of members that
share the key before the first dot.
"""

from __future__ import annotations

import io
import mmap
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from stages.core.errors import CorruptBlobError

# ustar holds 100 bytes of name without a prefix or an extended header; keys leave room for the extension.
KEY_PATTERN = re.compile(r"[A-Za-z0-9_\-]{1,72}")
EXTENSION_PATTERN = re.compile(r"[a-z0-9]+(\.[a-z0-9]+)?")
BLOCK = tarfile.BLOCKSIZE


class ShardWriter:
    """Writes one shard to a local file; a sample streams through, the shard is never whole in memory.

    Raises:
        ValueError: a key or an extension that plain webdataset could not group, or a key used twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = 0
        self.bytes = 0
        self._keys: dict[str, None] = {}
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (closed in close())

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Appends one sample: `members` maps an extension ('jpg', 'json', ...) to its bytes."""
        if not KEY_PATTERN.fullmatch(key):
            raise ValueError(f"{key!r} is no sample key: letters, digits, '_' and '-', at most 72")
        if key in self._keys:
            raise ValueError(f"sample key {key!r} twice in {self.path.name}")
        self._keys[key] = None
        for extension in sorted(members):
            if not EXTENSION_PATTERN.fullmatch(extension):
                raise ValueError(f"{extension!r} is no member extension")
            data = members[extension]
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(data)
            member.mode = 0o444
            self._tar.addfile(member, io.BytesIO(data))
            self.bytes += len(data)
        self.samples += 1

    @property
    def keys(self) -> list[str]:
        """Keys of the samples written so far, in order."""
        return list(self._keys)

    def close(self) -> None:
        self._tar.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_shard(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples of a shard in order, each as (key, {extension: bytes}).

    Raises:
        CorruptBlobError: the tar is damaged. (A tar cut at a member's border reads as a shorter one: the number of
            samples and the sha256 in the manifest are what notices that.)
    """
    try:
        with tarfile.open(path, "r|") as tar:
            current: str | None = None
            members: dict[str, bytes] = {}
            for member in tar:
                key, _, extension = member.name.partition(".")
                if key != current:
                    if current is not None:
                        yield current, members
                    current, members = key, {}
                file = tar.extractfile(member)
                members[extension] = file.read() if file is not None else b""
            if current is not None:
                yield current, members
    except tarfile.TarError as error:
        raise CorruptBlobError(f"{path.name}: damaged shard ({error})") from error


@dataclass(frozen=True)
class _Member:
    offset: int
    size: int


class MappedShard:
    """A shard on local disk, memory-mapped, with random access to its samples. Holds no sample in memory.

    Args:
        path: a tar that `ShardWriter` wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: dict[str, dict[str, _Member]] = {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                self._members.setdefault(key, {})[extension] = _Member(member.offset_data, member.size)
        self.keys: list[str] = list(self._members)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.keys else None

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: str) -> bool:
        return key in self._members

    def extensions(self, key: str) -> list[str]:
        return list(self._members[key])

    def read(self, key: str, extension: str) -> memoryview:
        """The bytes of one member, without a copy: valid while this object lives.

        Raises:
            KeyError: no such sample or member.
        """
        member = self._members[key][extension]
        if self._map is None:
            raise KeyError(key)
        return memoryview(self._map)[member.offset : member.offset + member.size]
