"""Endpoints that write: repositories, refs, settings, uploads, commits."""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Any

from .accounts import Caller, require_login, require_writer
from .context import Context, kind_of, web_name
from .errors import HubError, entry_not_found
from .faults import flip_byte
from .objects import Entry, wants_lfs
from .reading import card_metadata
from .repositories import Kind
from .wire import Request, Response, json_response


class Writing:
    def __init__(self, context: Context):
        self._context = context

    def create_repository(self, request: Request, caller: Caller | None) -> Response:
        asked = request.json()
        kind, repo_id, writer = self._named(asked, caller)
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}", asked["name"]) or asked["name"].endswith((".git", "-", ".")):
            raise HubError(400, f"{asked['name']!r} is not a valid repository name")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repository, created = self._context.repositories.create(kind, repo_id, private, False, writer.name)
        url = f"{self._context.settings.endpoint}/{web_name(repository)}"
        if not created:
            raise HubError(409, f"You already created this {kind} repo", details={"url": url})
        return json_response({"url": url, "name": repo_id, "id": repo_id})

    def delete_repository(self, request: Request, caller: Caller | None) -> Response:
        kind, repo_id, _ = self._named(request.json(), caller)
        self._context.repositories.delete(kind, repo_id)
        return Response()

    def _named(self, asked: dict[str, Any], caller: Caller | None) -> tuple[Kind, str, Caller]:
        namespace = asked.get("organization") or require_login(caller).name
        writer = require_writer(caller, namespace)
        if asked.get("type") not in (None, "model", "dataset"):
            raise HubError(400, f"repositories of type {asked['type']!r} are not served here")
        return kind_of(asked.get("type")), f"{namespace}/{asked['name']}", writer

    def settings(self, request: Request, caller: Caller | None, kind: str, repo_id: str) -> Response:
        repository = self._context.repository(kind_of(kind), repo_id, caller, "write")
        asked = request.json()
        private = {"private": True, "public": False}.get(asked.get("visibility"), asked.get("private"))
        repository.change_access(private=private, gated=asked.get("gated"))
        return json_response({"private": repository.private, "gated": repository.gated})

    def create_branch(self, request: Request, caller: Caller | None, kind: str, repo_id: str, branch: str) -> Response:
        repository = self._context.repository(kind_of(kind), repo_id, caller, "write")
        repository.create_ref("branches", branch, (request.json() or {}).get("startingPoint") or "main")
        return Response()

    def delete_branch(self, request: Request, caller: Caller | None, kind: str, repo_id: str, branch: str) -> Response:
        self._context.repository(kind_of(kind), repo_id, caller, "write").delete_ref("branches", branch)
        return Response()

    def create_tag(self, request: Request, caller: Caller | None, kind: str, repo_id: str, revision: str) -> Response:
        repository = self._context.repository(kind_of(kind), repo_id, caller, "write")
        repository.create_ref("tags", request.json()["tag"], revision)
        return Response()

    def delete_tag(self, request: Request, caller: Caller | None, kind: str, repo_id: str, tag: str) -> Response:
        self._context.repository(kind_of(kind), repo_id, caller, "write").delete_ref("tags", tag)
        return Response()

    def validate_yaml(self, request: Request, caller: Caller | None) -> Response:
        try:
            metadata = card_metadata(request.json()["content"])
        except ValueError as error:
            return json_response({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return json_response({"errors": [], "warnings": warnings})

    def preupload(self, request: Request, caller: Caller | None, kind: str, repo_id: str, revision: str) -> Response:
        """For each file: how to upload it, and the id of what is there already (so that a client can skip it)."""
        repository = self._context.repository(kind_of(kind), repo_id, caller, "write")
        entries = repository.resolve(revision).entries
        rows = []
        for file in request.json()["files"]:
            path, size = file["path"], file["size"]
            sample = base64.b64decode(file.get("sample", ""))
            large = wants_lfs(path, sample, size, self._context.settings.lfs_threshold)
            row = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if path in entries:
                row["oid"] = entries[path].sha256 or entries[path].oid
            rows.append(row)
        return json_response({"files": rows, "commitOid": repository.resolve(revision).oid})

    def lfs_batch(self, request: Request, caller: Caller | None, kind: str | None, repo_id: str) -> Response:
        """Git LFS batch: where to send each large file that is not here yet."""
        asked = request.json()
        if asked.get("operation") != "upload":
            raise HubError(400, f"LFS operation {asked.get('operation')!r} is not served here")
        repository = self._context.repository(kind_of(kind), repo_id, caller, "write")
        verify = f"{self._context.settings.endpoint}/{web_name(repository)}.git/info/lfs/objects/verify"
        rows: list[dict[str, Any]] = []
        for item in asked["objects"]:
            row: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if not self._context.objects.has_large(item["oid"]):
                upload = self._context.storage.upload_action(web_name(repository), item["oid"], item["size"])
                row["actions"] = {"upload": upload, "verify": {"href": verify, "header": {}}}
            rows.append(row)
        return json_response({"transfer": "basic", "objects": rows})

    def lfs_verify(self, request: Request, caller: Caller | None, kind: str | None, repo_id: str) -> Response:
        """Checks presence and size; a client that wants to be sure of the content compares digests itself."""
        self._context.repository(kind_of(kind), repo_id, caller, "write")
        asked = request.json()
        entry = self._context.objects.large_entry("", asked["oid"])
        if entry.size != asked["size"]:
            raise HubError(400, f"{asked['oid']} has {entry.size} bytes, announced were {asked['size']}")
        return json_response({"message": "ok"})

    def commit(self, request: Request, caller: Caller | None, kind: str, repo_id: str, branch: str) -> Response:
        """All operations of an ndjson body, or none of them. Unchanged content: the head's id, and no new commit."""
        repository = self._context.repository(kind_of(kind), repo_id, caller, "write")
        if request.flag("create_pr"):
            raise HubError(400, "pull requests are not served here")
        try:
            operations = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        except ValueError as error:
            raise HubError(400, f"the commit is not ndjson: {error}") from error
        headers = [operation["value"] for operation in operations if operation["key"] == "header"]
        if len(headers) != 1 or not headers[0].get("summary"):
            raise HubError(400, "a commit needs exactly one header with a summary")
        damage = self._context.faults.take("damage", request.method, request.path) is not None

        def changes(entries: dict[str, Entry]) -> dict[str, Entry]:
            for operation in operations:
                if operation["key"] != "header":
                    self._apply(entries, operation["key"], operation["value"], damage)
            for path in entries:
                parts = path.split("/")
                if any("/".join(parts[:depth]) in entries for depth in range(1, len(parts))):
                    raise HubError(400, f"{path!r} lies under a file of the same commit")
            return entries

        header = headers[0]
        author = require_login(caller).name
        description, parent = header.get("description", ""), header.get("parentCommit")
        commit = repository.commit(branch, changes, header["summary"], description, author, parent)
        url = f"{self._context.settings.endpoint}/{web_name(repository)}/commit/{commit.oid}"
        return json_response({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def _apply(self, entries: dict[str, Entry], key: str, value: dict[str, Any], damage: bool) -> None:
        path = str(value["path"])
        parts = path.rstrip("/").split("/")
        if any(part in ("", ".", "..", ".git") for part in parts):
            raise HubError(400, f"{path!r} is not a valid path in a repository")
        if key == "file":
            try:
                content = base64.b64decode(value["content"], validate=True)
            except binascii.Error as error:
                raise HubError(400, f"the content of {path!r} is not base64: {error}") from error
            entries[path] = self._context.objects.add_regular(path, flip_byte(content) if damage else content)
        elif key == "lfsFile":
            entry = self._context.objects.large_entry(path, value["oid"])
            if value.get("size", entry.size) != entry.size:
                raise HubError(400, f"{path!r} has {entry.size} bytes, announced were {value['size']}")
            entries[path] = entry
        elif key == "deletedFile":
            if entries.pop(path, None) is None:
                raise entry_not_found(f"{path}. A file with this name doesn't exist")
        elif key == "deletedFolder":
            inside = [name for name in entries if name.startswith(path.rstrip("/") + "/")]
            if not inside:
                raise entry_not_found(f"{path}. A folder with this name doesn't exist")
            for name in inside:
                del entries[name]
        else:
            raise HubError(400, f"unknown commit operation {key!r}")
