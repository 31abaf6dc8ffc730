"""Shards: deterministic, readable by plain webdataset, damaged ones noticed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import webdataset

from stages.core.errors import CorruptBlobError
from stages.core.fingerprint import digest_file
from stages.core.shard import MappedShard, ShardWriter, read_shard

SAMPLES = {f"sample-{index:03d}": {"json": b"{}", "bin": bytes([index]) * (700 * index)} for index in range(12)}


def write(path: Path, samples: dict[str, dict[str, bytes]] = SAMPLES) -> Path:
    with ShardWriter(path) as shard:
        for key, members in samples.items():
            shard.write(key, members)
    return path


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    one = write(tmp_path / "one.tar")
    os.utime(one, (1, 1))
    reversed_members = {key: dict(reversed(list(members.items()))) for key, members in SAMPLES.items()}
    assert digest_file(one) == digest_file(write(tmp_path / "two.tar", reversed_members))


def test_digest_is_the_same_on_every_machine(tmp_path: Path) -> None:
    """Pinned: a change of the layout changes every digest in every store, and must be meant."""
    path = write(tmp_path / "pinned.tar", {"a": {"txt": b"one"}, "b": {"txt": b"two"}})
    assert digest_file(path) == "4cf3c63199324e152ba05a040ef417b35be3009b891cdb0d2f5db70533e898ab"


def test_round_trip_in_order(tmp_path: Path) -> None:
    assert dict(read_shard(write(tmp_path / "s.tar"))) == SAMPLES
    assert [key for key, _ in read_shard(tmp_path / "s.tar")] == list(SAMPLES)


def test_plain_webdataset_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "s.tar")
    found = {
        sample["__key__"]: sample["bin"]
        for sample in webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False, empty_check=False)
    }
    assert found == {key: members["bin"] for key, members in SAMPLES.items()}


def test_mapped_shard_reads_any_sample(tmp_path: Path) -> None:
    mapped = MappedShard(write(tmp_path / "s.tar"))
    assert mapped.keys == list(SAMPLES)
    assert bytes(mapped.read("sample-007", "bin")) == SAMPLES["sample-007"]["bin"]
    assert bytes(mapped.read("sample-000", "bin")) == b""
    with pytest.raises(KeyError):
        mapped.read("sample-007", "jpg")


def test_empty_shard_can_be_mapped(tmp_path: Path) -> None:
    assert len(MappedShard(write(tmp_path / "empty.tar", {}))) == 0


@pytest.mark.parametrize("key", ["", "a.b", "../up", "a/b", "ä", "x" * 73, "a b"])
def test_keys_that_readers_would_split_are_refused(tmp_path: Path, key: str) -> None:
    with ShardWriter(tmp_path / "s.tar") as shard, pytest.raises(ValueError, match="sample key"):
        shard.write(key, {"txt": b""})


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s.tar") as shard:
        shard.write("a", {"txt": b""})
        with pytest.raises(ValueError, match="twice"):
            shard.write("a", {"txt": b""})


def test_a_shard_cut_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "s.tar")
    path.write_bytes(path.read_bytes()[: 9 * 1024 + 100])
    with pytest.raises(CorruptBlobError, match="damaged"):
        list(read_shard(path))
