"""Running ahead: order, errors, bounds, and ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from stages.latents.prefetch import Prefetched


def test_everything_comes_in_order() -> None:
    with Prefetched(iter(range(100)), 3) as ahead:
        assert list(ahead) == list(range(100))


def test_an_error_comes_where_its_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("three")

    with Prefetched(items(), 5) as ahead:
        iterator = iter(ahead)
        assert [next(iterator), next(iterator)] == [1, 2]
        with pytest.raises(KeyError, match="three"):
            next(iterator)


def test_it_runs_ahead_by_no_more_than_it_may() -> None:
    made = 0
    behind = threading.Event()

    def items() -> Iterator[int]:
        nonlocal made
        for number in range(50):
            made += 1
            if made == 4:
                behind.set()
            yield number

    with Prefetched(items(), 2) as ahead:
        iterator = iter(ahead)
        assert next(iterator) == 0
        assert behind.wait(10)  # one in hand, two waiting, one more made and held back
        assert made == 4
        assert list(iterator) == list(range(1, 50))


def test_leaving_early_ends_the_thread() -> None:
    with Prefetched(iter(range(1000)), 1) as ahead:
        for item in ahead:
            if item == 3:
                break
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
