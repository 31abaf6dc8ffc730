"""Which samples each step sees: a pure function of (seed, epoch), so a resumed run sees what was next.

An epoch takes every training sample once, and once more for each repeat of its data set. Shards are put in random order
and read in windows: samples are shuffled within a window, so a big data set is never needed whole, and a small one (no
more shards than a window) is shuffled whole. A batch holds one bucket. What is left of a bucket at the end of a window
waits for the next one; what is left at the end of the epoch is filled up to a batch with other samples of its bucket,
so that no sample is ever left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from stages.train.draws import numbers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Plan = NDArray[np.int32]  # (batches, batch size, 2): shard and row of each sample


@dataclass(frozen=True)
class ShardRows:
    """A shard as the order sees it: its bucket, the rows to train on, and how often an epoch shows them."""

    bucket: tuple[int, int]
    rows: Sequence[int]
    passes: int = 1


@dataclass
class Order:
    """The order of training.

    Args:
        shards: all latent shards.
        batch_size: samples in a batch.
        window: shards that are shuffled together.
        seed: of the run.
    """

    shards: Sequence[ShardRows]
    batch_size: int
    window: int
    seed: int
    _plans: dict[int, Plan] = field(default_factory=dict)

    @property
    def bucket_samples(self) -> dict[tuple[int, int], int]:
        """Samples of an epoch by bucket, repeats counted."""
        counts: Counter[tuple[int, int]] = Counter()
        for shard in self.shards:
            counts[shard.bucket] += len(shard.rows) * shard.passes
        return {bucket: count for bucket, count in sorted(counts.items()) if count}

    @property
    def batches_per_epoch(self) -> int:
        return sum(-(-count // self.batch_size) for count in self.bucket_samples.values())

    @property
    def filled_per_epoch(self) -> dict[tuple[int, int], int]:
        """Places in an epoch's batches that are filled with samples shown already, by bucket."""
        fills = {bucket: -count % self.batch_size for bucket, count in self.bucket_samples.items()}
        return {bucket: count for bucket, count in fills.items() if count}

    def batch(self, number: int) -> list[tuple[int, int]]:
        """The (shard, row) pairs of a batch; numbers count through all epochs."""
        epoch, index = divmod(number, self.batches_per_epoch)
        if epoch not in self._plans:
            # One epoch and the next: a prefetching reader is already there while the trainer is still here.
            self._plans = {known: plan for known, plan in self._plans.items() if known >= epoch - 1}
            self._plans[epoch] = plan_epoch(self.shards, self.batch_size, self.window, self.seed, epoch)
        return [(int(shard), int(row)) for shard, row in self._plans[epoch][index]]


def plan_epoch(shards: Sequence[ShardRows], batch_size: int, window: int, seed: int, epoch: int) -> Plan:
    """All batches of an epoch in order, as (batches, batch size, 2) shard and row numbers."""
    generator = numbers(seed, "order", epoch)
    turns = [number for number, shard in enumerate(shards) for _ in range(shard.passes) if len(shard.rows)]
    turns = [turns[place] for place in generator.permutation(len(turns))]
    waiting: dict[tuple[int, int], Plan] = {}
    batches: list[Plan] = []
    for start in range(0, len(turns), window):
        pools = {bucket: [samples] for bucket, samples in waiting.items()}
        for number in turns[start : start + window]:
            rows = np.asarray(shards[number].rows, dtype=np.int32)
            samples = np.stack([np.full_like(rows, number), rows], axis=1)
            pools.setdefault(shards[number].bucket, []).append(samples)
        last = start + window >= len(turns)
        waiting, ready = {}, []
        for bucket in sorted(pools):
            pool = generator.permutation(np.concatenate(pools[bucket]))
            if last:
                pool = _filled(pool, batch_size, generator)
            whole = len(pool) // batch_size * batch_size
            ready += list(pool[:whole].reshape(-1, batch_size, 2))
            if whole < len(pool):
                waiting[bucket] = pool[whole:]
        batches += [ready[place] for place in generator.permutation(len(ready))]
    return np.stack(batches) if batches else np.zeros((0, batch_size, 2), dtype=np.int32)


def _filled(pool: Plan, batch_size: int, generator: np.random.Generator) -> Plan:
    """The samples and as many of them again as the last batch lacks: others than are in it already, where there are."""
    missing = -len(pool) % batch_size
    if not missing:
        return pool
    tail = len(pool) % batch_size
    others = pool[:-tail] if len(pool) > tail else pool
    chosen = np.concatenate([generator.permutation(others) for _ in range(-(-missing // len(others)))])[:missing]
    return np.concatenate([pool, chosen])
