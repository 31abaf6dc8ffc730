"""A data set repository on the Hugging Face Hub as a source, pinned to one commit.

Files come one by one through the client's own cache, so what was downloaded is never downloaded again; a file that a
new commit left as it was is taken from there without a request.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from stages.core import hub
from stages.core.errors import ConfigError
from stages.download.captions import Strategy
from stages.download.config import HubSource
from stages.download.listing import SourceFile, is_image, is_wanted

CONNECTIONS = 8
AHEAD = 2 * CONNECTIONS


class HubRepository:
    """A data set repository at one commit.

    Args:
        section: which one.
        field: the configuration's name of the source, for messages.
        strategy: whether caption files are wanted.
        commit: the commit, where it was resolved before.
    """

    def __init__(self, section: HubSource, field: str, strategy: Strategy, commit: str | None = None) -> None:
        self.section = section
        self.commit: str | None = commit
        self.field = f"{field}.folder" if section.folder else f"{field}.repo"
        self._strategy = strategy
        self._remote = hub.Remote(
            thing=f"the Hub data set {section.repo}",
            repo=section.repo,
            path=f"datasets/{section.repo}",
            field=f"{field}.repo",
            revision_field=f"{field}.revision",
            revision=section.revision,
            absent=f"Hub data set {section.repo}",
        )
        self._cache = hub.cache_folder()
        self._locks: dict[str, threading.Lock] = {}
        self._api = hub.client(hub.read_token())

    @property
    def where(self) -> str:
        return f"the Hub data set {self.section.repo} at {(self.commit or self.section.revision)[:10]}"

    def resolve(self) -> str:
        """The commit behind the configured revision, looked up once.

        Raises:
            ConfigError: no such repository or revision, or no right to read it.
            TransientError: the Hub did not answer.
        """
        if self.commit is None:
            repo = self.section.repo
            info = self._remote.ask("look up", lambda: self._api.dataset_info(repo, revision=self.section.revision))
            if info.gated:  # its state may be read by everyone, its files may not
                self._remote.ask("read", lambda: self._api.auth_check(repo, repo_type="dataset"))
            self.commit = str(info.sha)
        return self.commit

    def check(self) -> None:
        self.resolve()

    def has_images(self) -> bool:
        return any(is_image(file.path) for file in self.list_files())

    def list_files(self) -> list[SourceFile]:
        from huggingface_hub.errors import EntryNotFoundError

        repo, commit, folder = self.section.repo, self.resolve(), self.section.folder.strip("/")

        def tree() -> list[Any]:
            try:
                return list(
                    self._api.list_repo_tree(repo, folder or None, recursive=True, revision=commit, repo_type="dataset")
                )
            except EntryNotFoundError:
                raise ConfigError(f"{self.field}: {repo} has no {folder!r} at {commit[:10]}") from None

        files = []
        for entry in self._remote.ask("list", tree):
            path = entry.path.removeprefix(f"{folder}/") if folder else entry.path
            if not hasattr(entry, "blob_id") or not is_wanted(path, self._strategy):
                continue
            files.append(SourceFile(path, entry.size, hub.identity(entry)))
        return sorted(files, key=lambda file: file.path)

    def read_texts(self, files: Sequence[SourceFile]) -> Iterator[bytes]:
        for path in self.fetch(files):
            yield path.read_bytes()

    def fetch(self, files: Sequence[SourceFile]) -> Iterator[Path]:
        """Verified local copies, in order; a bounded number is fetched ahead.

        Raises:
            ConfigError: no right to read them.
            TransientError: the Hub did not answer, or sent wrong bytes twice.
        """
        pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="hub")
        try:
            running: deque[Future[Path]] = deque()
            for file in files:
                running.append(pool.submit(self._fetch_one, file))
                if len(running) >= AHEAD:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _fetch_one(self, file: SourceFile) -> Path:
        # Files of the same bytes are one file in the cache: one thread at a time fetches it, the others find it.
        with self._locks.setdefault(file.identity, threading.Lock()):
            return self._fetch_alone(file)

    def _fetch_alone(self, file: SourceFile) -> Path:
        known = self._in_cache(file)
        if known is not None:
            return known
        folder = self.section.folder.strip("/")
        path = f"{folder}/{file.path}" if folder else file.path
        return self._remote.whole(path, file.identity, partial(self._download, path))

    def _in_cache(self, file: SourceFile) -> Path | None:
        """The copy in the client's cache, which names files by their digests, if it is there and whole."""
        from huggingface_hub import constants  # imported late, like all heavy libraries: `--help` stays fast

        folder = Path(self._cache or constants.HF_HUB_CACHE)
        blob = folder / f"datasets--{self.section.repo.replace('/', '--')}" / "blobs" / file.identity
        try:
            return blob if blob.stat().st_size == file.bytes and hub.is_whole(blob, file.identity) else None
        except OSError:
            return None

    def _download(self, path: str) -> str:
        from huggingface_hub import hf_hub_download

        return str(
            hf_hub_download(
                self.section.repo,
                path,
                repo_type="dataset",
                revision=self.commit,
                cache_dir=self._cache,
                endpoint=hub.endpoint(),
                token=hub.read_token(),
                tqdm_class=_silent(),
            )
        )


def _silent() -> Any:
    """A progress bar that shows nothing: the stage has its own."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    return Silent
