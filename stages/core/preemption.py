"""Being asked to leave: SIGTERM (spot eviction, `docker stop`, cancelling) and Ctrl-C as a flag, not as an exception.

Work is only given up at places where everything finished is saved. A second Ctrl-C ends the process at once. A second
SIGTERM changes nothing: a process group, a service manager and a parent may each send one for the same wish. Whoever
does not want to wait sends SIGKILL.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Set by whoever starts a stage as its child: the child is then asked to stop when that process dies, however it dies.
DIE_WITH_PARENT = "LORALINE_DIE_WITH_PARENT"
_PR_SET_PDEATHSIG = 1  # prctl(2)


class StopFlag:
    """Set by a signal (or by a test); looked at between units of work."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.reason = ""

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def set(self, reason: str) -> None:
        self.reason = reason
        self._event.set()


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Turns SIGTERM and SIGINT into a set flag; a second SIGINT does what it always did.

    Only the main thread of a process may take signals: elsewhere the flag is simply never set.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def take(number: int, frame: FrameType | None) -> None:
        flag.set(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])

    for number in before:
        signal.signal(number, take)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with_parent() -> None:
    """Asks the kernel for a SIGTERM when the parent process is gone (Linux), if the parent wished so."""
    if os.environ.get(DIE_WITH_PARENT) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
