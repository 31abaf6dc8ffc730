"""A data set repository on the Hugging Face Hub as a source, pinned to one commit.

The client does not retry a server's error on a file or on the repository's state, and does not notice wrong bytes of
the right size; both are made good here. Files come one by one through the client's own cache, so what was downloaded
is never downloaded again; a file that a new commit left as it was is taken from there without a request.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from stages.core.errors import ConfigError, InputError, LoralineError, TransientError
from stages.core.fingerprint import digest_file
from stages.download.captions import Strategy
from stages.download.config import HubSource
from stages.download.listing import SourceFile, git_blob_id, is_image, is_wanted

T = TypeVar("T")
ATTEMPTS = 5
FIRST_PAUSE_S = 0.5
CONNECTIONS = 8
AHEAD = 2 * CONNECTIONS
_BUSY = {408, 429, 500, 502, 503, 504}


class HubRepository:
    """A data set repository at one commit.

    Args:
        section: which one.
        field: the configuration's name of it, for messages.
        strategy: whether caption files are wanted.
        commit: the commit, where it was resolved before.
    """

    def __init__(self, section: HubSource, field: str, strategy: Strategy, commit: str | None = None) -> None:
        from huggingface_hub import HfApi  # imported late, like all heavy libraries: `--help` stays fast

        self.section = section
        self.commit: str | None = commit
        self._field = field
        self._strategy = strategy
        # Read when needed: the client itself looks at these variables only when it is first imported.
        self._endpoint = os.environ.get("HF_ENDPOINT") or None
        self._cache = _cache_folder()
        self._locks: dict[str, threading.Lock] = {}
        self._api = HfApi(endpoint=self._endpoint, token=_token())

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
            blob_id = getattr(entry, "blob_id", None)
            path = entry.path.removeprefix(f"{folder}/") if folder else entry.path
            if blob_id is None or not is_wanted(path, self._strategy):
                continue
            files.append(SourceFile(path, entry.size, entry.lfs.sha256 if entry.lfs else blob_id))
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
            if _is_whole(file, local):
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
        from huggingface_hub import constants

        folder = Path(self._cache or constants.HF_HUB_CACHE)
        blob = folder / f"datasets--{self.section.repo.replace('/', '--')}" / "blobs" / file.identity
        try:
            return blob if blob.stat().st_size == file.bytes and _is_whole(file, blob) else None
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
                endpoint=self._endpoint,
                token=_token(),
                force_download=force,
                tqdm_class=_silent(),
            ),
        )
        return Path(local)

    def _try(self, what: str, call: Callable[[], T]) -> T:
        """Runs a call of the client until it works, or is known not to."""
        retrying = Retrying(
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential_jitter(initial=FIRST_PAUSE_S, max=30, jitter=FIRST_PAUSE_S),
            retry=retry_if_exception(lambda error: self._explain(error) is None and is_transient(error)),
            reraise=True,
        )
        try:
            return retrying(call)
        except LoralineError:
            raise
        except Exception as error:
            known = self._explain(error)
            if known is not None:
                raise known from error
            text = f"cannot {what} the Hub data set {self.section.repo}: {first_line(error)}"
            if is_transient(error):
                raise TransientError(f"{text} (after {ATTEMPTS} attempts)") from error
            raise InputError(text) from error

    def _explain(self, error: BaseException) -> LoralineError | None:
        """What an answer of the Hub means for the person, where trying again cannot help."""
        from huggingface_hub import constants
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        field, repo = self._field, self.section.repo
        page = f"{(self._endpoint or constants.ENDPOINT).rstrip('/')}/datasets/{repo}"
        if isinstance(error, OfflineModeIsEnabled):
            return ConfigError(f"{field}: HF_HUB_OFFLINE is set, so {repo} cannot be looked up on the Hub; unset it")
        if isinstance(error, LocalEntryNotFoundError):  # how the client wraps whatever kept it from the server
            return self._explain(error.__cause__) if error.__cause__ is not None else None
        if isinstance(error, GatedRepoError):  # a subclass of the next, so it is looked at first
            return ConfigError(
                f"{field}.repo: {repo} is gated: ask for access at {page} with your account, then set HF_TOKEN to a "
                f"token of that account."
            )
        if isinstance(error, RepositoryNotFoundError):
            hint = "HF_TOKEN may not read it, if it is private" if _token() else "a private one needs HF_TOKEN"
            return ConfigError(f"{field}.repo: there is no Hub data set {repo} that may be read ({page}); {hint}.")
        if isinstance(error, RevisionNotFoundError):
            return ConfigError(f"{field}.revision: {repo} has no revision {self.section.revision!r}; see {page}")
        if isinstance(error, EntryNotFoundError):
            return ConfigError(f"{field}.folder: {repo} has no {self.section.folder!r} at {(self.commit or '')[:10]}")
        if isinstance(error, HFValidationError):
            return ConfigError(f"{field}.repo: {repo!r} is no name of a Hub repository: {first_line(error)}")
        if _status(error) == 401:
            return ConfigError(f"{field}: the Hub does not accept HF_TOKEN ({first_line(error)}); make a new one")
        if _status(error) == 403:
            return ConfigError(f"{field}: HF_TOKEN may not read {repo} ({first_line(error)})")
        return None


def is_transient(error: BaseException | None) -> bool:
    """Whether another try can help: a busy or broken server, a cut or refused connection, a time limit."""
    while error is not None:
        status = _status(error)
        if status is not None:
            return status in _BUSY
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
            return True
        if isinstance(error, ConnectionError | TimeoutError):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _is_whole(file: SourceFile, local: Path) -> bool:
    """A large file is named by its sha256, a small one by git."""
    if len(file.identity) == 64:
        return digest_file(local) == file.identity
    return git_blob_id(local.read_bytes()) == file.identity


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _token() -> str | None:
    """HF_TOKEN of the environment; None lets the client look for a saved login."""
    return os.environ.get("HF_TOKEN") or None


def _cache_folder() -> str | None:
    """The client's cache, by the variables that it documents; None is its default."""
    if os.environ.get("HF_HUB_CACHE"):
        return os.environ["HF_HUB_CACHE"]
    home = os.environ.get("HF_HOME")
    return str(Path(home).expanduser() / "hub") if home else None


def _silent() -> Any:
    """A progress bar that shows nothing: the stage has its own."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    return Silent
