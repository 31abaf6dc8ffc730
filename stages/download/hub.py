"""A data set repository on the Hugging Face Hub as a source, pinned to one commit.

The client does not notice wrong bytes of the right size; that is made good here. Files come one by one through the
client's own cache, so what was downloaded is never downloaded again; a file that a new commit left as it was is taken
from there without a request.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from stages.core import hub
from stages.core.errors import ConfigError, InputError, LoralineError, TransientError
from stages.download.captions import Strategy
from stages.download.config import HubSource
from stages.download.listing import SourceFile, is_image, is_wanted

T = TypeVar("T")
CONNECTIONS = 8
AHEAD = 2 * CONNECTIONS


class HubRepository:
    """A data set repository at one commit.

    Args:
        section: which one.
        field: the configuration's name of it, for messages.
        strategy: whether caption files are wanted.
        commit: the commit, where it was resolved before.
    """

    def __init__(self, section: HubSource, field: str, strategy: Strategy, commit: str | None = None) -> None:
        self.section = section
        self.commit: str | None = commit
        self._field = field
        self._strategy = strategy
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
            info = self._try("look up", lambda: self._api.dataset_info(repo, revision=self.section.revision))
            if info.gated:  # its state may be read by everyone, its files may not
                self._try("read", lambda: self._api.auth_check(repo, repo_type="dataset"))
            self.commit = str(info.sha)
        return self.commit

    def check(self) -> None:
        self.resolve()

    def has_images(self) -> bool:
        return any(is_image(file.path) for file in self.list_files())

    def list_files(self) -> list[SourceFile]:
        commit, folder = self.resolve(), self.section.folder.strip("/")

        def tree() -> list[Any]:
            return list(
                self._api.list_repo_tree(
                    self.section.repo, folder or None, recursive=True, revision=commit, repo_type="dataset"
                )
            )

        files = []
        for entry in self._try("list", tree):
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
        for attempt in (1, 2):
            local = self._download(file, force=attempt == 2)
            if hub.is_whole(local, file.identity):
                return local
            # The client keeps it under the name of the right bytes, and would hand it out again for ever.
            local.resolve().unlink(missing_ok=True)
            local.unlink(missing_ok=True)
        raise TransientError(
            f"{file.path} of {self.where}: the bytes that arrive do not match the digest that the Hub states (twice). "
            f"Run again later, or look at the proxy or mirror in between."
        )

    def _in_cache(self, file: SourceFile) -> Path | None:
        """The copy in the client's cache, which names files by their digests, if it is there and whole."""
        from huggingface_hub import constants  # imported late, like all heavy libraries: `--help` stays fast

        folder = Path(self._cache or constants.HF_HUB_CACHE)
        blob = folder / f"datasets--{self.section.repo.replace('/', '--')}" / "blobs" / file.identity
        try:
            return blob if blob.stat().st_size == file.bytes and hub.is_whole(blob, file.identity) else None
        except OSError:
            return None

    def _download(self, file: SourceFile, force: bool) -> Path:
        from huggingface_hub import hf_hub_download

        folder = self.section.folder.strip("/")
        path = f"{folder}/{file.path}" if folder else file.path
        local = self._try(
            f"download {path} of",
            lambda: hf_hub_download(
                self.section.repo,
                path,
                repo_type="dataset",
                revision=self.commit,
                cache_dir=self._cache,
                endpoint=hub.endpoint(),
                token=hub.read_token(),
                force_download=force,
                tqdm_class=_silent(),
            ),
        )
        return Path(local)

    def _try(self, what: str, call: Callable[[], T]) -> T:
        """Runs a call of the client until it works, or is known not to."""

        def explain(error: Exception) -> LoralineError:
            known = self._explain(error)
            if known is not None:
                return known
            text = f"cannot {what} the Hub data set {self.section.repo}: {hub.first_line(error)}"
            if hub.is_transient(error):
                return TransientError(f"{text} (after {hub.ATTEMPTS} attempts)")
            return InputError(text)

        return hub.ask(call, explain)

    def _explain(self, error: BaseException) -> LoralineError | None:
        """What an answer of the Hub means for the person, where trying again cannot help."""
        field, repo, line = self._field, self.section.repo, hub.first_line(error)
        page = hub.page(f"datasets/{repo}")
        match hub.trouble(error):
            case None:
                return None
            case "offline":
                return ConfigError(
                    f"{field}: HF_HUB_OFFLINE is set, so {repo} cannot be looked up on the Hub; unset it"
                )
            case "gated":
                return ConfigError(
                    f"{field}.repo: {repo} is gated: ask for access at {page} with your account, then set HF_TOKEN to "
                    f"a token of that account."
                )
            case "no repository":
                known = hub.read_token() is not None
                hint = "HF_TOKEN may not read it, if it is private" if known else "a private one needs HF_TOKEN"
                return ConfigError(f"{field}.repo: there is no Hub data set {repo} that may be read ({page}); {hint}.")
            case "no revision":
                return ConfigError(f"{field}.revision: {repo} has no revision {self.section.revision!r}; see {page}")
            case "no file":
                return ConfigError(
                    f"{field}.folder: {repo} has no {self.section.folder!r} at {(self.commit or '')[:10]}"
                )
            case "bad name":
                return ConfigError(f"{field}.repo: {repo!r} is no name of a Hub repository: {line}")
            case "bad token":
                return ConfigError(f"{field}: the Hub does not accept HF_TOKEN ({line}); make a new one")
            case "forbidden":
                return ConfigError(f"{field}: HF_TOKEN may not read {repo} ({line})")


def _silent() -> Any:
    """A progress bar that shows nothing: the stage has its own."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    return Silent
