"""An iterator that runs ahead in a thread of its own, by a few items and no more."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class _End:
    """The last thing in the queue: the iterator is through, or failed."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Prefetched(Generic[T]):
    """`with Prefetched(items, 2) as ahead: for item in ahead: ...`: the next items are made while this one is used.

    An exception of the inner iterator comes out where its item would have. Leaving the block early ends the thread.

    Args:
        items: what runs ahead; used by the thread alone.
        depth: how many finished items may wait; bounds the memory.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[T | _End] = queue.Queue(maxsize=depth)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                if self._left.is_set():
                    return
                self._queue.put(item)
        except BaseException as caught:  # handed to the other thread, which raises it
            error = caught
        self._queue.put(_End(error))

    def __enter__(self) -> Prefetched[T]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        # The thread may be waiting for room: at most one put is under way, and then it sees that nobody listens.
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        while True:
            item = self._queue.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
