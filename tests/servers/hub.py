"""A Hugging Face Hub on loopback, for tests: the real client talks to it over real HTTP.

State lives on disk under a root folder: model and data set repositories with commits, branches and tags, and their
large files, which are served from a second origin through signed URLs, as the Hub does. Faults can be scripted.

    with HubServer(tmp_path) as server:
        sha = server.add_dataset("user/pictures", {"a.txt": b"a cat"})
        api = HfApi(endpoint=server.endpoint, token=server.token("write"))

Differences from the Hub: no Xet (`environment()` switches it off in the client), no pull requests, spaces or git over
HTTP; a repository id always has a namespace; objects are held in memory while one request is served.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from .hub_server.accounts import Accounts, Role
from .hub_server.context import Context, Settings
from .hub_server.faults import Fault, Faults, Hold
from .hub_server.objects import Entry, ObjectStore, wants_lfs
from .hub_server.repositories import Commit, Gate, Kind, Repositories, Repository
from .hub_server.routes import Routes
from .hub_server.storage import LargeFileStorage
from .hub_server.wire import LogEntry, Origin

__all__ = ["Commit", "Entry", "Fault", "Hold", "HubServer", "LogEntry"]


class HubServer:
    """The server as a context manager. `root` may be one that an earlier server used: its repositories are there.

    `user` is registered at start and is the one whose token is used where none is named. Files whose name or content
    the Hub keeps as large files are kept so here; `lfs_threshold` and `part_size` are in bytes, the latter being the
    size from which uploads come in parts.

    Leaving the context raises RuntimeError when an endpoint itself failed, so that no test passes by such an accident.
    """

    def __init__(
        self,
        root: Path | str,
        user: str = "user",
        tree_page_size: int = 1000,
        lfs_threshold: int = 10 * 2**20,
        part_size: int = 64 * 2**20,
    ):
        self._root = Path(root)
        self._root.mkdir(parents=True, exist_ok=True)
        self._user = user
        self.requests: list[LogEntry] = []
        self.faults = Faults()
        self._objects = ObjectStore(self._root)
        self._storage = LargeFileStorage(self._objects, self.faults, self.requests, part_size)
        self._accounts = Accounts(self._root / "users.json")
        self._accounts.add(user)
        self._repositories = Repositories(self._root, self._objects)
        self._settings = Settings(lfs_threshold, tree_page_size)
        context = Context(self._settings, self._accounts, self._objects, self._repositories, self._storage, self.faults)
        self._origin = Origin("hub", Routes(context).handle, self.faults, self.requests)
        self._settings.endpoint = self._origin.url

    def __enter__(self) -> HubServer:
        self._origin.start()
        self._storage.origin.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.faults.clear()
        self._origin.stop()
        self._storage.origin.stop()
        crashes = self._origin.crashes + self._storage.origin.crashes
        if crashes and error is None:
            raise RuntimeError("the test Hub failed by itself:\n" + "\n".join(crashes))

    # -- where and who

    @property
    def endpoint(self) -> str:
        return self._origin.url

    @property
    def storage_endpoint(self) -> str:
        """The second origin, where large files are."""
        return self._storage.origin.url

    @property
    def leaks(self) -> list[str]:
        """Requests that carried an access token to the storage origin (each was answered with 400)."""
        return self._storage.leaks

    def add_user(self, name: str, organizations: tuple[str, ...] = ()) -> None:
        """Register a user, who may write under its own name and under those of its organizations."""
        self._accounts.add(name, organizations)

    def token(self, role: Role = "write", user: str | None = None) -> str:
        return self._accounts.token(role, user or self._user)

    def environment(self, role: Role = "write", user: str | None = None) -> dict[str, str]:
        """Variables that make a subprocess use this server, with a cache of its own under the root."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token(role, user),
            "HF_HOME": str(self._root / "client-home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    # -- repositories

    def add_dataset(self, repo_id: str, files: Mapping[str, bytes], private: bool = False, gated: Gate = False) -> str:
        """Create the data set (or add to it) in one commit, without HTTP; returns the commit id."""
        return self._add("dataset", repo_id, files, private, gated)

    def add_model(self, repo_id: str, files: Mapping[str, bytes], private: bool = False, gated: Gate = False) -> str:
        """Create the model repository (or add to it) in one commit, without HTTP; returns the commit id."""
        return self._add("model", repo_id, files, private, gated)

    def _add(self, kind: Kind, repo_id: str, files: Mapping[str, bytes], private: bool, gated: Gate) -> str:
        namespace = repo_id.split("/")[0]
        self._accounts.add(namespace)
        repository, _ = self._repositories.create(kind, repo_id, private, gated, namespace)
        added: dict[str, Entry] = {}
        for path, content in files.items():
            large = wants_lfs(path, content[:512], len(content), self._settings.lfs_threshold)
            add = self._objects.add_large if large else self._objects.add_regular
            added[path] = add(path, content)
        return repository.commit("main", lambda entries: entries | added, "add files", "", namespace).oid

    def grant(self, repo_id: str, user: str, kind: Kind | None = None) -> None:
        """Let a user through the gate of a gated repository."""
        self._repository(repo_id, kind).change_access(grant=(user,))

    def files(self, repo_id: str, revision: str = "main", kind: Kind | None = None) -> dict[str, bytes]:
        """The stored bytes of every file, by path; every repository has a `.gitattributes`, as on the Hub."""
        entries = self.entries(repo_id, revision, kind)
        return {path: self._objects.read(entry) for path, entry in sorted(entries.items())}

    def entries(self, repo_id: str, revision: str = "main", kind: Kind | None = None) -> dict[str, Entry]:
        """Git id, size and (for large files) SHA-256 of every file, by path."""
        return dict(self._repository(repo_id, kind).resolve(revision).entries)

    def commits(self, repo_id: str, revision: str = "main", kind: Kind | None = None) -> list[Commit]:
        """History, newest first; the last one is the Hub's own "initial commit"."""
        return list(self._repository(repo_id, kind).history(revision))

    def _repository(self, repo_id: str, kind: Kind | None) -> Repository:
        """`kind` is needed only where a model and a data set share an id."""
        kinds: tuple[Kind, ...] = (kind,) if kind else ("model", "dataset")
        found = [self._repositories.find(each, repo_id) for each in kinds]
        named = [repository for repository in found if repository is not None]
        if len(named) != 1:
            raise KeyError(f"{repo_id}: {len(named)} such repositories on this server; exactly one was expected")
        return named[0]

    # -- faults: `pattern` is a regular expression searched in the decoded path, on both origins; the first `skip`
    # -- matching requests pass, the next `times` are hit

    def fail(
        self,
        method: str,
        pattern: str,
        status: int = 503,
        times: int = 1,
        skip: int = 0,
        retry_after: int | None = None,
    ) -> Fault:
        """Answer with an error and do nothing; `retry_after` (seconds) is sent as the `Retry-After` header."""
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        return self.faults.add(Fault("status", method, re.compile(pattern), times, skip, status, headers))

    def cut(self, pattern: str, times: int = 1, skip: int = 0, after: int | None = None, method: str = "GET") -> Fault:
        """Break the connection after `after` bytes of the body (default: half of it); answers without a body pass."""
        return self.faults.add(Fault("cut", method, re.compile(pattern), times, skip, after=after))

    def corrupt_download(self, pattern: str, times: int = 1, skip: int = 0) -> Fault:
        """Flip a byte of a body on its way out: right size and headers, wrong content."""
        return self.faults.add(Fault("corrupt", "GET", re.compile(pattern), times, skip))

    def lose_response(self, method: str, pattern: str, times: int = 1, skip: int = 0) -> Fault:
        """Carry the request out, then break the connection instead of answering (for example on "/commit/")."""
        return self.faults.add(Fault("lose", method, re.compile(pattern), times, skip))

    def corrupt_upload(self, pattern: str = r"^/(uploads|parts)/", times: int = 1, skip: int = 0) -> Fault:
        """Store an upload with one byte flipped and report success; with "/commit/" it hits regular files.

        File lists then state the digest of what is stored, and a new upload of the true bytes repairs it.
        """
        return self.faults.add(Fault("damage", "*", re.compile(pattern), times, skip))

    def hold(self, method: str, pattern: str, times: int = 1, skip: int = 0) -> Hold:
        """Keep a request waiting: wait for `.reached`, look around or kill the client, then set `.release`."""
        return self.faults.add(Fault("hold", method, re.compile(pattern), times, skip)).hold

    # -- what happened

    def count(self, method: str = "*", pattern: str = "", status: int | None = None) -> int:
        """How many logged requests match; `server.requests` is the log itself, and may be cleared."""
        return sum(
            method in ("*", entry.method)
            and re.search(pattern, entry.path) is not None
            and status in (None, entry.status)
            for entry in list(self.requests)
        )
