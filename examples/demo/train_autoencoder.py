"""Train the demo's autoencoder on drawn pictures, and measure the statistics of its latents.

Shape letters: B batch, C channels (3 for pixels, 16 for latents), H and W height and width. Pixels are in [-1, 1].
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from diffusers import AutoencoderKL
from drawing import CONCEPT, SHAPES, Pixels, random_collage, random_picture, render
from torch import Tensor, nn

# (width, height) in pixels and how often: mostly small, since the network is local and pixels are what costs time.
# Pictures of 32 px are cut out of pictures of 64.
SIZES = (((32, 32), 0.60), ((64, 64), 0.25), ((96, 64), 0.04), ((64, 96), 0.04), ((96, 96), 0.04), ((128, 128), 0.03))
PIXELS_PER_BATCH = 4 * 64 * 64
KL_WEIGHT = 5e-4
EDGE_WEIGHT = 0.5


def to_pixels(images: list[Pixels]) -> Tensor:
    """Return uint8 (H, W, 3) images as float pixels_BCHW in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return stacked.float().div_(127.5).sub_(1.0)


def picture_batch(rng: np.random.Generator) -> Tensor:
    """Draw one batch of one size: half collages, a third plain pictures, the rest rings."""
    sizes, weights = zip(*SIZES, strict=True)
    width, height = sizes[int(rng.choice(len(sizes), p=weights))]
    images = []
    for _ in range(max(2, PIXELS_PER_BATCH // (width * height))):
        dice, drawn_width, drawn_height = rng.random(), max(64, width), max(64, height)
        if dice < 0.5:
            image = random_collage(rng, drawn_width, drawn_height)
        else:
            shapes = SHAPES if dice < 0.85 else (CONCEPT,)
            image = render(random_picture(rng, drawn_width, drawn_height, shapes))
        left, top = int(rng.integers(drawn_width - width + 1)), int(rng.integers(drawn_height - height + 1))
        images.append(image[top : top + height, left : left + width])
    return to_pixels(images)


def edges(pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return differences between horizontal and between vertical neighbours."""
    return pixels_BCHW[..., 1:] - pixels_BCHW[..., :-1], pixels_BCHW[..., 1:, :] - pixels_BCHW[..., :-1, :]


@torch.no_grad()
def start_as_average(vae: AutoencoderKL) -> None:
    """Give a fresh autoencoder weights with which it already carries the mean colour of every 8 by 8 block.

    Flat colours are what these pictures are made of, and what normalisation layers make slow to learn: random weights
    need thousands of steps to get them right. Here the first eight channels of every level carry +rgb, -rgb, +1, -1
    (times a constant) through the skip connections; the residual branches start silent. The signed pairs make the last
    activation linear, for silu(x) - silu(-x) = x, and the constant steadies the last normalisation. All other channels
    keep their random weights, and training is free to use everything.
    """
    constant = 4.0
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    own = torch.arange(8)
    signs = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    for half in (vae.encoder, vae.decoder):
        first = half.conv_in
        first.weight[:8] = 0.0
        first.bias[:8] = torch.tensor([0.0] * 6 + [constant, -constant])
        first.weight[own[:6], own[:6] % 3, 1, 1] = signs
        for name, module in half.named_modules():
            if name.endswith(("conv_shortcut", "samplers.0.conv")):
                module.weight[:8] = 0.0
                module.bias[:8] = 0.0
                if name.endswith("downsamplers.0.conv"):  # the pad is on the right and below: taps 0 and 1 are a block
                    module.weight[own[:6], own[:6], :2, :2] = 0.25
                    module.weight[own[6:], own[6:], 0, 0] = 1.0
                else:
                    middle = module.weight.shape[-1] // 2
                    module.weight[own, own, middle, middle] = 1.0
    for half, gain in ((vae.encoder, 2.0), (vae.decoder, 1.0)):
        last = half.conv_out
        spread = constant * (2 / (half.conv_norm_out.num_channels // half.conv_norm_out.num_groups)) ** 0.5
        last.weight[:3] = 0.0
        last.bias[:3] = 0.0
        last.weight[own[:3], own[:3], 1, 1] = gain * spread
        last.weight[own[:3], own[3:6], 1, 1] = -gain * spread
    vae.decoder.conv_in.weight[:6] /= 2.0
    deviations = vae.encoder.conv_out  # its second half: log variances, quiet at first
    deviations.weight[vae.config.latent_channels :] *= 0.1
    deviations.bias[vae.config.latent_channels :] = -4.0


def train(
    vae: AutoencoderKL,
    *,
    steps: int,
    minutes: float,
    seed: int,
    peak_rate: float = 1.5e-3,
) -> None:
    """Train in place. Ends after `steps`, or after `minutes` if that comes first (the rate decays towards the end)."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    vae.to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(vae.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    smooth, started = 0.0, time.monotonic()
    for step in range(steps):
        done = max(step / steps, (time.monotonic() - started) / (60 * minutes))
        if done >= 1:
            break
        rate = peak_rate * min(1.0, (step + 1) / 100) * (0.5 * (1 + math.cos(math.pi * done)) + 0.005)
        for group in optimiser.param_groups:
            group["lr"] = rate
        pixels_BCHW = picture_batch(rng).to(vae.device).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(pixels_BCHW).latent_dist
        drawn_BCHW = vae.decode(posterior.sample()).sample
        error = nn.functional.l1_loss(drawn_BCHW, pixels_BCHW)
        edge_error = torch.stack(
            [nn.functional.l1_loss(a, b) for a, b in zip(edges(drawn_BCHW), edges(pixels_BCHW), strict=True)]
        ).mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error + nn.functional.mse_loss(drawn_BCHW, pixels_BCHW) + EDGE_WEIGHT * edge_error + KL_WEIGHT * kl
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        smooth = error.item() if step == 0 else 0.97 * smooth + 0.03 * error.item()
        if step % 100 == 0:
            print(
                f"autoencoder {step:5d} {time.monotonic() - started:5.0f} s  l1 {smooth:.4f}  "
                f"edges {edge_error.item():.4f}  kl {kl.item():.2f}  rate {rate:.1e}",
                flush=True,
            )
    vae.eval()


@torch.no_grad()
def balance_channels(vae: AutoencoderKL, *, seed: int, batches: int = 20) -> None:
    """Bring the latent channels nearer to each other in size without changing what the autoencoder draws.

    The channels that carry flat colour are several times larger than those that carry edges, and noise would drown the
    small ones first. Each channel is divided by the root of its standard deviation, in the encoder's last layer, and
    multiplied again in the decoder's first.
    """
    rng = np.random.default_rng(seed)
    means = [vae.encode(_plain_pictures(rng).to(vae.device)).latent_dist.mean for _ in range(batches)]
    factors_C = torch.cat(means).std(dim=(0, 2, 3)).rsqrt()
    last, channels = vae.encoder.conv_out, vae.config.latent_channels
    last.weight[:channels] *= factors_C[:, None, None, None]
    last.bias[:channels] *= factors_C
    last.bias[channels:] += 2 * factors_C.log()  # log variances
    vae.decoder.conv_in.weight /= factors_C[None, :, None, None]


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, *, seed: int, batches: int = 40) -> tuple[float, float]:
    """Return (shift, scale) so that (latents - shift) * scale has mean 0 and standard deviation 1 on plain pictures."""
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(batches):
        values.append(vae.encode(_plain_pictures(rng).to(vae.device)).latent_dist.sample().flatten())
    latents = torch.cat(values)
    return float(latents.mean()), float(1.0 / latents.std())


def _plain_pictures(rng: np.random.Generator) -> Tensor:
    """Return pixels_BCHW of 16 plain pictures of 64 by 64."""
    return to_pixels([render(random_picture(rng, 64, 64)) for _ in range(16)])
