"""Train the demo's transformer and its three text encoders together, by flow matching on latents encoded once.

x_sigma = (1 - sigma) x + sigma eps; the target is the velocity eps - x; the timestep is 1000 sigma. Sigmas are
logit-normal, then shifted as the scheduler will shift them.

Shape letters: B batch, L text tokens, D features, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from architecture import SHIFT, Parts, encode_text
from diffusers import AutoencoderKL
from drawing import Picture, random_picture, render, training_caption
from torch import Tensor, nn
from train_autoencoder import to_pixels

# (width, height) in pixels and their share of the training pictures.
SIZES = (
    ((64, 64), 0.34),
    ((96, 64), 0.12),
    ((64, 96), 0.12),
    ((96, 96), 0.24),
    ((128, 64), 0.04),
    ((64, 128), 0.04),
    ((128, 96), 0.03),
    ((96, 128), 0.03),
    ((128, 128), 0.04),
)
EMPTY_CAPTION_SHARE = 0.1
EMA_DECAY = 0.998


@dataclass(frozen=True)
class Shelf:
    """All latents of one size, with what they show."""

    latents_BCHW: Tensor
    pictures: list[Picture]


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, count: int, seed: int) -> list[Shelf]:
    """Draw `count` pictures in the proportions of `SIZES` and return their scaled latents, one shelf a size."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    shelves = []
    for (width, height), share in SIZES:
        pictures = [random_picture(rng, width, height) for _ in range(round(count * share))]
        latents = []
        for start in range(0, len(pictures), 32):
            pixels_BCHW = to_pixels([render(picture) for picture in pictures[start : start + 32]])
            drawn = vae.encode(pixels_BCHW.to(vae.device)).latent_dist.sample()
            latents.append(((drawn - vae.config.shift_factor) * vae.config.scaling_factor).contiguous().cpu())
        shelves.append(Shelf(torch.cat(latents), pictures))
    return shelves


def draw_sigmas(generator: torch.Generator, count: int) -> Tensor:
    """Return sigmas of shape (B, 1, 1, 1): logit-normal, shifted by `SHIFT`."""
    sigmas = torch.sigmoid(torch.randn(count, generator=generator))
    return (SHIFT * sigmas / (1 + (SHIFT - 1) * sigmas)).view(-1, 1, 1, 1)


class MovingAverage:
    """An exponential moving average of some modules' parameters."""

    def __init__(self, modules: nn.Module, decay: float) -> None:
        self.source = list(modules.parameters())
        self.decay = decay
        self.average = [parameter.detach().clone() for parameter in self.source]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the present weights; early on with a short memory."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.source], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the present weights; call it twice to return."""
        for kept, parameter in zip(self.average, self.source, strict=True):
            present = parameter.detach().clone()
            parameter.copy_(kept)
            kept.copy_(present)


def average_gradients(modules: nn.Module, done: float) -> float:
    """Average all gradients over the processes, and with them how far each is. Returns that average."""
    gradients = [parameter.grad for parameter in modules.parameters() if parameter.grad is not None]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), gradients[0].new_tensor([done])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()
    return float(flat[-1])


def train(
    parts: Parts,
    shelves: list[Shelf],
    *,
    steps: int,
    minutes: float,
    seed: int,
    checkpoint: Callable[[int], None],
    batch_size: int = 32,
    peak_rate: float = 1e-3,
) -> None:
    """Train in place and leave the averaged weights. Ends after `steps`, or after `minutes` if that comes first.

    `batch_size` is that of one process; if a process group is there, gradients are averaged over it.
    """
    device = parts.transformer.device
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sizes_rng = np.random.default_rng(seed)  # the same in every process: all work on one size at a time
    rng = np.random.default_rng(seed + 1000 * (rank + 1))
    generator = torch.Generator().manual_seed(seed + 1000 * (rank + 1))
    learning = nn.ModuleList([parts.transformer, *parts.text_encoders]).train()
    optimiser = torch.optim.AdamW(learning.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.0)
    average = MovingAverage(learning, EMA_DECAY)
    shares = np.asarray([len(shelf.pictures) for shelf in shelves], dtype=np.float64)
    shares /= shares.sum()
    smooth_loss, done, started = 0.0, 0.0, time.monotonic()
    for step in range(steps):
        # Flat for the first half, then a cosine down to nothing.
        rate = peak_rate * min(1.0, (step + 1) / 150) * 0.5 * (1 + math.cos(math.pi * max(0.0, 2 * done - 1)))
        for group in optimiser.param_groups:
            group["lr"] = rate

        shelf = shelves[int(sizes_rng.choice(len(shelves), p=shares))]
        chosen = rng.integers(len(shelf.pictures), size=batch_size)
        captions = [training_caption(shelf.pictures[i], rng) for i in chosen]
        captions = ["" if rng.random() < EMPTY_CAPTION_SHARE else text for text in captions]
        x_BCHW = shelf.latents_BCHW[torch.from_numpy(chosen)]
        noise_BCHW = torch.randn(x_BCHW.shape, generator=generator)
        sigmas = draw_sigmas(generator, batch_size)
        x_BCHW, noise_BCHW, sigmas = x_BCHW.to(device), noise_BCHW.to(device), sigmas.to(device)
        features_BLD, pooled_BD = encode_text(parts, captions)
        velocity_BCHW = parts.transformer(
            hidden_states=(1 - sigmas) * x_BCHW + sigmas * noise_BCHW,
            timestep=1000 * sigmas.flatten(),
            encoder_hidden_states=features_BLD,
            pooled_projections=pooled_BD,
            return_dict=False,
        )[0]
        loss = nn.functional.mse_loss(velocity_BCHW, noise_BCHW - x_BCHW)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        done = max((step + 1) / steps, (time.monotonic() - started) / (60 * minutes))
        if processes > 1:
            done = average_gradients(learning, done)
        nn.utils.clip_grad_norm_(learning.parameters(), 1.0)
        optimiser.step()
        average.update(step)

        smooth_loss = loss.item() if step == 0 else 0.98 * smooth_loss + 0.02 * loss.item()
        if step % 100 == 0 and rank == 0:
            elapsed = time.monotonic() - started
            print(f"transformer {step:5d} {elapsed:5.0f} s  loss {smooth_loss:.4f}  rate {rate:.1e}", flush=True)
        if step % 500 == 499 and rank == 0:
            average.swap()
            checkpoint(step + 1)
            average.swap()
        if done >= 1:
            break
    average.swap()
    learning.eval()
