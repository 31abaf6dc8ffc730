"""The training loop: flow matching on a frozen, quantised base with a LoRA adapter.

Shape letters: B batch, C latent channels, H and W latent height and width, L text tokens, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stages.core.errors import InputError
from stages.train import draws, objective, sigmas
from stages.train.config import TrainSection
from stages.train.data import Batch, ReadAhead, TrainingData
from stages.train.order import Order
from stages.train.schedule import learning_rate

if TYPE_CHECKING:  # these take seconds to import and are imported late, so that `--help` does not wait for them
    from accelerate import Accelerator
    from diffusers import SD3Transformer2DModel

BATCHES_AHEAD = 256
"""How far ahead the latent shards of batches are fetched from the store (a local one has them already)."""
TEXTS_AHEAD = 32
"""The same for their captions' shards, of which a batch may need one a sample."""


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did: `step` counts from 1; the gradient's norm is that before clipping."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float

    def record(self) -> dict[str, Any]:
        return {"step": self.step, "loss": self.loss, "lr": self.learning_rate, "grad_norm": self.grad_norm}


class Trainer:
    """Everything that a step needs. Its only state is the adapter's and the optimiser's.

    Args:
        section: what is learned, and how.
        seed: of the run.
        model: frozen but for its adapter.
        adapter: the adapter's parameters by name.
        data, order: the samples, and in which order they come.
        accelerator: device and precision.
    """

    def __init__(
        self,
        section: TrainSection,
        seed: int,
        model: SD3Transformer2DModel,
        adapter: dict[str, nn.Parameter],
        data: TrainingData,
        order: Order,
        accelerator: Accelerator,
    ) -> None:
        self.section, self.seed, self.model, self.adapter = section, seed, model, adapter
        self.data, self.order, self.accelerator = data, order, accelerator
        self.patch_size = int(model.config.patch_size)
        self.dtype = torch.bfloat16 if section.mixed_precision == "bf16" else torch.float32
        self.parameters = list(adapter.values())
        self._first = 0
        self.optimiser = torch.optim.AdamW(
            self.parameters,
            lr=section.learning_rate,
            betas=(section.adam_beta1, section.adam_beta2),
            eps=section.adam_epsilon,
            weight_decay=section.adam_weight_decay,
            foreach=True,
        )

    # -- a step -------------------------------------------------------------------------------------------------------

    def train_step(self, step: int, batches: Iterator[Batch]) -> StepResult:
        """One optimiser step over `gradient_accumulation_steps` batches; `step` counts from 1."""
        section = self.section
        rate = learning_rate(section, step - 1)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.accelerator.device)
        keys: list[str] = []
        for part in range(section.gradient_accumulation_steps):
            batch = next(batches)
            number = (step - 1) * section.gradient_accumulation_steps + part
            sigmas_B = self.sigmas(batch, number)
            noise_BCHW = draws.noise(batch.latents_BCHW.shape, self.seed, "noise", number).to(batch.latents_BCHW.device)
            noisy_BCHW = objective.interpolate(batch.latents_BCHW, noise_BCHW, sigmas_B)
            if section.lora.dropout:
                torch.manual_seed(draws.seed_for(self.seed, "dropout", number))
            velocity_BCHW = self.predict(batch, noisy_BCHW, sigmas_B)
            losses_B = objective.losses(velocity_BCHW, batch.latents_BCHW, noise_BCHW, sigmas_B, section.objective)
            loss = losses_B.mean() / section.gradient_accumulation_steps
            self.accelerator.backward(loss)
            total += loss.detach()
            keys += batch.keys
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, section.max_grad_norm or math.inf)
        result = StepResult(step, float(total), rate, float(norm))
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise InputError(
                f"step {step}: the loss is {result.loss} and the gradient's norm {result.grad_norm}, with the samples "
                f"{', '.join(keys)}. Lower train.learning_rate, or set train.mixed_precision: no; if it is always the "
                f"same sample, look at that picture. Training goes on from its last checkpoint when it is run again."
            )
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return result

    def sigmas(self, batch: Batch, number: int) -> Tensor:
        """The noise levels (B,) of a batch, shifted for its size; `number` counts batches from the start."""
        generator = draws.numbers(self.seed, "sigmas", number)
        drawn_B = sigmas.draw_sigmas(self.section.sigmas, len(batch.keys), generator)
        tokens = batch.latents_BCHW[0, 0].numel() // self.patch_size**2
        shift = sigmas.shift_for(self.section.sigmas, tokens)
        return sigmas.shifted(drawn_B, shift).to(batch.latents_BCHW.device)

    def predict(self, batch: Batch, noisy_BCHW: Tensor, sigmas_B: Tensor) -> Tensor:
        """The model's velocity (B, C, H, W). Noise level and interpolation are fp32; only what enters is cast."""
        with self.accelerator.autocast() if self.dtype != torch.float32 else nullcontext():
            velocity_BCHW: Tensor = self.model(
                hidden_states=noisy_BCHW.to(self.dtype),
                encoder_hidden_states=batch.text_BLD,
                pooled_projections=batch.pooled_BD,
                timestep=sigmas_B * sigmas.TIMESTEPS,
                return_dict=False,
            )[0]
        return velocity_BCHW

    # -- its batches --------------------------------------------------------------------------------------------------

    def batches(self, start: int) -> ReadAhead:
        """All batches from step `start` (done so far) to the end, made ready in the background."""
        each = self.section.gradient_accumulation_steps
        self._first = start * each
        return ReadAhead(self.read_batch, start * each, self.section.steps * each)

    def read_batch(self, number: int) -> Batch:
        """A batch by its number from the start of training, and the fetching of the shards that come after it."""
        for want, most in ((self.data.want, BATCHES_AHEAD), (self.data.want_texts, TEXTS_AHEAD)):
            ahead = min(most, self.order.batches_per_epoch)
            # At first all of them, from this batch's own on: what is wanted first comes first.
            for later in range(number if number == self._first else number + ahead, number + ahead + 1):
                want(self.order.batch(later))

        def dropped(key: str) -> bool:
            return draws.chance(self.section.caption_dropout, self.seed, "caption", number, key)

        return self.data.read(self.order.batch(number), dropped)
