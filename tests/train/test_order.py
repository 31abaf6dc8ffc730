from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from stages.train.order import Order, ShardRows, plan_epoch

A, B = (64, 64), (96, 64)


def shards() -> list[ShardRows]:
    return [ShardRows(A, range(10)), ShardRows(B, range(7)), ShardRows(A, range(5)), ShardRows(B, [1, 3, 4])]


def seen(plan: np.ndarray) -> Counter[tuple[int, int]]:
    return Counter((int(shard), int(row)) for batch in plan for shard, row in batch)


def test_it_is_a_function_of_seed_and_epoch() -> None:
    one, other = (plan_epoch(shards(), 4, 2, seed=5, epoch=3) for _ in range(2))
    assert (one == other).all()
    assert (plan_epoch(shards(), 4, 2, seed=5, epoch=4) != one).any()
    assert (plan_epoch(shards(), 4, 2, seed=6, epoch=3) != one).any()


@pytest.mark.parametrize("window", [1, 2, 64])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 9])
def test_every_sample_once_and_no_batch_mixes_buckets(batch_size: int, window: int) -> None:
    plan = plan_epoch(shards(), batch_size, window, seed=0, epoch=0)
    counts = seen(plan)
    assert set(counts) == {(s, row) for s, shard in enumerate(shards()) for row in shard.rows}
    for batch in plan:
        assert len({shards()[shard].bucket for shard, _ in batch}) == 1
    extra = {bucket: -total % batch_size for bucket, total in ((A, 15), (B, 10))}
    for bucket, fills in extra.items():
        shown = sum(count for (shard, _), count in counts.items() if shards()[shard].bucket == bucket)
        assert shown == {A: 15, B: 10}[bucket] + fills
    assert len(plan) == Order(shards(), batch_size, window, 0).batches_per_epoch


def test_a_bucket_smaller_than_a_batch_is_filled_with_itself() -> None:
    plan = plan_epoch([ShardRows(A, range(8)), ShardRows(B, range(3))], 8, 64, seed=0, epoch=0)
    small = [batch for batch in plan if batch[0][0] == 1]
    assert len(small) == 1
    counts = seen(np.stack(small))
    assert set(counts) == {(1, 0), (1, 1), (1, 2)}
    assert max(counts.values()) - min(counts.values()) <= 1
    assert Order([ShardRows(A, range(8)), ShardRows(B, range(3))], 8, 64, 0).filled_per_epoch == {B: 5}


def test_places_are_filled_with_others_than_the_batch_has() -> None:
    for epoch in range(20):
        plan = plan_epoch([ShardRows(A, range(10))], 4, 64, seed=0, epoch=epoch)
        assert all(len({tuple(sample) for sample in batch.tolist()}) == 4 for batch in plan)


def test_repeats_show_a_shard_more_often() -> None:
    plan = plan_epoch([ShardRows(A, range(4), passes=3), ShardRows(A, range(4))], 1, 64, seed=0, epoch=0)
    counts = seen(plan)
    assert all(counts[(0, row)] == 3 and counts[(1, row)] == 1 for row in range(4))


def test_a_window_reads_few_shards_at_a_time() -> None:
    many = [ShardRows(A, range(20)) for _ in range(12)]
    plan = plan_epoch(many, 5, 3, seed=0, epoch=0)
    firsts, lasts = {}, {}
    for place, batch in enumerate(plan):
        for shard, _ in batch:
            firsts.setdefault(int(shard), place)
            lasts[int(shard)] = place
    for place in range(len(plan)):
        open_shards = sum(firsts[shard] <= place <= lasts[shard] for shard in firsts)
        assert open_shards <= 3 + 1, "a window, and what waited of the one before"
    assert max(lasts[shard] - firsts[shard] for shard in firsts) > 3, "but they are mixed within it"


def test_a_small_data_set_is_shuffled_whole() -> None:
    plan = plan_epoch([ShardRows(A, range(50)) for _ in range(2)], 10, 64, seed=0, epoch=0)
    assert all(len({int(shard) for shard, _ in batch}) == 2 for batch in plan)


def test_numbers_count_through_epochs() -> None:
    order = Order(shards(), 4, 64, 1)
    per_epoch = order.batches_per_epoch
    third = plan_epoch(shards(), 4, 64, 1, 2)
    for index in (0, per_epoch - 1):
        assert order.batch(2 * per_epoch + index) == [tuple(sample) for sample in third[index].tolist()]
    first = plan_epoch(shards(), 4, 64, 1, 0)
    assert order.batch(0) == [tuple(sample) for sample in first[0].tolist()], "also when asked to go back"


def test_empty_shards_are_passed_over() -> None:
    plan = plan_epoch([ShardRows(A, []), ShardRows(A, range(2))], 2, 1, seed=0, epoch=0)
    assert plan.tolist() in ([[[1, 0], [1, 1]]], [[[1, 1], [1, 0]]])
    assert plan_epoch([ShardRows(A, [])], 2, 1, seed=0, epoch=0).shape == (0, 2, 2)
