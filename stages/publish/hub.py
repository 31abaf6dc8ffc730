"""Publishing to a Hub model repository: one commit, never twice, and looked at afterwards.

The loop is: read the branch's head, compare every file with the package, commit what differs on top of that very head,
look again. It ends when nothing differs. So an answer that was lost, a commit of somebody else in between and bytes
that arrived damaged are all the same case: the next look tells.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stages.core import hub
from stages.core.artifact import Manifest
from stages.core.errors import ConfigError, InputError, LoralineError, TransientError
from stages.publish.config import PublishSection
from stages.publish.package import ADAPTER, RECORD, Item, Package, left_over

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
ROUNDS = 6


@dataclass(frozen=True)
class _Head:
    """A branch's newest commit and its files, as the Hub lists them."""

    commit: str
    files: dict[str, Any]

    def has(self, item: Item) -> bool:
        """Whether the Hub holds exactly these bytes: large files are named by their sha256, small ones by git."""
        file = self.files.get(item.path)
        if file is None or file.size != item.bytes:
            return False
        return hub.is_whole(item.local, hub.identity(file), lambda _: item.sha256)


class HubTarget:
    """A model repository to publish to.

    Args:
        section: which one, and how it is made if it is not there.
    """

    def __init__(self, section: PublishSection) -> None:
        if section.repo is None:
            raise TypeError("the target 'hub' has a repo: the configuration sees to it")
        self.repo = section.repo
        self._section = section

    # -- before -------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Makes sure that the name is valid and that HF_TOKEN may write there.

        Raises:
            ConfigError: it is not, or it may not.
            TransientError: the Hub did not answer.
        """
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise ConfigError(f"publish.repo: {hub.first_line(error)}") from None
        self._token()
        user = self._try("ask who HF_TOKEN belongs to on", lambda: self._api().whoami())
        role = user.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise ConfigError(
                f"publish.repo: HF_TOKEN of {user['name']} may only read; make one with write access in the account's "
                f"settings"
            )
        owner = self.repo.split("/")[0]
        organisations = {entry["name"]: entry.get("roleInOrg") for entry in user.get("orgs", [])}
        if owner != user["name"] and owner not in organisations:
            mine = ", ".join([user["name"], *organisations])
            raise ConfigError(f"publish.repo: HF_TOKEN may write to {mine}, not to {owner}")
        if organisations.get(owner) == "read":
            raise ConfigError(f"publish.repo: {user['name']} may only read in the organisation {owner}")

    # -- publishing ---------------------------------------------------------------------------------------------------

    def publish(self, package: Package, log: Callable[[str], None]) -> dict[str, Any]:
        """Brings the branch to hold the package.

        Returns:
            What was done, for the manifest: commit, whether this made it, address.
        Raises:
            ConfigError: no right to write there.
            TransientError: the Hub did not answer, somebody else kept committing, or bytes kept arriving damaged.
        """
        self._create()
        committed, trouble = 0, ""
        for attempt in range(ROUNDS + 1):
            head = self._head()
            operations = self._operations(package, head)
            if not operations:
                return {
                    "repo": self.repo,
                    "branch": self._section.branch,
                    "commit": head.commit,
                    "url": f"{hub.page(self.repo)}/tree/{self._section.branch}",
                    "commits_made": committed,
                }
            if committed:
                damaged = [item.path for item in package.items if not head.has(item)]
                trouble = f"what the Hub holds of {', '.join(damaged[:3])} is not what was sent"
            if attempt == ROUNDS:
                break
            if attempt:
                log(f"{trouble}; trying again")
                time.sleep(min(30.0, hub.FIRST_PAUSE_S * 2 ** (attempt - 1)))
            try:
                self._commit(operations, head)
                committed += 1
            except TransientError as error:
                trouble = str(error)  # it may have worked all the same: the next look tells
        raise TransientError(f"cannot publish to {self.repo}: {trouble} (tried {ROUNDS} times). Run again later.")

    def gone(self, manifest: Manifest) -> str | None:
        """Why the published adapter is no longer the one of the manifest, or None.

        Raises:
            TransientError: the Hub did not answer: not knowing is not the same as there.
        """
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        expected = manifest.info["files"][ADAPTER]
        found: list[Any]
        try:
            found = hub.retried(lambda: self._api().get_paths_info(self.repo, [ADAPTER], revision=self._section.branch))
        except GatedRepoError:
            return None  # it is there; who may read it is another question
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return f"{self.repo} ({self._section.branch}) is no longer on the Hub, or HF_TOKEN may not read it"
        except Exception as error:
            raise self._told("look at", error) from error
        if not found:
            return f"{self.repo} no longer holds {ADAPTER}"
        lfs = getattr(found[0], "lfs", None)
        if found[0].size != expected["bytes"] or (lfs is not None and lfs.sha256 != expected["sha256"]):
            return f"{ADAPTER} in {self.repo} was changed"
        return None

    # -- its steps ----------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        self._try("create", lambda: self._api().create_repo(self.repo, private=self._section.private, exist_ok=True))

    def _head(self) -> _Head:
        from huggingface_hub.errors import RevisionNotFoundError

        api, branch = self._api(), self._section.branch

        def look() -> _Head:
            try:
                commit = str(api.model_info(self.repo, revision=branch).sha)
            except RevisionNotFoundError:
                api.create_branch(self.repo, branch=branch, exist_ok=True)
                commit = str(api.model_info(self.repo, revision=branch).sha)
            tree = api.list_repo_tree(self.repo, recursive=True, revision=commit)
            return _Head(commit, {entry.path: entry for entry in tree if hasattr(entry, "blob_id")})

        return self._try("read the state of", look)

    def _operations(self, package: Package, head: _Head) -> list[Any]:
        """What turns the head into the package: nothing, where it holds it already."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        missing = [item for item in package.items if not head.has(item)]
        operations: list[Any] = [CommitOperationAdd(item.path, str(item.local)) for item in missing]
        if RECORD in head.files and any(item.path == RECORD for item in missing):
            old = [path for path in left_over(self._record(head), package) if path in head.files]
            operations += [CommitOperationDelete(path) for path in old]
        return operations

    def _record(self, head: _Head) -> Any:
        """The record of the adapter that is there now; None where it cannot be understood."""
        from huggingface_hub import hf_hub_download

        with tempfile.TemporaryDirectory(prefix="loraline-record-") as folder, _quiet():
            local = self._try(
                "read the record of",
                lambda: hf_hub_download(
                    self.repo,
                    RECORD,
                    revision=head.commit,
                    endpoint=hub.endpoint(),
                    token=self._token(),
                    local_dir=folder,
                ),
            )
            try:
                return json.loads(Path(local).read_bytes())
            except ValueError:
                return None

    def _commit(self, operations: list[Any], head: _Head) -> None:
        """Raises:
        TransientError: it is not known to have worked: look at the head.
        """
        from huggingface_hub.errors import HfHubHTTPError

        try:
            with _quiet():
                self._api().create_commit(
                    self.repo,
                    operations,
                    commit_message="Publish the adapter with loraline",
                    revision=self._section.branch,
                    parent_commit=head.commit,
                )
        except HfHubHTTPError as error:
            if hub.status(error) in (409, 412):
                raise TransientError(f"somebody else committed to {self.repo} meanwhile") from error
            raise self._told("commit to", error) from error
        except Exception as error:
            raise self._told("commit to", error) from error

    # -- talking to the Hub -------------------------------------------------------------------------------------------

    def _api(self) -> HfApi:
        return hub.client(self._token())

    def _token(self) -> str:
        """Raises:
        ConfigError: there is none, or it cannot be one. Its text is never shown.
        """
        from huggingface_hub import get_token

        token = os.environ.get("HF_TOKEN", "").strip() or get_token()
        if not token:
            raise ConfigError("publish.repo: publishing to the Hub needs a token with write access: set HF_TOKEN")
        if not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError("publish.repo: HF_TOKEN holds characters that no token has; copy it again")
        return token

    def _try(self, what: str, call: Callable[[], T]) -> T:
        """Runs a call of the client until it works, or is known not to."""
        return hub.ask(call, lambda error: self._told(what, error))

    def _told(self, what: str, error: Exception) -> LoralineError:
        """The same error in words, of the kind that says whether another try can help."""
        line = hub.first_line(error)
        match hub.trouble(error):
            case "offline":
                return ConfigError(
                    "publish.repo: HF_HUB_OFFLINE is set, so nothing can be published on the Hub; unset it"
                )
            case "forbidden" | "gated":
                return ConfigError(f"publish.repo: HF_TOKEN may not write to {self.repo} ({line})")
            case "no repository":
                return ConfigError(f"publish.repo: there is no {self.repo}, or HF_TOKEN may not see it")
            case "bad token":
                return ConfigError(f"publish.repo: the Hub does not accept HF_TOKEN ({line}); make a new one")
        text = f"publish.repo: cannot {what} {hub.page(self.repo)}: {line}"
        return TransientError(text) if hub.is_transient(error) else InputError(text)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the client's own progress bars: they would write across the stage's."""
    from huggingface_hub import utils as hub_utils

    utils: Any = hub_utils  # it does not say what it exports
    shown = not utils.are_progress_bars_disabled()
    if shown:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()
