"""A memory of file digests: a file whose size, time and inode have not changed is not read again to be hashed.

Only a memory: deleting it costs time, never truth, and a file that cannot be used as one is done without. SQLite, so
several processes may share it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from stages.core.fingerprint import digest_file

T = TypeVar("T")
_SCHEMA = "CREATE TABLE IF NOT EXISTS digest (path TEXT PRIMARY KEY, stat TEXT NOT NULL, sha256 TEXT NOT NULL)"


class StatCache:
    """sha256 of local files, remembered by (path, size, mtime, inode) in a SQLite file, and in this process where that
    file cannot be read or written.

    Raises:
        OSError: the folder of the SQLite file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._hashed_here: dict[tuple[str, str], str] = {}

    def digests(self, paths: list[Path]) -> list[str]:
        """Hex sha256 of each file, read only where it has changed since it was last asked for."""
        asked = [(str(path.absolute()), _stat(path)) for path in paths]
        nothing: dict[tuple[str, str], str] = {}
        known = {**self._hashed_here, **self._use(lambda database: _recall(database, asked), nothing)}
        fresh: dict[tuple[str, str], str] = {}
        for path, key in zip(paths, asked, strict=True):
            if key not in known:
                known[key] = fresh[key] = digest_file(path)
        if fresh:
            self._hashed_here.update(fresh)
            self._use(lambda database: _remember(database, fresh), None)
        return [known[key] for key in asked]

    def digest(self, path: Path) -> str:
        return self.digests([path])[0]

    def _use(self, call: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """What `call` finds in the memory. A damaged one is begun anew; `otherwise` where there can be none."""
        for _ in range(2):
            try:
                database = sqlite3.connect(self.path, timeout=30)
                try:
                    database.execute("PRAGMA journal_mode=WAL")
                    database.execute("PRAGMA synchronous=OFF")
                    with database:
                        database.execute(_SCHEMA)
                        return call(database)
                finally:
                    database.close()
            except sqlite3.OperationalError:  # not ours to write, locked for long, the disk is full
                return otherwise
            except sqlite3.DatabaseError:  # no database, or a damaged one
                try:
                    for name in ("", "-wal", "-shm"):
                        self.path.with_name(self.path.name + name).unlink(missing_ok=True)
                except OSError:
                    return otherwise
        return otherwise


def _stat(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"


def _recall(database: sqlite3.Connection, asked: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    found = {}
    for key in asked:
        row = database.execute("SELECT sha256 FROM digest WHERE path = ? AND stat = ?", key).fetchone()
        if row is not None:
            found[key] = str(row[0])
    return found


def _remember(database: sqlite3.Connection, fresh: dict[tuple[str, str], str]) -> None:
    rows = [(*key, sha256) for key, sha256 in fresh.items()]
    database.executemany("INSERT OR REPLACE INTO digest VALUES (?, ?, ?)", rows)
