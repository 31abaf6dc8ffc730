"""Images are checked on all cores, a bounded number at a time, and a decoder that crashes costs one image only."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType

from stages.core.fingerprint import digest_file
from stages.download.images import Inspection, inspect_file

AHEAD_PER_WORKER = 4
# Starting processes takes a few seconds; checking this many bytes takes one.
ALONE_BELOW_BYTES = 32_000_000


def _start_worker() -> None:
    """In each worker: Ctrl-C is the parent's business, and a worker whose parent was killed leaves too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is None:
        return

    def leave_with_parent(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, args=(parent.sentinel,), daemon=True).start()


@dataclass
class _Task:
    path: Path
    future: Future[Inspection] | None


class ImageChecker:
    """Checks images in worker processes, in order.

    Args:
        workers: processes; 0 is one for each core that this process may use.
        minimum_edge, maximum_pixels: see `inspect`.
        expected_bytes: of all images that will come; a few are checked without any process.
    """

    def __init__(self, workers: int, minimum_edge: int, maximum_pixels: int, expected_bytes: int) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self._limits = (minimum_edge, maximum_pixels)
        self._pool: ProcessPoolExecutor | None = None
        self._single: ProcessPoolExecutor | None = None
        self._alone = self.workers == 1 or expected_bytes < ALONE_BELOW_BYTES

    def __enter__(self) -> ImageChecker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def check(self, paths: Iterable[Path]) -> Iterator[tuple[Path, Inspection]]:
        """Each path with what was found, in order. Paths are drawn only a little ahead of what is handed out."""
        if self._alone:
            for path in paths:
                yield path, self._here(path)
            return
        window = self.workers * AHEAD_PER_WORKER
        running: deque[_Task] = deque()
        for path in paths:
            running.append(_Task(path, self._submit(path)))
            if len(running) >= window:
                task = running.popleft()
                yield task.path, self._result(task, running)
        while running:
            task = running.popleft()
            yield task.path, self._result(task, running)

    def _here(self, path: Path) -> Inspection:
        try:
            return inspect_file(path, *self._limits)
        except OSError as error:
            return Inspection("", 0, refused=f"cannot be read ({error.strerror})")

    def _submit(self, path: Path) -> Future[Inspection] | None:
        """None where the pool broke under an earlier image; that one's turn comes first."""
        if self._pool is None:
            # Not forked: this process may have threads (a flow's, the Hub client's), and theirs are the locks that a
            # forked child would wait for.
            self._pool = ProcessPoolExecutor(self.workers, get_context("spawn"), _start_worker)
        try:
            return self._pool.submit(inspect_file, path, *self._limits)
        except BrokenProcessPool:
            return None

    def _result(self, task: _Task, running: Iterable[_Task]) -> Inspection:
        if task.future is not None:
            try:
                return task.future.result()
            except OSError as error:
                return Inspection("", 0, refused=f"cannot be read ({error.strerror})")
            except BrokenProcessPool:
                pass
        # Some image killed its process, and with it the pool. Each that was in flight is tried by itself, so that only
        # the one that did it is refused.
        self._shut(self._pool)
        self._pool = None
        for other in running:
            future = other.future
            if future is not None and (future.cancelled() or not future.done() or future.exception() is not None):
                other.future = None
        if self._single is None:
            self._single = ProcessPoolExecutor(1, get_context("spawn"), _start_worker)
        try:
            return self._single.submit(inspect_file, task.path, *self._limits).result()
        except OSError as error:
            return Inspection("", 0, refused=f"cannot be read ({error.strerror})")
        except BrokenProcessPool:
            self._shut(self._single)
            self._single = None
            size = task.path.stat().st_size
            return Inspection(digest_file(task.path), size, refused="cannot be decoded: it crashes the decoder")

    def _close(self) -> None:
        self._shut(self._pool)
        self._shut(self._single)
        self._pool = self._single = None

    @staticmethod
    def _shut(pool: ProcessPoolExecutor | None) -> None:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
