"""The nouns: Blob, Shard, Manifest, Artifact.

An artifact is a manifest and the blobs that it names. It exists when its manifest exists, and the manifest is
written last. Blobs are named by their content, so many manifests may share one.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from stages.core.fingerprint import digest_lines, digest_of

SCHEMA_VERSION = 1

# A digest of an artifact, or of one side of it: `content` is everything; a stage may name further facets (the download
# names `pixels`, `captions` and `pairs`), so that a caption that changed does not touch the crops.
CONTENT = "content"

# The sidecar of a shard that lists its samples' keys in order, one a line.
KEYS = "keys"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Blob(_Frozen):
    """Bytes in the store, named by their sha256. `suffix` ('.tar', '.jsonl', ...) only helps people and tools."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)
    suffix: str = ".tar"

    @property
    def path(self) -> str:
        """Where the blob lies, relative to the store's root."""
        return f"blobs/{self.sha256[:2]}/{self.sha256}{self.suffix}"

    @field_validator("suffix")
    @classmethod
    def _plain_suffix(cls, suffix: str) -> str:
        if not re.fullmatch(r"(\.[a-z0-9]+){1,2}", suffix):
            raise ValueError(f"{suffix!r} is no file name suffix")
        return suffix


class Shard(Blob):
    """A WebDataset tar: `samples` samples, all of one `bucket` (width, height in pixels) where the stage has buckets.

    `facets` are digests of one side of the content (see `CONTENT`); `sidecars` are small blobs that belong to the
    shard, such as the list of its captions, and can be read without it.
    """

    name: str
    samples: int = Field(ge=0)
    bucket: tuple[int, int] | None = None
    facets: dict[str, str] = Field(default_factory=dict)
    sidecars: dict[str, Blob] = Field(default_factory=dict)


class NamedFile(Blob):
    """A single file of an artifact: an adapter, a picture, a table. The name is unique within the artifact."""

    name: str


class Refusal(_Frozen):
    """An input that was left out, and why."""

    name: str
    reason: str


class Output(_Frozen):
    """What a stage, or one unit of a map stage, hands back. The runner makes the manifest of it."""

    shards: list[Shard] = Field(default_factory=list)
    files: list[NamedFile] = Field(default_factory=list)
    counts: dict[str, int] = Field(default_factory=dict)
    refused: list[Refusal] = Field(default_factory=list)
    facets: dict[str, str] = Field(default_factory=dict)
    info: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def joined(cls, outputs: list[Output]) -> Output:
        """The outputs one after the other; counts are added up, facets and info are left to the stage's `finish`."""
        counts: dict[str, int] = {}
        for output in outputs:
            for name, count in output.counts.items():
                counts[name] = counts.get(name, 0) + count
        return cls(
            shards=[shard for output in outputs for shard in output.shards],
            files=[file for output in outputs for file in output.files],
            counts=counts,
            refused=[refusal for output in outputs for refusal in output.refused],
        )


class Manifest(_Frozen):
    """The commit of an artifact: what it holds, and what made it.

    `shards`, `files` and `facets` decide the content digest; the rest (counts, refusals, versions, times, revision)
    is history, and two runs that differ only in it are equal for everything downstream.
    """

    schema_version: int = SCHEMA_VERSION
    stage: str
    dataset: str | None = None
    fingerprint: str
    stage_version: int
    spec: dict[str, Any]
    inputs: dict[str, str]
    shards: list[Shard] = Field(default_factory=list)
    files: list[NamedFile] = Field(default_factory=list)
    counts: dict[str, int] = Field(default_factory=dict)
    refused: list[Refusal] = Field(default_factory=list)
    facets: dict[str, str] = Field(default_factory=dict)
    info: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    created_at: str = ""
    duration_s: float = 0.0
    code_revision: str | None = None

    @property
    def path(self) -> str:
        return manifest_path(self.stage, self.fingerprint)

    def digest(self, facet: str = CONTENT) -> str:
        """The digest of a facet; of the whole content by default (sorted shard and file digests, with their names)."""
        if facet != CONTENT:
            return self.facets[facet]
        shards = [f"shard {shard.sha256} {shard.samples} {shard.bucket}" for shard in self.shards]
        files = [f"file {file.sha256} {file.name}" for file in self.files]
        return digest_of({"members": digest_lines(shards + files), "facets": self.facets})

    def file(self, name: str) -> NamedFile:
        """The file of that name.

        Raises:
            KeyError: the artifact has no such file.
        """
        for file in self.files:
            if file.name == name:
                return file
        raise KeyError(f"{self.stage} {self.fingerprint[:12]} has no file {name!r}")

    def reference(self) -> ArtifactRef:
        """The small, serialisable pointer to this artifact: what flows pass around."""
        return ArtifactRef(stage=self.stage, dataset=self.dataset, fingerprint=self.fingerprint, digest=self.digest())


class ArtifactRef(_Frozen):
    """Points to an artifact in a store. Small on purpose: it is a task's result and may be logged."""

    stage: str
    dataset: str | None = None
    fingerprint: str
    digest: str

    @property
    def path(self) -> str:
        return manifest_path(self.stage, self.fingerprint)


def manifest_path(stage: str, fingerprint: str) -> str:
    return f"artifacts/{stage}/{fingerprint}/manifest.json"
