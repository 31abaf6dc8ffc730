"""The held-out loss: the same pictures, captions, noise and noise levels every time, so that its curve compares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.train import draws, objective, sigmas
from stages.train.config import TrainSection

if TYPE_CHECKING:
    from stages.train.data import Batch, TrainingData


def place_of(image: str) -> str:
    """An image's place in the queue for being held out: a digest of its digest, whatever else is in the data set."""
    return hashlib.sha256(f"held out {image}".encode()).hexdigest()


def border_of(held_out: Iterable[str]) -> str:
    """The last place that is held out; '' where none is. Images up to it were not trained on, since those held out are
    the first of the queue: also an image that comes into the data set later is known by its place alone."""
    return max(map(place_of, held_out), default="")


def choose_held_out(
    images: Iterable[str], share: float, at_most: int, needed: int, border: str | None = None
) -> set[str]:
    """Digests of the images to hold out of training.

    They are the first of a queue that every image has a fixed place in: a choice that hardly moves when a data set
    grows, and that takes copies of a picture together.

    Args:
        images: image digests of all samples.
        share: the share to hold out; 0 is none, and above 0 it is at least one.
        at_most: upper limit.
        needed: different images that training cannot do without; they are never touched.
        border: of an earlier training (see `border_of`): none behind it is taken, because that one may have been
            trained on it. A share that is rounded up, or a larger one, would otherwise reach such images.
    """
    distinct = sorted(set(images), key=place_of)
    count = min(max(1, round(share * len(distinct))) if share > 0 else 0, at_most, max(0, len(distinct) - needed))
    return {image for image in distinct[:count] if border is None or place_of(image) <= border}


@dataclass(frozen=True)
class Round:
    """One evaluation: the mean loss, and the mean at each noise level (before the shift)."""

    step: int
    loss: float
    by_sigma: dict[str, float]

    def record(self) -> dict[str, Any]:
        return {"step": self.step, "loss": self.loss, "by_sigma": self.by_sigma}


class HeldOut:
    """The held-out samples.

    Args:
        section: the objective, the noise levels and how they are shifted.
        data: where the samples are read.
        patch_size: of the model, to count image tokens.
        seed: of the run.
    """

    def __init__(self, section: TrainSection, data: TrainingData, patch_size: int, seed: int) -> None:
        self._section, self._data, self._patch, self._seed = section, data, patch_size, seed
        self._levels = sigmas.even_sigmas(section.evaluation.sigmas)

    def __len__(self) -> int:
        return len(self._data.held_out)

    def evaluate(
        self, step: int, predict: Callable[[Batch, Tensor, Tensor], Tensor], tick: Callable[[], None]
    ) -> Round:
        """Measures.

        Args:
            step: steps done so far.
            predict: the model: (batch, x_sigma (B, C, H, W), sigmas (B,)) -> velocity (B, C, H, W); no gradients.
            tick: called after every forward pass.
        """
        sums = torch.zeros(len(self._levels), dtype=torch.float64)
        for refs in self._groups():
            batch = self._data.read(refs)
            tokens = batch.latents_BCHW[0, 0].numel() // self._patch**2
            shift = sigmas.shift_for(self._section.sigmas, tokens)
            for place, level in enumerate(self._levels):
                sigmas_B = sigmas.shifted(level.expand(len(refs)), shift).to(batch.latents_BCHW.device)
                drawn = [
                    draws.noise(batch.latents_BCHW.shape[1:], self._seed, "held out", key, place) for key in batch.keys
                ]
                noise_BCHW = torch.stack(drawn).to(batch.latents_BCHW.device)
                noisy_BCHW = objective.interpolate(batch.latents_BCHW, noise_BCHW, sigmas_B)
                velocity_BCHW = predict(batch, noisy_BCHW, sigmas_B)
                losses_B = objective.losses(
                    velocity_BCHW, batch.latents_BCHW, noise_BCHW, sigmas_B, self._section.objective
                )
                sums[place] += losses_B.double().sum().cpu()
                tick()
        means = (sums / max(1, len(self))).tolist()
        by_sigma = {f"{level:.4f}": mean for level, mean in zip(self._levels.tolist(), means, strict=True)}
        return Round(step, sum(means) / len(means), by_sigma)

    @property
    def passes(self) -> int:
        """Forward passes of one evaluation."""
        return len(self._groups()) * len(self._levels)

    def _groups(self) -> list[Sequence[tuple[int, int]]]:
        """Batches of one bucket each."""
        buckets: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for shard, row in self._data.held_out:
            buckets.setdefault(self._data.entries[shard].bucket, []).append((shard, row))
        size = self._section.train_batch_size
        return [refs[start : start + size] for refs in buckets.values() for start in range(0, len(refs), size)]
