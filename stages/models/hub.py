"""A model repository on the Hugging Face Hub, pinned to one commit: what it holds, and verified local copies of it.

The client alone is not enough here: it does not retry a server error on a file or on the repository's state, and a
body of the right size with wrong bytes is not noticed. Both are made good below.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from stages.core.errors import ConfigError, CorruptBlobError, LoralineError, TransientError
from stages.core.statcache import StatCache

T = TypeVar("T")
ATTEMPTS = 5
FIRST_PAUSE_S = 0.5
_BUSY = {408, 429, 500, 502, 503, 504}


class HubFiles:
    """The files of a model repository at one commit. The revision is resolved once, when this is made.

    Args:
        repo: 'owner/name'.
        revision: branch, tag or commit; the default branch where not given.
        digests: remembered digests of local files, so that a verified file is not read again.

    Raises:
        ConfigError: no such repository or revision, or no right to read it.
        TransientError: the Hub did not answer.
    """

    def __init__(self, repo: str, revision: str | None, digests: StatCache) -> None:
        from huggingface_hub import HfApi  # imported late, like all heavy libraries: `--help` stays fast

        self.repo = repo
        self._asked_revision = revision
        self._digests = digests
        # Read when it is needed: the client itself only looks at these variables when it is first imported.
        self._endpoint = os.environ.get("HF_ENDPOINT") or None
        self._cache = _cache_folder()
        api = HfApi(endpoint=self._endpoint, token=_token())
        info = self._try("look up", lambda: api.model_info(repo, revision=revision, files_metadata=True))
        self.commit = str(info.sha)
        self._files = {file.rfilename: file for file in info.siblings or []}

    @property
    def where(self) -> str:
        """For messages: the repository and its commit."""
        return f"the Hub repository {self.repo} at {self.commit[:10]}"

    def names(self) -> list[str]:
        """Paths of all files, sorted."""
        return sorted(self._files)

    def sha256(self, path: str) -> str:
        """Hex sha256 of a file: as the Hub states it for a large file (nothing is downloaded), else of its bytes."""
        lfs = self._files[path].lfs
        return str(lfs.sha256) if lfs is not None else hashlib.sha256(self.read(path)).hexdigest()

    def read(self, path: str) -> bytes:
        """The bytes of a small file, verified."""
        return (self.fetch([path]) / path).read_bytes()

    def fetch(self, paths: Iterable[str]) -> Path:
        """Brings files into the Hub client's own cache, and makes sure of every byte.

        Returns:
            The local folder that they lie in, with the paths that they have in the repository.
        Raises:
            ConfigError: no right to read them.
            TransientError: the Hub did not answer, or sent wrong bytes twice.
        """
        from huggingface_hub import hf_hub_download

        root: Path | None = None
        for path in sorted(paths):
            for attempt in (1, 2):
                download = partial(
                    hf_hub_download,
                    self.repo,
                    path,
                    revision=self.commit,
                    cache_dir=self._cache,
                    endpoint=self._endpoint,
                    token=_token(),
                )
                local = Path(self._try(f"download {path} of", download))
                if self._is_whole(path, local):
                    break
                # The cache holds it under the name of the right bytes: it would be served again for ever.
                local.resolve().unlink(missing_ok=True)
                local.unlink(missing_ok=True)
                if attempt == 2:
                    raise CorruptBlobError(
                        f"{path} of {self.where}: the downloaded bytes do not match the digest that the Hub states "
                        f"(twice). Try again later, or look at the proxy or mirror in between."
                    )
            root = local.parents[len(Path(path).parts) - 1]
        if root is None:
            raise ValueError("no files to fetch")
        return root

    def _is_whole(self, path: str, local: Path) -> bool:
        stated = self._files[path]
        if stated.lfs is not None:
            return self._digests.digest(local) == stated.lfs.sha256
        data = local.read_bytes()
        # Small files are named by git: sha1 over a short header and the bytes.
        blob_id = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        return blob_id == stated.blob_id

    def _try(self, what: str, call: Callable[[], T]) -> T:
        """Runs a call of the client until it works, or is known not to."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except Exception as error:
                known = self._explain(error)
                if known is not None:
                    raise known from error
                if not _is_transient(error):
                    raise ConfigError(f"cannot {what} the Hub repository {self.repo}: {_first_line(error)}") from error
                if attempt == ATTEMPTS:
                    raise TransientError(
                        f"cannot {what} the Hub repository {self.repo}: {_first_line(error)} "
                        f"(after {ATTEMPTS} attempts)"
                    ) from error
                time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _explain(self, error: BaseException) -> LoralineError | None:
        """What an answer of the Hub means for the person, where trying again cannot help."""
        from huggingface_hub import constants
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        field = "model.pretrained_model_name_or_path"
        page = f"{(self._endpoint or constants.ENDPOINT).rstrip('/')}/{self.repo}"
        if isinstance(error, LocalEntryNotFoundError):
            return self._explain(error.__cause__) if error.__cause__ is not None else None
        if isinstance(error, GatedRepoError):  # a subclass of the next, so it is looked at first
            return ConfigError(
                f"{field}: {self.repo} is gated: accept its licence at {page} with your account, then set "
                f"HF_TOKEN to a token of that account with read access."
            )
        if isinstance(error, RepositoryNotFoundError):
            return ConfigError(
                f"{field}: there is no folder {self.repo} here, and no Hub repository of that name that may be read at "
                f"{page}. Check the name; for a private one set HF_TOKEN."
            )
        if isinstance(error, RevisionNotFoundError):
            return ConfigError(f"model.revision: {self.repo} has no revision {self._asked_revision!r}; see {page}")
        if isinstance(error, EntryNotFoundError):
            return ConfigError(f"{field}: {_first_line(error)}")
        if isinstance(error, HFValidationError):
            return ConfigError(f"{field}: {self.repo!r} is neither a folder here nor a Hub repository's name")
        if _status(error) == 401:
            return ConfigError(f"{field}: the Hub does not accept HF_TOKEN ({_first_line(error)}); make a new one")
        if _status(error) == 403:
            return ConfigError(f"{field}: HF_TOKEN may not read {self.repo} ({_first_line(error)})")
        return None


def _token() -> str | bool | None:
    """HF_TOKEN of the environment; None lets the client look for a saved login."""
    return os.environ.get("HF_TOKEN") or None


def _cache_folder() -> str | None:
    """The Hub client's cache, by the variables that it documents; None is its default."""
    if os.environ.get("HF_HUB_CACHE"):
        return os.environ["HF_HUB_CACHE"]
    home = os.environ.get("HF_HOME")
    return str(Path(home).expanduser() / "hub") if home else None


def _status(error: BaseException) -> int | None:
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return int(status) if isinstance(status, int) else None


def _is_transient(error: BaseException) -> bool:
    """Whether another try can help: a busy or broken server, a cut or refused connection, a full time limit."""
    seen: BaseException | None = error
    while seen is not None:
        status = _status(seen)
        if status is not None:
            return status in _BUSY
        if type(seen).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "urllib3", "requests"):
            return True
        if isinstance(seen, ConnectionError | TimeoutError):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
