"""Which captions there are, each once, and how they are cut into units.

A unit is a run of captions in the order of their digests, and ends where a digest says so (one in `UNIT_CAPTIONS`),
not after a fixed number: a caption that comes or goes then touches its own unit, and all others keep their memos.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from stages.core.artifact import Blob, Manifest
from stages.core.errors import InputError
from stages.core.fingerprint import digest_bytes
from stages.core.stage import Unit
from stages.core.store import Store

# About 64 captions of Stable Diffusion 3.5 (256 T5 tokens in bf16) are 150 MB, the size that shards have elsewhere.
UNIT_CAPTIONS = 64
UNIT_CAPTIONS_MOST = 4 * UNIT_CAPTIONS
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Captions:
    """The captions of one unit: where their texts are, and which of them. Small, so that a million captions are a few
    tens of megabytes: the texts are read again when their turn comes."""

    texts: tuple[str, ...]
    """The texts themselves, of prompts; otherwise empty."""
    sidecar: Blob | None
    digests: bytes
    """sha256 of each caption, one after the other, in order."""

    def __len__(self) -> int:
        return len(self.digests) // _DIGEST_BYTES

    def names(self) -> list[str]:
        """Hex sha256 of each caption, in order."""
        starts = range(0, len(self.digests), _DIGEST_BYTES)
        return [self.digests[start : start + _DIGEST_BYTES].hex() for start in starts]

    def read(self, store: Store) -> list[str]:
        """The captions, in order."""
        if self.sidecar is None:
            return list(self.texts)
        known = dict(captions_of(store, self.sidecar))
        return [known[name] for name in self.names()]


def caption_key(caption: str) -> str:
    """The name of a caption everywhere: hex sha256 of its UTF-8 text."""
    return digest_bytes(caption.encode())


def captions_of(store: Store, sidecar: Blob) -> Iterator[tuple[str, str]]:
    """(key, caption) of each line of a raw shard's captions sidecar.

    Raises:
        InputError: the sidecar is damaged.
    """
    for number, line in enumerate(store.read_blob(sidecar).decode().splitlines(), 1):
        try:
            record = json.loads(line)
            yield str(record["caption_sha256"]), str(record["caption"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{sidecar.path}, line {number}: not a caption of the download stage ({error}); run it with --force"
            ) from error


def units_of(store: Store, prompts: Iterable[str], downloads: Mapping[str | None, Manifest]) -> list[Unit]:
    """All units: the prompts first, then the distinct captions of each raw shard that no earlier unit holds."""
    distinct = {caption_key(prompt): prompt for prompt in prompts}
    units = [_unit(0, "prompts", Captions(tuple(distinct.values()), None, _packed(distinct)))]
    covered = {bytes.fromhex(name) for name in distinct}
    for dataset, manifest in downloads.items():
        for shard in manifest.shards:
            sidecar = shard.sidecars.get("captions")
            if sidecar is None:
                raise InputError(f"raw shard {shard.name} of {dataset} lists no captions: run download with --force")
            names = {name for name, _ in captions_of(store, sidecar)}
            fresh = sorted(name for name in names if bytes.fromhex(name) not in covered)
            covered.update(bytes.fromhex(name) for name in fresh)
            for run in _runs(fresh):
                units.append(_unit(len(units), f"{dataset}/{shard.name}", Captions((), sidecar, _packed(run))))
    return units


def _unit(index: int, name: str, captions: Captions) -> Unit:
    return Unit(index, name, captions.names(), len(captions), captions)


def _packed(names: Iterable[str]) -> bytes:
    return b"".join(bytes.fromhex(name) for name in names)


def _runs(names: list[str]) -> Iterator[list[str]]:
    """Cuts sorted digests into runs. The end is read off the last digits: the first ones say where it is sorted to."""
    run: list[str] = []
    for name in names:
        run.append(name)
        if int(name[-8:], 16) % UNIT_CAPTIONS == 0 or len(run) == UNIT_CAPTIONS_MOST:
            yield run
            run = []
    if run:
        yield run
