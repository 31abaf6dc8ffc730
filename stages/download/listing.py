"""What a source holds, before any image is read: its samples with the identity of each, and what is no use already.

Everything that later stages depend on (which images, which captions, which belongs to which) is decided here, so a
plan can tell before a run what the run will touch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from stages.core.artifact import Refusal
from stages.core.errors import InputError
from stages.core.fingerprint import digest_bytes, digest_lines, digest_of
from stages.download.captions import MAXIMUM_BYTES, Caption, Strategy, from_filename, from_text, text_path
from stages.download.images import SUFFIXES

KEY_STEM_LETTERS = 48
NO_CAPTION = "no caption"
"""How the reason of an image without a caption file begins."""


@dataclass(frozen=True)
class SourceFile:
    """A file of a source. `path` is relative to the source, with '/'. `identity` is a digest of its bytes: the sha256
    of a local file; on the Hub the sha256 of a large file or the git id of a small one."""

    path: str
    bytes: int
    identity: str = ""
    refused: str | None = None
    """Why it cannot be read, where that is known from looking."""


@dataclass(frozen=True)
class Sample:
    """An image with its caption, as listed: not yet looked into."""

    key: str
    image: SourceFile
    caption: str

    @property
    def caption_sha256(self) -> str:
        return digest_bytes(self.caption.encode())


class Source(Protocol):
    """Where a data set comes from. One file a kind of source; `stage.open_source` knows them all."""

    @property
    def where(self) -> str:
        """For messages: 'the folder data/photos', 'the Hub data set o/n at 1234abcd'."""
        ...

    @property
    def field(self) -> str:
        """For messages: the configuration's field that says where to look, 'datasets.photos.source.path'."""
        ...

    @property
    def commit(self) -> str | None:
        """What pins the source's state, where it has such a thing."""
        ...

    def list_files(self) -> list[SourceFile]:
        """All files, sorted by path; identities only of those that `wanted` by name (images and texts)."""
        ...

    def read_texts(self, files: Sequence[SourceFile]) -> Iterator[bytes]:
        """The bytes of small files, in order."""
        ...

    def fetch(self, files: Sequence[SourceFile]) -> Iterator[Path]:
        """Local paths of files, in order; fetched a bounded number ahead."""
        ...


@dataclass(frozen=True)
class Listing:
    """A source's state.

    `samples` have an image and a usable caption, by path; `refused` are images that have none, or cannot be read.
    """

    samples: list[Sample]
    refused: list[Refusal] = field(default_factory=list)
    commit: str | None = None
    dropped_lines: int = 0

    @property
    def images(self) -> int:
        return len(self.samples) + len(self.refused)

    def state(self) -> dict[str, Any]:
        """What goes into the fingerprint: counts for people, digests for the three sides that stages depend on."""
        captions = {sample.caption_sha256 for sample in self.samples}
        state: dict[str, Any] = {
            "images": len(self.samples),
            "without_caption": len(self.refused),
            "distinct_captions": len(captions),
            "pixels": digest_lines(f"{sample.key} {sample.image.identity}" for sample in self.samples),
            "captions": digest_lines(captions),
            "pairs": digest_lines(f"{sample.key} {sample.caption_sha256}" for sample in self.samples),
            "refused": digest_of([refusal.model_dump() for refusal in self.refused]),
        }
        if self.commit:
            state["commit"] = self.commit
        return state


def sample_key(path: str) -> str:
    """The stable key of a source path: what is readable of its name, and ten letters of its digest."""
    stem = re.sub(r"[^A-Za-z0-9_\-]+", "-", PurePosixPath(path).stem)[:KEY_STEM_LETTERS]
    return f"{stem or 'image'}-{digest_bytes(path.encode())[:10]}"


def is_image(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in SUFFIXES


def is_wanted(path: str, strategy: Strategy) -> bool:
    """Whether a source has to identify a file: an image, or a text where captions are in texts; never a hidden one."""
    parts = PurePosixPath(path).parts
    if any(part.startswith(".") for part in parts):
        return False
    return is_image(path) or (strategy == "textfile" and path.endswith(".txt"))


def list_source(source: Source, strategy: Strategy) -> Listing:
    """Lists a source and gives every image its caption.

    Raises:
        InputError: there is no image in it.
    """
    files = source.list_files()
    images = [file for file in files if is_image(file.path)]
    if not images:
        raise InputError(
            f"{source.field}: {source.where} holds no image: files are images when they are named "
            f"{', '.join(sorted(SUFFIXES))}"
        )
    captions = _captions(source, files, images, strategy)
    samples: dict[str, Sample] = {}
    refused: list[Refusal] = []
    dropped = 0
    for image, caption in zip(images, captions, strict=True):
        key = sample_key(image.path) if image.refused is None else ""
        reason = image.refused or caption.refused
        if reason is None and key in samples:
            reason = f"its key is that of {samples[key].image.path}: rename one of them"
        if reason is not None:
            refused.append(Refusal(name=image.path, reason=reason))
            continue
        dropped += caption.dropped_lines
        samples[key] = Sample(key, image, caption.text)
    return Listing(list(samples.values()), refused, source.commit, dropped)


def _captions(source: Source, files: list[SourceFile], images: list[SourceFile], strategy: Strategy) -> list[Caption]:
    if strategy == "filename":
        return [from_filename(image.path) for image in images]

    by_path = {file.path: file for file in files if file.path.endswith(".txt")}
    found = [by_path.get(text_path(image.path)) for image in images]
    known: dict[str, Caption] = {}
    readable = []
    for text in dict.fromkeys(text for text in found if text is not None):
        if text.refused is not None:
            known[text.path] = Caption(refused=f"{text.path}: {text.refused}")
        elif text.bytes > MAXIMUM_BYTES:
            known[text.path] = Caption(refused=f"caption file of {text.bytes:,} bytes (at most {MAXIMUM_BYTES:,})")
        else:
            readable.append(text)
    for text, data in zip(readable, source.read_texts(readable), strict=True):
        known[text.path] = from_text(data)
    return [
        known[text.path] if text is not None else Caption(refused=f"{NO_CAPTION}: {text_path(image.path)} is not there")
        for image, text in zip(images, found, strict=True)
    ]
