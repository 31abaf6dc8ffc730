"""A model repository on the Hugging Face Hub, pinned to one commit: what it holds, and verified local copies of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from stages.core import hub
from stages.core.statcache import StatCache
from stages.models.config import FIELD


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
        self._digests = digests
        self._cache = hub.cache_folder()
        self._remote = hub.Remote(
            thing=f"the Hub repository {repo}",
            repo=repo,
            path=repo,
            field=FIELD,
            revision_field="model.revision",
            revision=revision,
            absent=f"folder {repo} here, and no Hub repository of that name",
        )
        api = hub.client(hub.read_token())
        info = self._remote.ask("look up", lambda: api.model_info(repo, revision=revision, files_metadata=True))
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
            download = partial(
                hf_hub_download,
                self.repo,
                path,
                revision=self.commit,
                cache_dir=self._cache,
                endpoint=hub.endpoint(),
                token=hub.read_token(),
            )
            local = self._remote.whole(path, hub.identity(self._files[path]), download, self._digests.digest)
            root = local.parents[len(Path(path).parts) - 1]
        if root is None:
            raise ValueError("no files to fetch")
        return root
