"""Users, their access tokens, and who may read or write what."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import HubError

Role = Literal["read", "write"]


@dataclass(frozen=True)
class Caller:
    """The user behind a request, with the role of the token it came with."""

    name: str
    role: Role
    organizations: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.organizations


class Accounts:
    """Registered users, kept in `users.json`. A token is a pure function of user and role, so it survives restarts."""

    def __init__(self, path: Path):
        self._path = path
        self._lock = threading.Lock()
        self._organizations: dict[str, list[str]] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, user: str, organizations: tuple[str, ...] = ()) -> None:
        """Register a user; for a known one, add the organizations."""
        with self._lock:
            known = self._organizations.setdefault(user, [])
            known.extend(name for name in organizations if name not in known)
            self._path.write_text(json.dumps(self._organizations, indent=1))

    def token(self, role: Role, user: str) -> str:
        if user not in self._organizations:
            raise KeyError(f"no user {user!r} on this Hub; register it with add_user({user!r})")
        if role not in ("read", "write"):
            raise ValueError(f"role: {role!r} is not one of 'read', 'write'")
        return f"hf_test_{role}_{user}"

    def caller(self, authorization: str | None) -> Caller | None:
        """Who sent this `Authorization` header; None for an anonymous request, 401 for a token nobody holds."""
        if authorization is None:
            return None
        scheme, _, token = authorization.partition(" ")
        for role in ("read", "write"):
            prefix = f"hf_test_{role}_"
            user = token.strip().removeprefix(prefix)
            if scheme.lower() == "bearer" and token.startswith(prefix) and user in self._organizations:
                return Caller(user, "read" if role == "read" else "write", tuple(self._organizations[user]))
        raise HubError(401, "Invalid credentials in Authorization header")


def require_login(caller: Caller | None) -> Caller:
    if caller is None:
        raise HubError(401, "Invalid username or password.")
    return caller


def require_writer(caller: Caller | None, namespace: str) -> Caller:
    """The caller, if its token may write in `namespace`; otherwise 401 (anonymous) or 403."""
    known = require_login(caller)
    if not known.owns(namespace):
        raise HubError(403, f"You don't have the rights to write under the namespace {namespace!r}")
    if known.role != "write":
        raise HubError(403, "You must use a write token to upload to a repository.")
    return known
