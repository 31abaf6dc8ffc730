"""Shards keep still: the partition as a pure function."""

from __future__ import annotations

import random

from stages.download.listing import Sample, SourceFile, sample_key
from stages.download.partition import PlannedShard, from_record, partition, to_record


def samples(*names: str, size: int = 10) -> list[Sample]:
    return [Sample(name, SourceFile(f"{name}.png", size, name), "caption") for name in sorted(names)]


def cut(items: list[Sample], earlier: list[PlannedShard] | None = None, most: int = 3) -> dict[str, str]:
    return {shard.name: "".join(shard.keys) for shard in partition(items, earlier or [], 1000, most)}


def test_fresh_partition_is_by_path() -> None:
    assert cut(samples(*"gfedcba")) == {"raw-00000": "abc", "raw-00001": "def", "raw-00002": "g"}


def test_a_shard_closes_at_its_size() -> None:
    shards = partition(samples(*"abcdef", size=400), [], 1000, 100)
    assert [len(shard.keys) for shard in shards] == [3, 3]


def test_new_samples_go_to_new_shards_wherever_they_sort() -> None:
    first = partition(samples(*"bdfh"), [], 1000, 3)
    assert cut(samples(*"abcdfhz"), first) == {"raw-00000": "bdf", "raw-00001": "h", "raw-00002": "acz"}


def test_a_removed_sample_leaves_only_its_own_shard() -> None:
    first = partition(samples(*"abcdefgh"), [], 1000, 3)
    assert cut(samples(*"abcdfgh"), first) == {"raw-00000": "abc", "raw-00001": "df", "raw-00002": "gh"}
    assert cut(samples(*"abcgh"), first) == {"raw-00000": "abc", "raw-00002": "gh"}


def test_again_changes_nothing_and_nothing_is_lost() -> None:
    rng = random.Random(4)
    letters = "abcdefghijklmnopqrstuvwxyz"
    planned: list[PlannedShard] = []
    for _ in range(200):
        items = samples(*rng.sample(letters, rng.randrange(1, 26)))
        before = {shard.name: set(shard.keys) for shard in planned}
        planned = partition(items, planned, 1000, 3)
        assert partition(items, planned, 1000, 3) == planned
        keys = [key for shard in planned for key in shard.keys]
        assert sorted(keys) == sorted(sample.key for sample in items)
        assert len({shard.name for shard in planned}) == len(planned)
        for shard in planned:
            assert set(shard.keys) <= before.get(shard.name, set(keys)) or not before.get(shard.name, set()) & set(keys)


def test_records() -> None:
    planned = partition(samples(*"abcd"), [], 1000, 3)
    assert from_record(to_record(planned)) == planned
    for broken in (None, [], {}, {"schema": 2, "shards": []}, {"schema": 1, "shards": [{"name": "../x", "keys": []}]}):
        assert from_record(broken) == []


def test_keys() -> None:
    key = sample_key("sub folder/Ünï cödé " + "x" * 100 + ".v2.png")
    assert len(key) <= 59
    assert key.replace("-", "").replace("_", "").isalnum()
    assert key.isascii()
    assert sample_key("a/cat.png") != sample_key("b/cat.png")
    assert sample_key("cat.png") != sample_key("cat.jpg")
    assert sample_key("....png").count(".") == 0
