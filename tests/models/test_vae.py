"""Pictures to latents and back, against the VAE called by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from stages.models.vae import decode, downsampling, encode, scaling, to_pixels
from tests.models.material import pixels

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae(tiny_sd3: Path) -> Any:
    vae = AutoencoderKL.from_pretrained(tiny_sd3 / "vae", torch_dtype=torch.float32).eval()
    vae.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    return vae


def test_pixels_are_those_of_diffusers_image_processor() -> None:
    picture_HWC = pixels(3, 96, 64)
    wanted_BCHW = VaeImageProcessor(vae_scale_factor=8).preprocess(Image.fromarray(picture_HWC))
    got_BCHW = to_pixels(torch.from_numpy(picture_HWC)[None], torch.float32, CPU)
    assert torch.equal(got_BCHW, wanted_BCHW)
    extremes = torch.tensor([0, 255], dtype=torch.uint8).repeat(3, 1).T.reshape(1, 1, 2, 3)
    assert to_pixels(extremes, torch.float32, CPU).unique().tolist() == [-1.0, 1.0]


def test_decoding_undoes_the_scaling(vae: Any) -> None:
    pixels_BCHW = to_pixels(torch.from_numpy(pixels(1, 64, 64))[None], torch.float32, CPU)
    latents_BCHW = encode(vae, pixels_BCHW, "mode", [])
    with torch.no_grad():
        z_BCHW = vae.encode(pixels_BCHW).latent_dist.mode()
        wanted_BCHW = vae.decode(z_BCHW).sample.clamp(-1, 1)
    assert torch.equal(latents_BCHW, (z_BCHW - 0.0609) * 1.5305)
    torch.testing.assert_close(decode(vae, latents_BCHW), wanted_BCHW, rtol=0, atol=1e-4)


def test_a_draw_depends_on_its_own_seed_alone(vae: Any) -> None:
    rgb_BHWC = torch.stack([torch.from_numpy(pixels(seed, 64, 64)) for seed in (1, 2, 3)])
    pixels_BCHW = to_pixels(rgb_BHWC, torch.float32, CPU)
    drawn_BCHW = encode(vae, pixels_BCHW, "sample", [7, 8, 9])
    turned_BCHW = encode(vae, pixels_BCHW.flip(0), "sample", [9, 8, 7]).flip(0)
    torch.testing.assert_close(drawn_BCHW, turned_BCHW, rtol=1e-4, atol=1e-5)
    other_BCHW = encode(vae, pixels_BCHW, "sample", [7, 8, 10])
    assert torch.equal(other_BCHW[:2], drawn_BCHW[:2])
    assert not torch.equal(other_BCHW[2], drawn_BCHW[2])


def test_numbers_are_read_off_the_configuration() -> None:
    config = {"block_out_channels": [128, 256, 512, 512], "scaling_factor": 1.5305, "shift_factor": 0.0609}
    assert downsampling(config) == 8
    assert scaling(config) == (0.0609, 1.5305)
    assert scaling({"scaling_factor": 0.18215, "shift_factor": None}) == (0.0, 0.18215)
