"""A folder on this machine as a source."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from stages.core.errors import ConfigError, TransientError
from stages.core.statcache import StatCache
from stages.download.captions import Strategy
from stages.download.config import LocalSource
from stages.download.listing import SourceFile, is_image, is_wanted


class LocalFolder:
    """A folder, searched recursively. Hidden files and folders are passed over; links are followed, loops are not.

    Args:
        section: where it is.
        field: the configuration's name of the source, for messages.
        strategy: whether caption files are wanted.
        digests: remembered digests, so that unchanged files are not read to list them.
    """

    commit: str | None = None

    def __init__(self, section: LocalSource, field: str, strategy: Strategy, digests: StatCache | None) -> None:
        self.folder = Path(section.path).expanduser()
        self.where = f"the folder {section.path}"
        self.field = f"{field}.path"
        self._strategy = strategy
        self._digests = digests

    def check(self) -> None:
        """Raises:
        ConfigError: there is no such folder, or it may not be read.
        """
        if not self.folder.exists():
            raise ConfigError(f"{self.field}: there is no folder {self.folder} (looked in {Path.cwd()})")
        if not self.folder.is_dir():
            raise ConfigError(f"{self.field}: {self.folder} is a file; give the folder that holds the images")
        if not os.access(self.folder, os.R_OK | os.X_OK):
            raise ConfigError(f"{self.field}: no permission to read {self.folder}")

    def has_images(self) -> bool:
        return any(is_image(path) for path in self._walk())

    def list_files(self) -> list[SourceFile]:
        self.check()
        return self._identified(sorted(self._walk()))

    def read_texts(self, files: Sequence[SourceFile]) -> Iterator[bytes]:
        for path in self.fetch(files):
            try:
                yield path.read_bytes()
            except OSError as error:
                raise TransientError(f"{path}: was there a moment ago ({error.strerror}); run again") from error

    def fetch(self, files: Sequence[SourceFile]) -> Iterator[Path]:
        return (self.folder / file.path for file in files)

    def _walk(self) -> Iterator[str]:
        """Paths of wanted files relative to the folder. A folder that links lead to twice is entered once."""
        entered: set[tuple[int, int]] = set()
        waiting = [self.folder]
        while waiting:
            folder = waiting.pop()
            try:
                status = folder.stat()
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                raise ConfigError(f"{self.field}: cannot read the folder {folder} ({error.strerror})") from error
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            for entry in reversed(entries):  # a stack: the first by name is the next to be entered
                if entry.name.startswith("."):
                    continue
                path = Path(entry.path)
                if entry.is_dir():
                    waiting.append(path)
                    continue
                relative = path.relative_to(self.folder).as_posix()
                if is_wanted(relative, self._strategy):
                    yield relative

    def _identified(self, paths: list[str]) -> list[SourceFile]:
        files: dict[str, SourceFile] = {}
        readable: list[tuple[str, int]] = []
        for path in paths:
            reason, size = self._judge(path)
            if reason is None:
                readable.append((path, size))
            else:
                files[path] = SourceFile(path.encode(errors="backslashreplace").decode(), size, refused=reason)
        for (path, size), digest in zip(readable, self._digests_of([path for path, _ in readable]), strict=True):
            refused = None if digest else "cannot be read"
            files[path] = SourceFile(path, size, digest, refused)
        return [files[path] for path in paths]

    def _judge(self, path: str) -> tuple[str | None, int]:
        """Why a file cannot be used, and its size in bytes."""
        try:
            path.encode()
        except UnicodeEncodeError:
            return "the file's name is not UTF-8; rename it", 0
        full = self.folder / path
        try:
            status = full.stat()
        except FileNotFoundError:
            return "broken link", 0
        except OSError as error:
            return f"cannot be read ({error.strerror})", 0
        if not full.is_file():
            return "not a regular file", 0
        if not os.access(full, os.R_OK):
            return "no permission to read it", status.st_size
        return None, status.st_size

    def _digests_of(self, paths: list[str]) -> list[str]:
        """sha256 of each file; '' for one that fails while it is read (a bad disk, a deleted file)."""
        if self._digests is None:
            raise TypeError("listing a folder with identities needs a digest cache")
        full = [self.folder / path for path in paths]
        try:
            return self._digests.digests(full)
        except OSError:
            found = []
            for path in full:
                try:
                    found.append(self._digests.digest(path))
                except OSError:
                    found.append("")
            return found
