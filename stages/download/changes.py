"""What changed in a source since an artifact was made, for people: counts, and the first few names.

The states that fingerprints are made of hold counts and digests alone. The names come from the lists of captions beside
the artifact's shards on one side, and from the listing that this process has just made on the other.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from stages.core.artifact import Manifest
from stages.core.errors import LoralineError
from stages.core.fingerprint import digest_of, fingerprint
from stages.core.store import Store
from stages.download.listing import Listing, sample_key

NAMES = 3
MOST_LISTS = 64  # that are read to find names: each is a request to the store
MOST_IMAGES = 100_000  # of the listings that are kept in memory
_DIGEST_LETTERS = 11  # at the end of a sample's key, with the dash
_SHA256_DIGITS = 64


class Listings:
    """The listings that this process made last, by their states: an explanation is given two states to go by."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[weakref.ref[Store], Listing]] = {}

    def note(self, store: Store, state: dict[str, Any], listing: Listing) -> None:
        key = digest_of(state)
        self._kept.pop(key, None)
        self._kept[key] = (weakref.ref(store), listing)
        while sum(kept.images for _, kept in self._kept.values()) > MOST_IMAGES:
            del self._kept[next(iter(self._kept))]

    def names(self, stage: str, version: int, old: dict[str, Any], state: dict[str, Any]) -> list[str]:
        """The first few files that are new, gone or changed; nothing where that cannot be told cheaply.

        Args:
            stage, version, old: what the earlier artifact is named by (the stage has no inputs).
            state: the source's state now.
        """
        reference, listing = self._kept.get(digest_of(state), (None, None))
        store = reference() if reference is not None else None
        if store is None or listing is None:
            return []
        try:
            manifest = store.manifest(stage, fingerprint(stage, version, old, {}))
            return names_of_changes(store, manifest, listing) if manifest is not None else []
        except LoralineError:  # a list that cannot be read costs the names, never the plan
            return []


def names_of_changes(store: Store, manifest: Manifest, listing: Listing) -> list[str]:
    """'new: a.png, b.png, c.png and 4 more', and so on for what is gone, changed, or captioned otherwise.

    Raises:
        StoreError, TransientError: a list of captions cannot be read.
    """
    lists = [shard.sidecars["captions"] for shard in manifest.shards if "captions" in shard.sidecars]
    if len(lists) > MOST_LISTS:
        return []
    before = {record["key"]: record for blob in lists for record in map(json.loads, store.read_blob(blob).splitlines())}
    now = {sample.key: sample for sample in listing.samples}
    unusable = {sample_key(refusal.name): refusal.name for refusal in listing.refused}
    both = [(sample, before[key]) for key, sample in now.items() if key in before]
    found = {
        "new": [sample.image.path for key, sample in now.items() if key not in before],
        # Of these, the list has no more than the key: the name without its suffix, and letters of a digest.
        "gone": sorted(key[:-_DIGEST_LETTERS] for key in before if key not in now and key not in unusable),
        # On the Hub a small file is named by git, which says nothing about its sha256.
        "changed": [
            sample.image.path
            for sample, record in both
            if len(sample.image.identity) == _SHA256_DIGITS and record["image_sha256"] != sample.image.identity
        ],
        "other caption": [
            sample.image.path for sample, record in both if record["caption_sha256"] != sample.caption_sha256
        ],
        "no usable caption now": [name for key, name in unusable.items() if key in before],
    }
    return [f"{what}: {_first(names)}" for what, names in found.items() if names]


def _first(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES])
    return shown if len(names) <= NAMES else f"{shown} and {len(names) - NAMES:,} more"


def counts_of_changes(old: dict[str, Any] | None, new: dict[str, Any] | None) -> list[str]:
    """What changed between two states of a source, in words: its digests would tell a person nothing."""
    if not old or not new or old == new:
        return []
    texts = list(_counts(old, new))
    if old.get("commit") != new.get("commit"):
        texts.append(f"source: commit {str(old.get('commit'))[:10]} -> {str(new.get('commit'))[:10]}")
    return texts or ["source: the files that it refuses changed"]


def _counts(old: dict[str, Any], new: dict[str, Any]) -> Iterable[str]:
    if old["images"] != new["images"]:
        yield f"source: {old['images']:,} -> {new['images']:,} images"
    elif old["pixels"] != new["pixels"]:
        yield f"source: some of its {new['images']:,} images changed"
    if old["captions"] != new["captions"]:
        before, after = old["distinct_captions"], new["distinct_captions"]
        yield "source: captions changed" if before == after else f"source: {before:,} -> {after:,} distinct captions"
    elif old["pairs"] != new["pairs"] and old["pixels"] == new["pixels"]:
        yield "source: captions belong to other images than before"
    if old["without_caption"] != new["without_caption"]:
        yield f"source: {old['without_caption']:,} -> {new['without_caption']:,} images without a usable caption"
