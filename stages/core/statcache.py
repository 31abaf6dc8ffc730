"""A memory of file digests: a file whose size, time and inode have not changed is not read again to be hashed.

Only a memory: deleting it costs time, never truth. SQLite, so several processes may share it.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from stages.core.fingerprint import digest_file

_SCHEMA = "CREATE TABLE IF NOT EXISTS digest (path TEXT PRIMARY KEY, stat TEXT NOT NULL, sha256 TEXT NOT NULL)"


class StatCache:
    """sha256 of local files, remembered by (path, size, mtime, inode) in a SQLite file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        with self._connect() as database:
            database.execute(_SCHEMA)

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=30)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=OFF")
        return database

    def digests(self, paths: list[Path]) -> list[str]:
        """Hex sha256 of each file, read only where it has changed since it was last asked for."""
        found: list[str] = []
        fresh: list[tuple[str, str, str]] = []
        database = self._connect()
        try:
            for path in paths:
                name = str(path.absolute())
                status = path.stat()
                stat = f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
                row = database.execute("SELECT sha256 FROM digest WHERE path = ? AND stat = ?", (name, stat)).fetchone()
                if row is None:
                    row = (digest_file(path),)
                    fresh.append((name, stat, row[0]))
                found.append(row[0])
            if fresh:
                with database:
                    database.executemany("INSERT OR REPLACE INTO digest VALUES (?, ?, ?)", fresh)
        finally:
            database.close()
        return found

    def digest(self, path: Path) -> str:
        return self.digests([path])[0]
