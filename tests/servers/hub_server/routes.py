"""Which endpoint answers which method and path of the Hub origin."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import unquote

from .context import Context
from .errors import HubError
from .reading import Reading
from .wire import Request, Response
from .writing import Writing

API = r"/api/(models|datasets)/([^/]+/[^/]+)"
WEB = r"/(?:(datasets)/)?([^/]+/[^/]+)"


class Routes:
    """Finds the caller by its token and the endpoint by method and path; both are checked before anything happens."""

    def __init__(self, context: Context):
        read, write = Reading(context), Writing(context)
        self._accounts = context.accounts
        table: list[tuple[str, str, Callable[..., Response]]] = [
            ("GET", r"/api/whoami-v2", read.whoami),
            ("POST", r"/api/repos/create", write.create_repository),
            ("DELETE", r"/api/repos/delete", write.delete_repository),
            ("POST", r"/api/validate-yaml", write.validate_yaml),
            ("GET", API, read.info),
            ("GET", API + r"/revision/([^/]+)", read.info),
            ("GET", API + r"/tree/([^/]+)(?:/(.+))?", read.tree),
            ("POST", API + r"/paths-info/([^/]+)", read.paths_info),
            ("GET", API + r"/commits/([^/]+)", read.commits),
            ("GET", API + r"/refs", read.refs),
            ("GET", API + r"/auth-check", read.auth_check),
            ("PUT", API + r"/settings", write.settings),
            ("POST", API + r"/branch/([^/]+)", write.create_branch),
            ("DELETE", API + r"/branch/([^/]+)", write.delete_branch),
            ("POST", API + r"/tag/([^/]+)", write.create_tag),
            ("DELETE", API + r"/tag/([^/]+)", write.delete_tag),
            ("POST", API + r"/preupload/([^/]+)", write.preupload),
            ("POST", API + r"/commit/([^/]+)", write.commit),
            ("POST", WEB + r"\.git/info/lfs/objects/batch", write.lfs_batch),
            ("POST", WEB + r"\.git/info/lfs/objects/verify", write.lfs_verify),
            ("GET", WEB + r"/resolve/([^/]+)/(.+)", read.resolve),
        ]
        self._table = [(method, re.compile(pattern), endpoint) for method, pattern, endpoint in table]

    def handle(self, request: Request) -> Response:
        caller = self._accounts.caller(request.headers.get("authorization"))
        method = "GET" if request.method == "HEAD" else request.method
        for route_method, pattern, endpoint in self._table:
            match = pattern.fullmatch(request.raw_path)
            if match and route_method == method:
                return endpoint(request, caller, *(unquote(part) if part else None for part in match.groups()))
        raise HubError(404, f"{request.method} {request.path} is not served here")
