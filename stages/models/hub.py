"""A model repository on the Hugging Face Hub, pinned to one commit: what it holds, and verified local copies of it.

A body of the right size with wrong bytes is not noticed by the client; that is made good below.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

from stages.core import hub
from stages.core.errors import ConfigError, CorruptBlobError, LoralineError, TransientError
from stages.core.statcache import StatCache

T = TypeVar("T")


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
        self.repo = repo
        self._asked_revision = revision
        self._digests = digests
        self._cache = hub.cache_folder()
        api = hub.client(hub.read_token())
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
        from huggingface_hub import hf_hub_download  # imported late, like all heavy libraries

        root: Path | None = None
        for path in sorted(paths):
            for attempt in (1, 2):
                download = partial(
                    hf_hub_download,
                    self.repo,
                    path,
                    revision=self.commit,
                    cache_dir=self._cache,
                    endpoint=hub.endpoint(),
                    token=hub.read_token(),
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
        return hub.is_whole(local, hub.identity(self._files[path]), self._digests.digest)

    def _try(self, what: str, call: Callable[[], T]) -> T:
        """Runs a call of the client until it works, or is known not to."""

        def explain(error: Exception) -> LoralineError:
            known = self._explain(error)
            if known is not None:
                return known
            text = f"cannot {what} the Hub repository {self.repo}: {hub.first_line(error)}"
            if hub.is_transient(error):
                return TransientError(f"{text} (after {hub.ATTEMPTS} attempts)")
            return ConfigError(text)

        return hub.ask(call, explain)

    def _explain(self, error: BaseException) -> LoralineError | None:
        """What an answer of the Hub means for the person, where trying again cannot help."""
        field, line, page = "model.pretrained_model_name_or_path", hub.first_line(error), hub.page(self.repo)
        match hub.trouble(error):
            case None:
                return None
            case "offline":
                return ConfigError(f"{field}: HF_HUB_OFFLINE is set, so {self.repo} cannot be looked up; unset it")
            case "gated":
                return ConfigError(
                    f"{field}: {self.repo} is gated: accept its licence at {page} with your account, then set "
                    f"HF_TOKEN to a token of that account with read access."
                )
            case "no repository":
                return ConfigError(
                    f"{field}: there is no folder {self.repo} here, and no Hub repository of that name that may be "
                    f"read at {page}. Check the name; for a private one set HF_TOKEN."
                )
            case "no revision":
                return ConfigError(f"model.revision: {self.repo} has no revision {self._asked_revision!r}; see {page}")
            case "no file":
                return ConfigError(f"{field}: {line}")
            case "bad name":
                return ConfigError(f"{field}: {self.repo!r} is neither a folder here nor a Hub repository's name")
            case "bad token":
                return ConfigError(f"{field}: the Hub does not accept HF_TOKEN ({line}); make a new one")
            case "forbidden":
                return ConfigError(f"{field}: HF_TOKEN may not read {self.repo} ({line})")
