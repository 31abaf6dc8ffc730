"""The memory of digests: right, and never in the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.core.fingerprint import digest_bytes
from stages.core.statcache import StatCache


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really read."""
    read: list[Path] = []

    def digest_file(path: Path) -> str:
        read.append(path)
        return digest_bytes(path.read_bytes())

    monkeypatch.setattr("stages.core.statcache.digest_file", digest_file)
    return read


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"data")
    return path


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, file: Path, hashed: list[Path]) -> None:
    memory = tmp_path / "cache" / "digests.sqlite"
    assert StatCache(memory).digest(file) == digest_bytes(b"data")
    assert StatCache(memory).digests([file, file]) == [digest_bytes(b"data")] * 2
    assert hashed == [file]
    file.write_bytes(b"other")
    assert StatCache(memory).digest(file) == digest_bytes(b"other")


@pytest.mark.parametrize("whole", [True, False])
def test_a_damaged_memory_is_begun_anew(tmp_path: Path, file: Path, hashed: list[Path], whole: bool) -> None:
    memory = tmp_path / "digests.sqlite"
    StatCache(memory).digest(file)
    memory.write_bytes(b"no database " * 1000 if whole else memory.read_bytes()[:4096] + b"\xff" * 8192)
    assert StatCache(memory).digest(file) == digest_bytes(b"data")
    assert StatCache(memory).digest(file) == digest_bytes(b"data")
    assert hashed == [file, file]


def test_where_there_can_be_no_memory_files_are_hashed_once_in_each_process(
    tmp_path: Path, file: Path, hashed: list[Path]
) -> None:
    memory = tmp_path / "digests.sqlite"
    memory.mkdir()
    cache = StatCache(memory)
    assert cache.digest(file) == cache.digest(file) == digest_bytes(b"data")
    assert hashed == [file]
