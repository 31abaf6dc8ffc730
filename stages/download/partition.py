"""Shards keep still: which sample goes into which raw shard, so that a source that grows leaves finished shards alone.

A sample stays in the shard that it was in; a removed one only leaves its own shard; new ones go to new shards at the
end. Pure functions: the same listing and the same earlier partition always give the same result, and partitioning
again changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stages.download.listing import Sample

_NAME = re.compile(r"raw-(\d{5,})")


@dataclass(frozen=True)
class PlannedShard:
    """A shard as planned: its name and the keys of its samples, in order."""

    name: str
    keys: tuple[str, ...]


def partition(
    samples: Sequence[Sample], earlier: Iterable[PlannedShard], shard_bytes: int, shard_samples: int
) -> list[PlannedShard]:
    """Distributes samples over shards.

    Args:
        samples: of the source as it is now, by path.
        earlier: the partition of the source as it was.
        shard_bytes: a new shard is closed when its images have this size ...
        shard_samples: ... or when it has this many samples.
    """
    sizes = {sample.key: sample.image.bytes for sample in samples}
    planned: list[PlannedShard] = []
    placed: set[str] = set()
    highest = -1
    for shard in earlier:
        highest = max(highest, _number(shard.name))
        keys = tuple(key for key in shard.keys if key in sizes and key not in placed)
        placed.update(keys)
        if keys:
            planned.append(PlannedShard(shard.name, keys))
    keys_now: list[str] = []
    size_now = 0
    for key in (sample.key for sample in samples if sample.key not in placed):
        keys_now.append(key)
        size_now += sizes[key]
        if size_now >= shard_bytes or len(keys_now) >= shard_samples:
            highest += 1
            planned.append(PlannedShard(f"raw-{highest:05d}", tuple(keys_now)))
            keys_now, size_now = [], 0
    if keys_now:
        planned.append(PlannedShard(f"raw-{highest + 1:05d}", tuple(keys_now)))
    return planned


def to_record(shards: Iterable[PlannedShard]) -> dict[str, Any]:
    """As JSON, for the store."""
    return {"schema": 1, "shards": [{"name": shard.name, "keys": list(shard.keys)} for shard in shards]}


def from_record(record: Any) -> list[PlannedShard]:
    """Out of the store; nothing where there is none, or one that cannot be understood: it is only a memory."""
    try:
        if record["schema"] != 1:
            return []
        shards = [PlannedShard(str(shard["name"]), tuple(map(str, shard["keys"]))) for shard in record["shards"]]
    except (KeyError, TypeError):
        return []
    names = [shard.name for shard in shards]
    return shards if all(_NAME.fullmatch(name) for name in names) and len(set(names)) == len(names) else []


def _number(name: str) -> int:
    found = _NAME.fullmatch(name)
    return int(found.group(1)) if found else -1
