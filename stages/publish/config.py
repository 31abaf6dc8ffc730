"""The `publish` section: where the adapter goes, and what its card says."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.core.config import Section


class PublishSection(Section):
    """Publishing. The Hub needs HF_TOKEN with write access in the environment."""

    target: Literal["hub", "folder"] = "folder"
    """'hub': a repository on the Hugging Face Hub (`repo`); 'folder': a folder (`path`)."""
    repo: str | None = Field(default=None, pattern=r"^[\w.\-]+/[\w.\-]+$")
    """Hub model repository, 'owner/name'; created if it is not there."""
    branch: str = "main"
    """Branch that the adapter is committed to; made if it is not there."""
    private: bool = True
    """Whether a repository that is created here is private."""
    path: str | None = None
    """Folder for the target 'folder'."""
    license: str = "other"
    """Licence on the card. With 'other', the card of an adapter of a stabilityai model links to that licence."""
    trigger: str | None = None
    """The word or words that call the new concept, named on the card."""
    description: str = ""
    """A paragraph for the card."""
    maximum_regression: float | None = Field(default=None, gt=-1)
    """The quality gate: publish only if the held-out loss is at most this share above that of the adapter published now
    (0.02: up to 2 % worse; 0: no worse; -0.05: at least 5 % better). Not given: always publish."""

    @model_validator(mode="after")
    def _target_is_named(self) -> PublishSection:
        if self.target == "hub" and not self.repo:
            raise ValueError("target 'hub' needs publish.repo: 'owner/name'")
        if self.target == "folder" and not self.path:
            raise ValueError("target 'folder' needs publish.path")
        return self
