"""Endpoints that read: repository info, file lists, history, refs, file contents."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, quote

import yaml

from .accounts import Caller
from .context import Context, kind_of, web_name
from .errors import HubError, entry_not_found
from .objects import Entry, tree_ids
from .repositories import Commit, Repository
from .wire import Request, Response, file_response, json_response


def card_metadata(readme: str) -> dict[str, Any]:
    """The YAML block at the top of a README.md; empty when there is none. Raises ValueError when it is malformed."""
    lines = readme.splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    try:
        end = next(index for index, line in enumerate(lines[1:], 1) if line.strip() == "---")
        metadata = yaml.safe_load("\n".join(lines[1:end]))
    except StopIteration:
        raise ValueError("the metadata block is not closed by ---") from None
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata block is not YAML: {error}") from error
    if not isinstance(metadata, dict | None):
        raise ValueError("the metadata block is not a mapping")
    return metadata or {}


class Reading:
    def __init__(self, context: Context):
        self._context = context

    def whoami(self, request: Request, caller: Caller | None) -> Response:
        if caller is None:
            raise HubError(401, "Invalid username or password.")
        organizations = [{"type": "org", "name": name} for name in caller.organizations]
        token = {"type": "access_token", "accessToken": {"displayName": f"{caller.role} token", "role": caller.role}}
        return json_response({"type": "user", "name": caller.name, "orgs": organizations, "auth": token})

    def auth_check(self, request: Request, caller: Caller | None, kind: str, repo_id: str) -> Response:
        self._context.repository(kind_of(kind), repo_id, caller, "download")
        return json_response({})

    def info(
        self, request: Request, caller: Caller | None, kind: str, repo_id: str, revision: str | None = None
    ) -> Response:
        repository = self._context.repository(kind_of(kind), repo_id, caller)
        commit = repository.resolve(revision or "main")
        siblings = [_sibling(commit.entries[path], request.flag("blobs")) for path in sorted(commit.entries)]
        value: dict[str, Any] = {
            "id": repository.id,
            "author": repository.namespace,
            "sha": commit.oid,
            "createdAt": repository.created,
            "lastModified": commit.date,
            "private": repository.private,
            "gated": repository.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
        readme = commit.entries.get("README.md")
        if readme:
            try:
                card = card_metadata(self._context.objects.read(readme).decode())
            except ValueError:
                card = {}  # a card committed past the validation has no metadata
            tags = card.get("tags")
            value |= {"cardData": card, "tags": tags if isinstance(tags, list) else []}
            value |= {key: card[key] for key in ("pipeline_tag", "library_name") if key in card}
        return json_response(value)

    def tree(
        self, request: Request, caller: Caller | None, kind: str, repo_id: str, revision: str, folder: str | None = None
    ) -> Response:
        """One page of a folder's content; a `Link` header names the next page."""
        repository = self._context.repository(kind_of(kind), repo_id, caller)
        commit = repository.resolve(revision)
        folder = (folder or "").strip("/")
        prefix = f"{folder}/" if folder else ""
        rows = _tree_rows(commit)
        if folder and rows.get(folder, {}).get("type") != "directory":
            raise entry_not_found(folder)
        inside = [path for path in sorted(rows) if path.startswith(prefix)]
        if not request.flag("recursive"):
            inside = [path for path in inside if "/" not in path[len(prefix) :]]
        start = int(request.query.get("cursor", ["0"])[0])
        stop = start + self._context.settings.tree_page_size
        headers = {"X-Repo-Commit": commit.oid}
        if stop < len(inside):
            kept = [f"{name}={quote(values[0])}" for name, values in request.query.items() if name != "cursor"]
            query = "&".join([*kept, f"cursor={stop}"])
            headers["Link"] = f'<{self._context.settings.endpoint}{request.raw_path}?{query}>; rel="next"'
        page = {path: rows[path] for path in inside[start:stop]}
        return json_response(_expanded(page, repository, commit, request.flag("expand")), headers=headers)

    def paths_info(self, request: Request, caller: Caller | None, kind: str, repo_id: str, revision: str) -> Response:
        """What is known of the named files and folders; names that do not exist are left out."""
        repository = self._context.repository(kind_of(kind), repo_id, caller)
        commit = repository.resolve(revision)
        if "json" in request.headers.get("content-type", ""):
            asked = request.json()
            paths, expand = asked["paths"], bool(asked.get("expand"))
        else:
            form = parse_qs(request.body.decode())
            paths, expand = form.get("paths", []), form.get("expand", [""])[0].lower() == "true"
        rows = _tree_rows(commit)
        found = {path: rows[path] for path in (path.strip("/") for path in paths) if path in rows}
        return json_response(_expanded(found, repository, commit, expand))

    def commits(self, request: Request, caller: Caller | None, kind: str, repo_id: str, revision: str) -> Response:
        repository = self._context.repository(kind_of(kind), repo_id, caller)
        rows = [
            {"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
            for c in repository.history(revision)
        ]
        return json_response(rows, headers={"X-Total-Count": str(len(rows))})

    def refs(self, request: Request, caller: Caller | None, kind: str, repo_id: str) -> Response:
        repository = self._context.repository(kind_of(kind), repo_id, caller)
        value: dict[str, list[dict[str, str]]] = {"converts": []}
        for what, ref in (("branches", "refs/heads"), ("tags", "refs/tags")):
            named = repository.refs(what)  # type: ignore[arg-type]
            value[what] = [{"name": n, "ref": f"{ref}/{n}", "targetCommit": oid} for n, oid in sorted(named.items())]
        if request.flag("include_prs"):
            value["pullRequests"] = []
        return json_response(value)

    def resolve(
        self, request: Request, caller: Caller | None, kind: str | None, repo_id: str, revision: str, path: str
    ) -> Response:
        """A file's bytes, or for a large file the way to them on the storage origin."""
        repository = self._context.repository(kind_of(kind), repo_id, caller, "download")
        commit = repository.resolve(revision)
        headers = {"X-Repo-Commit": commit.oid}
        entry = commit.entries.get(path)
        if entry is None:
            missing = entry_not_found(path)
            text = {"X-Error-Code": missing.code or "", "X-Error-Message": missing.message}
            return json_response({"error": missing.message}, missing.status, headers | text)
        headers |= {"ETag": f'"{entry.oid}"', "Content-Disposition": f'inline; filename="{path.rpartition("/")[2]}";'}
        if entry.sha256 is None:
            return file_response(request, self._context.objects.read(entry), headers)
        location = self._context.storage.download_url(web_name(repository), path, entry.sha256)
        linked = {"X-Linked-ETag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size), "Location": location}
        return Response(302, b"", headers | linked)


def _lfs_fields(entry: Entry, digest_key: str) -> dict[str, Any]:
    return {digest_key: entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size()}


def _sibling(entry: Entry, blobs: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"rfilename": entry.path}
    if blobs:
        row |= {"size": entry.size, "blobId": entry.oid}
        if entry.sha256:
            row["lfs"] = _lfs_fields(entry, "sha256")
    return row


def _tree_rows(commit: Commit) -> dict[str, dict[str, Any]]:
    """Files and folders of a commit by path, as the tree endpoint describes them."""
    rows: dict[str, dict[str, Any]] = {
        path: {"type": "directory", "oid": oid, "size": 0, "path": path}
        for path, oid in tree_ids(commit.entries).items()
        if path
    }
    for path, entry in commit.entries.items():
        rows[path] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
        if entry.sha256:
            rows[path]["lfs"] = _lfs_fields(entry, "oid")
    return rows


def _expanded(
    rows: dict[str, dict[str, Any]], repository: Repository, commit: Commit, expand: bool
) -> list[dict[str, Any]]:
    """The rows as a list; with `expand`, each has the last commit that changed it."""
    if not expand:
        return list(rows.values())
    history = list(repository.history(commit.oid))
    trees = [{path: row["oid"] for path, row in _tree_rows(each).items()} for each in history]
    expanded = []
    for path, row in rows.items():
        age = 0
        while age + 1 < len(history) and trees[age + 1].get(path) == row["oid"]:
            age += 1
        last = history[age]
        expanded.append({**row, "lastCommit": {"id": last.oid, "title": last.title, "date": last.date}})
    return expanded
