"""The `train` section (what is learned, and how) and the `validation` section (what is drawn along the way)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.core.config import Section

BasePrecision = Literal["no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto"]


class LoraSection(Section):
    """The adapter."""

    rank: int = Field(default=16, ge=1, le=1024)
    """Width of the adapter: parameters and memory grow with it."""
    alpha: float | None = Field(default=None, gt=0)
    """The adapter's output is scaled by alpha / rank; equal to `rank` when not given."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs that is dropped while training."""
    targets: list[str] = Field(default=["to_q", "to_k", "to_v", "to_out.0"], min_length=1)
    """Names of the linear layers that get an adapter, matched as suffixes: the image stream's attention by default."""
    exclude_blocks: list[int] = Field(default_factory=list)
    """Indices of transformer blocks that get none."""

    @property
    def scaled_alpha(self) -> float:
        """Alpha, with its default filled in."""
        return float(self.rank if self.alpha is None else self.alpha)


class SigmaSection(Section):
    """How the noise level sigma in (0, 1] is drawn (Esser et al. 2024, section 3.1; see docs/train.md)."""

    sampling: Literal["logit_normal", "uniform", "mode", "beta"] = "logit_normal"
    """'logit_normal' favours the middle noise levels, as the paper does; the others use the fields named after them."""
    logit_mean: float = 0.0
    """logit_normal: mean of the logit of sigma; below 0 favours little noise (detail), above 0 much (composition)."""
    logit_std: float = Field(default=1.0, gt=0)
    """logit_normal: standard deviation of the logit of sigma."""
    mode_scale: float = Field(default=1.29, ge=-1.0, le=1.75)
    """mode: above 0 favours the middle noise levels, below 0 the ends."""
    beta_alpha: float = Field(default=2.0, gt=0)
    """beta: first shape parameter."""
    beta_beta: float = Field(default=2.0, gt=0)
    """beta: second shape parameter."""
    shift: float | Literal["auto"] = 3.0
    """sigma' = s sigma / (1 + (s - 1) sigma); 3 is Stable Diffusion 3's, 'auto' grows with the picture's size."""

    @model_validator(mode="after")
    def _shift_is_positive(self) -> SigmaSection:
        if isinstance(self.shift, float) and self.shift <= 0:
            raise ValueError("shift: give a number above 0 (1 does not shift), or 'auto'")
        return self


class EvaluationSection(Section):
    """Held-out loss: the same pictures, noise and sigmas every time, so that the curve compares."""

    share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the samples that is held out of training, chosen by their digests; 0 turns the evaluation off."""
    max_samples: int = Field(default=16, ge=1)
    """At most this many are held out. Each costs `sigmas` forward passes an evaluation."""
    sigmas: int = Field(default=4, ge=1)
    """Noise levels that each is judged at, evenly spread over (0, 1) before the shift."""
    every: int = Field(default=250, ge=1)
    """Steps between evaluations; there is one before the first step and one after the last."""


class TrainSection(Section):
    """LoRA training by flow matching."""

    steps: int = Field(default=1000, ge=1)
    """Optimiser steps."""
    train_batch_size: int = Field(default=1, ge=1)
    """Pictures in one forward pass; all of one bucket."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes in one optimiser step."""
    base_model_precision: BasePrecision = "int8-quanto"
    """How the frozen base's linear weights are held; 'no_change' leaves them in `mixed_precision`'s type."""
    quantize_exclude: list[str] = Field(default=["proj_out"])
    """Names (fnmatch patterns) of layers that are left unquantised."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Type of the base's weights and activations: 'no' is fp32. The adapter and the loss are always fp32."""
    lora: LoraSection = LoraSection()
    """The adapter: its size, and the layers that get one."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """AdamW's step size, after the warm-up."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = "constant_with_warmup"
    """How the learning rate goes on after the warm-up; all but the constant ones fall to nothing by the last step."""
    lr_warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the learning rate grows from 0."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's mean of the gradients."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's mean of the squared gradients."""
    adam_weight_decay: float = Field(default=1e-2, ge=0)
    """AdamW's decoupled weight decay."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to AdamW's denominator."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 leaves them."""
    objective: Literal["velocity", "x0"] = "velocity"
    """'velocity': mean squared error of the velocity; 'x0': that times sigma squared, as diffusers' script trains."""
    sigmas: SigmaSection = SigmaSection()
    """Which noise levels are trained."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of samples that are shown with the empty caption."""
    gradient_checkpointing: bool = True
    """Recompute each block in the backward pass instead of keeping its activations."""
    shuffle_shards: int = Field(default=64, ge=1)
    """Samples are shuffled within windows of this many shards (of a shuffled list); small data sets as a whole."""
    evaluation: EvaluationSection = EvaluationSection()
    """The held-out loss: how much is held out, and how often it is measured."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints. A run that was cut off goes on from its last one."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Older checkpoints are deleted."""
    previous: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Fingerprint of the train artifact whose adapter is published now: the new one is measured against it. The sensor
    and `loraline run --against-published` fill it in by themselves (see docs/train.md)."""
    warm_start: bool = False
    """Start from the weights of `previous` instead of from nothing; where there is no `previous`, from nothing."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', ..."""


class ValidationSection(Section):
    """Pictures that are drawn before training, along the way and after it, always from the same seeds."""

    prompts: list[str] = Field(default_factory=list)
    """Give prompts that hold the new concept; none draws nothing."""
    negative_prompt: str = ""
    """What the pictures should not show."""
    guidance_scale: float = Field(default=3.0, ge=0)
    """Classifier-free guidance: how closely a picture follows its prompt; 1 and below turn it off."""
    inference_steps: int = Field(default=28, ge=1)
    """Sampler steps for each picture."""
    width: int = Field(default=1024, ge=16)
    """Width of the drawn pictures in pixels."""
    height: int = Field(default=1024, ge=16)
    """Height of the drawn pictures in pixels."""
    seed: int = 0
    """Seed of the first prompt's noise, one more for each further prompt; the same in every round."""
    every: int = Field(default=500, ge=1)
    """Steps between rounds of pictures."""
