"""Reading what earlier stages made: latents and text embeddings, memory-mapped, read ahead while a step computes.

Shape letters: B batch, C latent channels, H and W latent height and width, L text tokens, D features.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.core.artifact import Manifest, Shard
from stages.core.errors import InputError
from stages.core.fingerprint import digest_bytes
from stages.core.shard import MappedShard
from stages.core.store import Store
from stages.train.order import ShardRows

EMPTY_CAPTION = digest_bytes(b"")
READ_AHEAD = 2
"""Batches that are made ready while a step computes."""
SHARDS_AHEAD = 2
"""Shards that are fetched from the store at once, ahead of their turn."""
TEXTS_OPEN = 256
"""Shards of text embeddings that are kept open: each holds a file descriptor, of which a process often has 1,024."""
LISTED_AT_ONCE = 8
"""Lists of keys that are read from the store at once, before training starts."""


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket, on one device. Latents are fp32; text is in the model's type."""

    keys: list[str]
    latents_BCHW: Tensor
    text_BLD: Tensor
    pooled_BD: Tensor

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            latents_BCHW=self.latents_BCHW.to(device, non_blocking=True),
            text_BLD=self.text_BLD.to(device, non_blocking=True),
            pooled_BD=self.pooled_BD.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Entry:
    """A latent shard, and what the download knows of its samples, row by row."""

    shard: Shard
    dataset: str
    keys: list[str]
    captions: list[str]
    """sha256 of each sample's caption."""
    images: list[str]
    """sha256 of each sample's original file."""

    @property
    def bucket(self) -> tuple[int, int]:
        if self.shard.bucket is None:
            raise InputError(
                f"latents[{self.dataset}]: shard {self.shard.name} has no bucket; run latents with --force"
            )
        return self.shard.bucket


def read_entries(
    store: Store, downloads: dict[str | None, Manifest], latents: dict[str | None, Manifest]
) -> list[Entry]:
    """All latent shards, joined with captions by sample key; in an order that only what is in them decides, as the
    digests do that stand for them in the fingerprint (not the order of manifests or of the configuration).

    Raises:
        InputError: a latent has no caption: the two were not made from one download.
    """
    entries = []
    for dataset, manifest in latents.items():
        known: dict[str, tuple[str, str]] = {}
        for shard in downloads[dataset].shards:
            for line in store.read_blob(shard.sidecars["captions"]).splitlines():
                record = json.loads(line)
                known[record["key"]] = (record["caption_sha256"], record["image_sha256"])
        for shard, keys in _listed(store, manifest.shards):
            missing = [key for key in keys if key not in known]
            if missing:
                raise InputError(
                    f"latents[{dataset}] has {missing[0]}, which download[{dataset}] does not know; run both again"
                )
            pairs = [known[key] for key in keys]
            entries.append(Entry(shard, str(dataset), keys, [pair[0] for pair in pairs], [pair[1] for pair in pairs]))
    return sorted(entries, key=lambda entry: (entry.dataset, entry.shard.sha256))


def _listed(store: Store, shards: Sequence[Shard]) -> list[tuple[Shard, list[str]]]:
    """Shards with the keys of their samples; the shards themselves stay where they are."""
    with ThreadPoolExecutor(LISTED_AT_ONCE, "keys") as pool:
        return list(zip(shards, pool.map(store.keys, shards), strict=True))


class TextEmbeddings:
    """The text embeddings of every caption, by the caption's sha256; nothing is held in memory. A shard is fetched when
    it is first wanted or read.

    Args:
        store, manifest: where the embeds artifact is.
        t5_length: T5 tokens that a caption has for the model; zero padding that was not stored is put back.
    """

    def __init__(self, store: Store, manifest: Manifest, t5_length: int) -> None:
        self._t5_length = t5_length
        listed = _listed(store, manifest.shards)
        self._where = {key: number for number, (_, keys) in enumerate(listed) for key in keys}
        self._shelf = Shelf(store, manifest.shards, TEXTS_OPEN)

    def __contains__(self, digest: str) -> bool:
        return digest in self._where

    def read(self, digest: str) -> tuple[Tensor, Tensor]:
        """What the model is told of a caption: (L, D) token features and (D,) pooled features, as
        `StableDiffusion3Pipeline.encode_prompt` puts them together: CLIP's features are padded with zeros to T5's
        width, and T5's tokens follow CLIP's.

        Raises:
            InputError: the caption was never encoded.
        """
        if digest not in self._where:
            raise InputError(
                f"embeds has no caption {digest[:12]}; run `loraline stage embeds --force`, then train again"
            )
        shard = self._shelf.take(self._where[digest])
        parts = safetensors.torch.load(bytes(shard.read(digest, "safetensors")))
        clip_LD, t5_LD = parts["clip"], parts["t5"]
        clip_LD = F.pad(clip_LD, (0, t5_LD.shape[-1] - clip_LD.shape[-1]))
        t5_LD = F.pad(t5_LD, (0, 0, 0, self._t5_length - t5_LD.shape[0]))
        return torch.cat([clip_LD, t5_LD]), parts["pooled"]

    def of_prompt(self, prompt: str) -> tuple[Tensor, Tensor]:
        return self.read(digest_bytes(prompt.encode()))

    def want(self, digest: str) -> None:
        """Has the shard of a caption fetched that will be read soon."""
        self._shelf.want(self._where[digest])

    def close(self) -> None:
        self._shelf.close()


class Shelf:
    """Open shards: fetched in the background in the order of need, the least recently used ones put back."""

    def __init__(self, store: Store, shards: Sequence[Shard], capacity: int) -> None:
        self._store, self._shards, self._capacity = store, shards, capacity
        self._pool = ThreadPoolExecutor(SHARDS_AHEAD, "shards")
        self._open: OrderedDict[int, Future[MappedShard]] = OrderedDict()
        self._lock = threading.Lock()

    def want(self, number: int) -> None:
        """Starts fetching a shard, unless it is there."""
        self._wanted(number)

    def take(self, number: int) -> MappedShard:
        """The shard, waited for."""
        return self._wanted(number).result()

    def _wanted(self, number: int) -> Future[MappedShard]:
        with self._lock:
            future = self._open.get(number)
            if future is None:
                shard = self._shards[number]
                future = self._pool.submit(lambda: MappedShard(self._store.fetch(shard)))
                self._open[number] = future
                while len(self._open) > self._capacity:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return future

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._open.clear()


class TrainingData:
    """All samples: those to train on and those that are held out.

    Args:
        store: where the shards are.
        entries: see `read_entries`.
        text: the captions' embeddings.
        held_out: digests of images that training must not see.
        device, dtype: where batches go, and the type of their text.
        shards_open: how many shards are needed at once.
    """

    def __init__(
        self,
        store: Store,
        entries: Sequence[Entry],
        text: TextEmbeddings,
        held_out: set[str],
        device: torch.device,
        dtype: torch.dtype,
        shards_open: int,
    ) -> None:
        self.entries, self.text = entries, text
        self._device, self._dtype = device, dtype
        self._shelf = Shelf(store, [entry.shard for entry in entries], shards_open + SHARDS_AHEAD)
        self.held_out: list[tuple[int, int]] = []
        self._rows: list[list[int]] = []
        for number, entry in enumerate(entries):
            outside = [row for row, image in enumerate(entry.images) if image in held_out]
            self.held_out += [(number, row) for row in outside]
            self._rows.append([row for row in range(len(entry.keys)) if row not in set(outside)])
        for entry in entries:
            for key, caption in zip(entry.keys, entry.captions, strict=True):
                if caption not in text:
                    raise InputError(
                        f"embeds has no text embedding for {key} of data set {entry.dataset}; run "
                        f"`loraline stage embeds --force`, then train again"
                    )

    def shard_rows(self, repeats: dict[str, int]) -> list[ShardRows]:
        """The shards as the order of training sees them; `repeats` are extra passes by data set."""
        return [
            ShardRows(entry.bucket, rows, 1 + repeats[entry.dataset])
            for entry, rows in zip(self.entries, self._rows, strict=True)
        ]

    @property
    def samples(self) -> int:
        """Samples to train on."""
        return sum(len(rows) for rows in self._rows)

    def want(self, refs: Sequence[tuple[int, int]]) -> None:
        """Has the shards of samples fetched that will be read soon."""
        for number in dict.fromkeys(shard for shard, _ in refs):
            self._shelf.want(number)

    def want_texts(self, refs: Sequence[tuple[int, int]]) -> None:
        """Has the shards of their captions fetched."""
        for number, row in refs:
            self.text.want(self.entries[number].captions[row])

    def read(self, refs: Sequence[tuple[int, int]], dropped: Callable[[str], bool] = lambda _key: False) -> Batch:
        """Samples by (shard, row); `dropped` says of a sample's key whether it is shown with the empty caption."""
        keys, latents, texts = [], [], []
        for number, row in refs:
            entry = self.entries[number]
            key = entry.keys[row]
            member = safetensors.torch.load(bytes(self._shelf.take(number).read(key, "safetensors")))
            keys.append(key)
            latents.append(member["latents"].float())
            texts.append(self.text.read(EMPTY_CAPTION if dropped(key) else entry.captions[row]))
        batch = Batch(
            keys,
            torch.stack(latents),
            torch.stack([tokens for tokens, _ in texts]).to(self._dtype),
            torch.stack([pooled for _, pooled in texts]).to(self._dtype),
        )
        return batch.to(self._device)

    def close(self) -> None:
        self._shelf.close()
        self.text.close()


class ReadAhead:
    """Makes things ready in a background thread, a few ahead: `with ReadAhead(make, 0, 100) as ahead: for x in ahead`.

    Args:
        make: called with start, start + 1, ... in order, in one thread.
        start, stop: the range.
    """

    def __init__(self, make: Callable[[int], Batch], start: int, stop: int) -> None:
        self._make, self._next, self._stop = make, start, stop
        self._pool = ThreadPoolExecutor(1, "batches")
        self._ready: list[Future[Batch]] = []

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while self._next < self._stop and len(self._ready) <= READ_AHEAD:
            self._ready.append(self._pool.submit(self._make, self._next))
            self._next += 1
        if not self._ready:
            raise StopIteration
        return self._ready.pop(0).result()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, kind: Any, error: Any, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
