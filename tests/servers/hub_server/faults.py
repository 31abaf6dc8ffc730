"""Faults a test scripts in advance: which request they hit, how often, and what goes wrong."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import Literal

# status: an error answer, nothing is done      cut: the answer's body stops half-way, the connection closes
# corrupt: a flipped byte in the answer's body   lose: the request is carried out, the connection closes unanswered
# damage: a flipped byte in what is stored       hold: the request waits until the test lets it go on
What = Literal["status", "cut", "corrupt", "lose", "damage", "hold"]


@dataclass
class Hold:
    """A request kept waiting: `reached` is set when it has come in, `release` lets it go on."""

    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


@dataclass
class Fault:
    """One scripted fault. `method` may be "*"; `pattern` is searched in the decoded path."""

    what: What
    method: str
    pattern: re.Pattern[str]
    times: int
    skip: int = 0
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    after: int | None = None  # cut: body bytes sent first; None: half of them
    hold: Hold = field(default_factory=Hold)


class Faults:
    """The script of one server; each fault is used up after `times` requests."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def take(self, what: What, method: str, path: str) -> Fault | None:
        """The first scripted fault for this request, counted as used; None when all goes well."""
        with self._lock:
            for fault in self._faults:
                if fault.what != what or fault.method not in ("*", method) or not fault.pattern.search(path):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                elif fault.times > 0:
                    fault.times -= 1
                    return fault
            return None

    def pending(self) -> list[Fault]:
        """Faults that have not been used up: a test can assert that there are none left."""
        with self._lock:
            return [fault for fault in self._faults if fault.times > 0]

    def clear(self) -> None:
        """Forget the script, and let go of every request held by it."""
        with self._lock:
            for fault in self._faults:
                fault.hold.release.set()
            self._faults.clear()


def flip_byte(content: bytes) -> bytes:
    """The same bytes but for one in the middle: same size, other digest."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :] if content else content
