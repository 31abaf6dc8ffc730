"""The worker processes: every core decodes, results come back in order, and little is in flight.

Workers get file paths and offsets, and read the bytes themselves: the parent never copies an original.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

from PIL import Image

from stages.bucket.geometry import RefusedError, Rules
from stages.bucket.pixels import Crop, make_crop
from stages.core.errors import TransientError

IN_FLIGHT_PER_WORKER = 3
"""Pictures handed out but not yet written, for each worker: enough that none waits, few enough to stay small."""


@dataclass(frozen=True)
class Task:
    """One picture to crop: where its bytes lie in a raw shard, and its digest."""

    unit: int
    key: str
    name: str
    shard: Path
    offset: int
    size: int
    image_sha256: str


@dataclass(frozen=True)
class Refused:
    """A picture that was not used, and why."""

    reason: str


def available_cores() -> int:
    """Cores that this process may use: its affinity, and its container's quota where there is one."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(min(cores, -(-int(quota) // int(period))), 1)
    except (OSError, ValueError):  # no such control group, or 'max': no quota
        return cores


def crop_all(tasks: Iterable[Task], rules: Rules, workers: int) -> Iterator[tuple[Task, Crop | Refused]]:
    """Crops pictures on several processes, lazily and in the order of the tasks.

    Args:
        tasks: taken only as fast as results are.
        rules: the geometry.
        workers: processes.
    Raises:
        TransientError: a worker process died, most likely for want of memory.
    """
    # Spawned, not forked: the parent may have threads (an event loop, a store's connection), which a fork would break.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(rules,))
    waiting: deque[tuple[Task, Future[Crop | Refused]]] = deque()
    try:
        for task in tasks:
            waiting.append((task, executor.submit(_work, task)))
            while len(waiting) >= workers * IN_FLIGHT_PER_WORKER:
                yield _next(waiting, workers)
        while waiting:
            yield _next(waiting, workers)
    except BrokenProcessPool as error:
        raise _died(workers) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _next(waiting: deque[tuple[Task, Future[Crop | Refused]]], workers: int) -> tuple[Task, Crop | Refused]:
    task, future = waiting.popleft()
    try:
        return task, future.result()
    except MemoryError as error:
        raise _died(workers) from error


def _died(workers: int) -> TransientError:
    return TransientError(
        f"a process that crops pictures died, most likely for want of memory: {workers} ran at once, set "
        f"bucket.processes to fewer and run again (finished shards are kept)"
    )


_RULES: Rules | None = None


def _start(rules: Rules) -> None:
    """Prepares a worker process, once."""
    global _RULES
    _RULES = rules
    # Ctrl-C reaches the whole process group: the parent decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["VIPS_CONCURRENCY"] = "1"  # there is a process for each core
    import pyvips  # type: ignore[import-untyped]  # late: it reads that as it loads, and the parent needs none of it

    pyvips.cache_set_max(0)  # no picture comes twice, and what is remembered would stay in memory
    Image.MAX_IMAGE_PIXELS = None  # the download set the limit; make_crop has the last one
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Ends this process when its parent is gone: a killed parent closes nothing, and the queue would block for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(task: Task) -> Crop | Refused:
    if _RULES is None:
        raise RuntimeError("a worker that was not started by crop_all")
    try:
        with task.shard.open("rb") as file:
            file.seek(task.offset)
            data = file.read(task.size)
    except FileNotFoundError as error:
        raise TransientError(
            f"{task.shard}: dropped from the local cache while it was read: make store.cache_gb larger and run again"
        ) from error
    try:
        return make_crop(data, _RULES, task.image_sha256)
    except RefusedError as error:
        return Refused(str(error))
