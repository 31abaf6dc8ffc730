"""What every endpoint works with, and how a request's repository and rights are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .accounts import Accounts, Caller, require_writer
from .errors import gated, repository_not_found
from .faults import Faults
from .objects import ObjectStore
from .repositories import Kind, Repositories, Repository
from .storage import LargeFileStorage


@dataclass
class Settings:
    """Limits of the server, in bytes and entries."""

    lfs_threshold: int
    tree_page_size: int
    endpoint: str = ""


@dataclass
class Context:
    settings: Settings
    accounts: Accounts
    objects: ObjectStore
    repositories: Repositories
    storage: LargeFileStorage
    faults: Faults

    def repository(
        self, kind: Kind, repo_id: str, caller: Caller | None, need: Literal["see", "download", "write"] = "see"
    ) -> Repository:
        """The repository, if `caller` may do what it needs.

        A private one is invisible to others. A gated one shows its file list to everybody and its files to its
        owners and to the users let in.
        """
        repository = self.repositories.get(kind, repo_id, anonymous=caller is None)
        owner = caller is not None and caller.owns(repository.namespace)
        if repository.private and not owner:
            raise repository_not_found(anonymous=caller is None)
        if need == "write":
            require_writer(caller, repository.namespace)
        granted = caller is not None and caller.name in repository.granted
        if need == "download" and repository.gated and not (owner or granted):
            raise gated(repo_id, anonymous=caller is None)
        return repository


def web_name(repository: Repository) -> str:
    """How a repository is called in web addresses: data sets have a prefix, models have none."""
    return f"datasets/{repository.id}" if repository.kind == "dataset" else repository.id


def kind_of(prefix: str | None) -> Kind:
    """From a URL segment or a type: "datasets" or "dataset"; "models", "model" or nothing."""
    return "dataset" if prefix in ("datasets", "dataset") else "model"
