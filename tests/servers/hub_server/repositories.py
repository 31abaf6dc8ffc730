"""Repositories with git-like history: commits, branches, tags, visibility."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from .errors import HubError, repository_not_found, revision_not_found
from .objects import GITATTRIBUTES, Entry, ObjectStore, git_id, tree_ids

Kind = Literal["model", "dataset"]
Gate = Literal["auto", "manual", False]
Changes = Callable[[dict[str, Entry]], dict[str, Entry]]


@dataclass(frozen=True)
class Commit:
    """One commit: `entries` is the whole file list by path, `date` is ISO 8601 in UTC."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    entries: dict[str, Entry]


class Repository:
    """One model or data set repository in a folder: `repository.json` and one JSON file per commit."""

    def __init__(self, folder: Path, kind: Kind, repo_id: str):
        self.kind = kind
        self.id = repo_id
        self._folder = folder
        self._lock = threading.RLock()
        self._cache: dict[str, Commit] = {}
        state_path = folder / "repository.json"
        self._state: dict[str, Any] = json.loads(state_path.read_text()) if state_path.exists() else {}

    def initialise(self, private: bool, gated: Gate, author: str, objects: ObjectStore) -> None:
        """Give a new repository its first commit, as the Hub does: a `.gitattributes` on branch main."""
        (self._folder / "commits").mkdir(parents=True)
        self._state = {"private": private, "gated": gated, "granted": [], "created": _now(), "branches": {}, "tags": {}}
        attributes = objects.add_regular(".gitattributes", GITATTRIBUTES)
        first = self._store_commit(None, "initial commit", "", author, {attributes.path: attributes})
        self._state["branches"]["main"] = first.oid
        self._save()

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def private(self) -> bool:
        return bool(self._state["private"])

    @property
    def gated(self) -> Gate:
        gate: Gate = self._state["gated"]
        return gate

    @property
    def created(self) -> str:
        return str(self._state["created"])

    @property
    def granted(self) -> tuple[str, ...]:
        """Users let through the gate."""
        return tuple(self._state["granted"])

    def change_access(
        self, private: bool | None = None, gated: Gate | None = None, grant: tuple[str, ...] = ()
    ) -> None:
        with self._lock:
            if private is not None:
                self._state["private"] = private
            if gated is not None:
                self._state["gated"] = gated
            self._state["granted"] += [user for user in grant if user not in self._state["granted"]]
            self._save()

    def refs(self, what: Literal["branches", "tags"]) -> dict[str, str]:
        with self._lock:
            return dict(self._state[what])

    def create_ref(self, what: Literal["branches", "tags"], name: str, revision: str) -> None:
        with self._lock:
            if name in self._state[what]:
                raise HubError(409, f"{name!r} already exists in the {what} of {self.id}")
            self._state[what][name] = self.resolve(revision).oid
            self._save()

    def delete_ref(self, what: Literal["branches", "tags"], name: str) -> None:
        with self._lock:
            if name not in self._state[what]:
                raise revision_not_found(name)
            if what == "branches" and name == "main":
                raise HubError(403, "the branch main cannot be deleted")
            del self._state[what][name]
            self._save()

    def resolve(self, revision: str) -> Commit:
        """The commit behind a branch, a tag or a full commit id."""
        with self._lock:
            oid = self._state["branches"].get(revision) or self._state["tags"].get(revision) or revision
            if oid not in self._cache:
                path = self._folder / "commits" / f"{oid}.json"
                if len(oid) != 40 or not oid.isalnum() or not path.exists():
                    raise revision_not_found(revision)
                stored = json.loads(path.read_text())
                entries = {path: Entry(**fields) for path, fields in stored.pop("entries").items()}
                self._cache[oid] = Commit(**stored, entries=entries)
            return self._cache[oid]

    def history(self, revision: str) -> Iterator[Commit]:
        """Commits from `revision` back to the first one."""
        oid: str | None = revision
        while oid is not None:
            commit = self.resolve(oid)
            yield commit
            oid = commit.parent

    def commit(
        self, branch: str, changes: Changes, title: str, message: str, author: str, parent: str | None = None
    ) -> Commit:
        """Apply `changes` to the head of `branch`. Nothing changed: the head itself, no empty commit.

        Raises 412 when `parent` is given and is not the head: somebody else committed first.
        """
        with self._lock:
            if branch not in self._state["branches"]:
                raise revision_not_found(branch)
            head = self.resolve(branch)
            if parent is not None and parent != head.oid:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            entries = changes(dict(head.entries))
            if entries == head.entries:
                return head
            new = self._store_commit(head.oid, title, message, author, entries)
            self._state["branches"][branch] = new.oid
            self._save()
            return new

    def _store_commit(
        self, parent: str | None, title: str, message: str, author: str, entries: dict[str, Entry]
    ) -> Commit:
        date = _now()
        stamp = int(datetime.fromisoformat(date).timestamp())
        lines = [f"tree {tree_ids(entries)['']}", *([f"parent {parent}"] if parent else [])]
        lines += [f"{who} {author} <{author}@localhost> {stamp} +0000" for who in ("author", "committer")]
        oid = git_id("commit", ("\n".join([*lines, "", title, *(["", message] if message else []), ""])).encode())
        commit = Commit(oid, parent, title, message, author, date, entries)
        (self._folder / "commits" / f"{oid}.json").write_text(json.dumps(asdict(commit)))
        self._cache[oid] = commit
        return commit

    def _save(self) -> None:
        path = self._folder / "repository.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self._state, indent=1))
        part.replace(path)


class Repositories:
    """All repositories under one folder, found by kind and id (`namespace/name`)."""

    def __init__(self, root: Path, objects: ObjectStore):
        self._root = root / "repositories"
        self._objects = objects
        self._lock = threading.Lock()
        self._open: dict[tuple[str, str], Repository] = {}
        for kind in ("model", "dataset"):
            for state in sorted((self._root / kind).glob("*/*/repository.json")):
                repo_id = f"{state.parent.parent.name}/{state.parent.name}"
                self._open[kind, repo_id] = Repository(state.parent, kind, repo_id)

    def create(self, kind: Kind, repo_id: str, private: bool, gated: Gate, author: str) -> tuple[Repository, bool]:
        """The repository, and whether this call made it."""
        with self._lock:
            if (kind, repo_id) in self._open:
                return self._open[kind, repo_id], False
            folder = self._root / kind / repo_id
            # a deleted repository leaves its folder behind under another name, so this one is always new
            repository = Repository(folder, kind, repo_id)
            repository.initialise(private, gated, author, self._objects)
            self._open[kind, repo_id] = repository
            return repository, True

    def get(self, kind: str, repo_id: str, anonymous: bool = False) -> Repository:
        with self._lock:
            if (kind, repo_id) not in self._open:
                raise repository_not_found(anonymous)
            return self._open[kind, repo_id]

    def find(self, kind: Kind, repo_id: str) -> Repository | None:
        with self._lock:
            return self._open.get((kind, repo_id))

    def delete(self, kind: Kind, repo_id: str) -> None:
        with self._lock:
            if self._open.pop((kind, repo_id), None) is None:
                raise repository_not_found(anonymous=False)
            folder = self._root / kind / repo_id
            trash = self._root / "deleted"
            trash.mkdir(parents=True, exist_ok=True)
            folder.replace(trash / f"{len(list(trash.iterdir()))}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
