"""The `download` section, and the kinds of source that it reads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stages.core.config import Section


class LocalSource(Section):
    """A folder on this machine, searched recursively."""

    type: Literal["local"] = "local"
    """A folder."""
    path: str
    """The folder; relative paths are relative to where loraline is started."""


class HubSource(Section):
    """A data set repository on the Hugging Face Hub: image files with captions. Private ones need HF_TOKEN."""

    type: Literal["hub"] = "hub"
    """A repository on the Hub."""
    repo: str = Field(pattern=r"^[\w.\-]+/[\w.\-]+$")
    """'owner/name'."""
    revision: str = "main"
    """A branch, a tag or a commit; resolved to a commit once, which is what is read and recorded."""
    folder: str = ""
    """Only files below this folder of the repository."""


Source = Annotated[LocalSource | HubSource, Field(discriminator="type")]


class DownloadSection(Section):
    """Reading the sources. Original bytes are kept untouched."""

    shard_mb: float = Field(default=256.0, gt=0)
    """A shard is closed at this size, in 10^6 bytes ..."""
    shard_samples: int = Field(default=1000, ge=1)
    """... or at this many samples, whichever comes first."""
    minimum_edge: int = Field(default=16, ge=1)
    """Images with a shorter edge below this many pixels are refused."""
    maximum_megapixels: float = Field(default=200.0, gt=0)
    """Images above this size are refused unread: a decompression bomb is a file of a few kilobytes."""
    max_refused_share: float = Field(default=0.1, ge=0, le=1)
    """The stage fails when more than this share of a data set's images is refused."""
    processes: int = Field(default=0, ge=0)
    """Processes that check images; 0 is one for each core."""
