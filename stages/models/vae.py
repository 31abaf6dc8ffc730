"""The VAE: pictures to latents as Stable Diffusion 3 scales them, and back for previews.

Legend: B batch, C channels (3 of a picture, `latent_channels` of latents), H W height and width (a picture's, or the
latents', which are `downsampling` times smaller).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # torch and diffusers are imported late everywhere here, so that `--help` stays fast
    import torch

    from stages.models.source import ModelSource

Posterior = Literal["mode", "sample"]


def downsampling(config: dict[str, Any]) -> int:
    """How many pixels of an edge one latent stands for, from the VAE's configuration: 8 for Stable Diffusion 3."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def scaling(config: dict[str, Any]) -> tuple[float, float]:
    """(shift_factor, scaling_factor) of a VAE's configuration: latents are (z - shift_factor) * scaling_factor."""
    return float(config.get("shift_factor") or 0.0), float(config["scaling_factor"])


def load_vae(source: ModelSource, dtype: torch.dtype, device: torch.device) -> Any:
    """The model's AutoencoderKL, ready to encode.

    Raises:
        ConfigError, TransientError: it cannot be had (see `ModelSource.folder`).
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(
        source.folder(["vae"]),
        subfolder="vae",
        torch_dtype=dtype,
        use_safetensors=True,
        variant=source.variant("vae"),
        local_files_only=True,
    )
    return vae.requires_grad_(False).eval().to(device)


def to_pixels(rgb_BHWC: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """8-bit RGB (B, H, W, 3) as the pixels that the VAE takes: (B, 3, H, W) in [-1, 1], on the device.

    The arithmetic is that of diffusers' VaeImageProcessor, in fp32 and in its order.
    """
    pixels_BCHW = rgb_BHWC.to(device).permute(0, 3, 1, 2).float().contiguous()
    return (2.0 * (pixels_BCHW / 255.0) - 1.0).to(dtype)


def encode(vae: Any, pixels_BCHW: torch.Tensor, posterior: Posterior, seeds: Sequence[int]) -> torch.Tensor:
    """Latents (B, C, H, W) of pixels in [-1, 1], scaled as the transformer takes them, in the VAE's type.

    Args:
        vae: an AutoencoderKL.
        pixels_BCHW: on its device and in its type; edges are multiples of its downsampling.
        posterior: the mode of what the VAE predicts, or one draw from it.
        seeds: one for each picture, for the draw. The noise is drawn on the CPU, so it is the same on every device.
    """
    import torch

    with torch.no_grad(), _same_numbers_every_time():
        distribution = vae.encode(pixels_BCHW).latent_dist
        z_BCHW = distribution.mode().float()
        if posterior == "sample":
            noise_BCHW = torch.stack([_noise(seed, z_BCHW.shape[1:]) for seed in seeds]).to(z_BCHW.device)
            z_BCHW = z_BCHW + distribution.std.float() * noise_BCHW
        shift, scale = scaling(vae.config)
        latents_BCHW: torch.Tensor = ((z_BCHW - shift) * scale).to(pixels_BCHW.dtype)
    return latents_BCHW


def decode(vae: Any, latents_BCHW: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, H, W) in [-1, 1], fp32, of scaled latents: the way back, for previews."""
    import torch

    shift, scale = scaling(vae.config)
    with torch.no_grad():
        z_BCHW = (latents_BCHW.to(vae.device).float() / scale + shift).to(vae.dtype)
        pixels_BCHW: torch.Tensor = vae.decode(z_BCHW).sample.float().clamp(-1.0, 1.0)
    return pixels_BCHW


def _noise(seed: int, shape: Sequence[int]) -> torch.Tensor:
    import torch

    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


@contextmanager
def _same_numbers_every_time() -> Iterator[None]:
    """On a GPU: no convolution that adds up in a random order, none picked by a race, and fp32 that is really fp32
    (cuDNN uses the shorter TF32 by default). Without effect on the CPU."""
    import torch

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
