"""Errors the loopback Hub answers with; clients tell them apart by status and `X-Error-Code`."""

from __future__ import annotations


class HubError(Exception):
    """An HTTP error answer: `status`, a message for people, and the code the client dispatches on (or None)."""

    def __init__(self, status: int, message: str, code: str | None = None, details: dict[str, object] | None = None):
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.code = code
        self.details = details or {}


def repository_not_found(anonymous: bool) -> HubError:
    """A missing repository and one the caller may not see look the same."""
    if anonymous:
        return HubError(401, "Invalid username or password.", "RepoNotFound")
    return HubError(404, "Repository not found", "RepoNotFound")


def revision_not_found(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def entry_not_found(path: str) -> HubError:
    return HubError(404, f"Entry not found: {path}", "EntryNotFound")


def gated(repo_id: str, anonymous: bool) -> HubError:
    status = 401 if anonymous else 403
    return HubError(status, f"Access to {repo_id} is restricted and you are not in the authorized list.", "GatedRepo")
