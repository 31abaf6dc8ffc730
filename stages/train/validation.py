"""Pictures of the validation prompts, drawn as a user of the published adapter would draw them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.core.errors import InputError
from stages.models.source import ModelSource
from stages.train.config import ValidationSection
from stages.train.data import TextEmbeddings

if TYPE_CHECKING:  # diffusers is imported late: it takes seconds, and `--help` does not need it
    from diffusers import SD3Transformer2DModel


@dataclass(frozen=True)
class Drawn:
    """A picture of a prompt, after `step` steps."""

    step: int
    index: int
    prompt: str
    path: Path

    @property
    def name(self) -> str:
        return f"validation/{self.step:06d}-{self.index}.png"


@contextmanager
def as_loaded(adapter: Iterable[torch.nn.Parameter], dtype: torch.dtype) -> Iterator[None]:
    """The adapter in the base's type, as diffusers rounds it when it is loaded into one; in fp32 again afterwards."""
    parts = list(adapter)
    exact = [part.data for part in parts]
    for part in parts:
        part.data = part.data.to(dtype)
    try:
        yield
    finally:
        for part, values in zip(parts, exact, strict=True):
            part.data = values


class Painter:
    """Draws with diffusers' own pipeline around the model in training. Prompts come encoded: no text encoder is loaded.

    Args:
        section: prompts and how to draw them.
        source: the base model, for its VAE and scheduler.
        text: where the encoded prompts are.
        device, dtype: where and in which type the model computes.
        folder: where pictures are put.
    """

    def __init__(
        self,
        section: ValidationSection,
        source: ModelSource,
        text: TextEmbeddings,
        device: torch.device,
        dtype: torch.dtype,
        folder: Path,
    ) -> None:
        self.section, self._source, self._text = section, source, text
        self._device, self._dtype, self._folder = device, dtype, folder
        self._vae: Any = None

    @property
    def passes(self) -> int:
        """Denoising steps of one round."""
        return len(self.section.prompts) * self.section.inference_steps

    def draw(self, model: SD3Transformer2DModel, step: int, tick: Callable[[], None]) -> list[Drawn]:
        """One picture for each prompt; prompt i from the noise of seed + i on the CPU, the same on every machine.

        Args:
            model: with its adapter, in eval mode.
            step: steps trained so far.
            tick: called after every denoising step.

        Raises:
            InputError: a picture has pixels that are no numbers: the training went off.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

        from stages.models.vae import load_vae

        section = self.section
        if self._vae is None:
            self._vae = load_vae(self._source, self._dtype, torch.device("cpu"))
        # The VAE is on the device only while it is needed: at training sizes that memory is dear.
        self._vae.to(self._device)
        pipeline = StableDiffusion3Pipeline(
            transformer=model,
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(self._source.config("scheduler")),
            vae=self._vae,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
        pipeline.set_progress_bar_config(disable=True)

        def after_step(_pipeline: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            tick()
            return values

        negative_LD, negative_pooled_D = self._text.of_prompt(section.negative_prompt)
        drawn = []
        for index, prompt in enumerate(section.prompts):
            prompt_LD, pooled_D = self._text.of_prompt(prompt)
            embeds = {
                "prompt_embeds": prompt_LD,
                "pooled_prompt_embeds": pooled_D,
                "negative_prompt_embeds": negative_LD,
                "negative_pooled_prompt_embeds": negative_pooled_D,
            }
            with torch.no_grad():
                pixels_HWC = pipeline(
                    **{name: part[None].to(self._device, self._dtype) for name, part in embeds.items()},
                    width=section.width,
                    height=section.height,
                    guidance_scale=section.guidance_scale,
                    num_inference_steps=section.inference_steps,
                    generator=torch.Generator("cpu").manual_seed(section.seed + index),
                    callback_on_step_end=after_step,
                    output_type="np",
                ).images[0]
            if not (pixels_HWC == pixels_HWC).all():
                raise InputError(
                    f"after {step} steps the picture of {prompt!r} has pixels that are no numbers: the adapter has "
                    f"exploded. Lower train.learning_rate, or set train.mixed_precision: no."
                )
            picture = Drawn(step, index, prompt, self._folder / f"{step:06d}-{index}.png")
            pipeline.numpy_to_pil(pixels_HWC)[0].save(picture.path)
            drawn.append(picture)
        self._vae.to("cpu")
        return drawn
