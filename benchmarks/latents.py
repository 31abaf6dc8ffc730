"""The stage `latents` against its floor: the VAE in a loop on tensors that are ready.

Run it with `python -m benchmarks.latents [--size both] [--items 96] [--rounds 3] [--json result.json]`. At real
size the VAE is as wide and deep as that of Stable Diffusion 3.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import floor as bench
from stages.config import Config
from stages.core.artifact import Manifest, Shard
from stages.core.fingerprint import canonical_json, digest_bytes
from stages.core.shard import ShardWriter
from stages.core.store import Store
from stages.latents.stage import LatentsStage
from stages.models.device import pick_device
from stages.models.source import ModelSource
from stages.models.vae import encode, load_vae, to_pixels

EDGE = 192
REAL_EDGE = 256
SHARD_SAMPLES = 48


def pictures(count: int, edge: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    ramp_HW1 = np.linspace(0, 200, edge)[:, None, None] * np.linspace(0.3, 1, edge)[None, :, None]
    noise = [generator.integers(0, 50, (edge, edge, 3)) for _ in range(min(count, 16))]
    return [(ramp_HW1 + noise[index % len(noise)]).astype(np.uint8) for index in range(count)]


def cropped(config: Config, folder: Path, count: int, edge: int) -> Manifest:
    """What the bucket stage would have made of `count` pictures."""
    store, shards = Store(config.store), []
    for start in range(0, count, SHARD_SAMPLES):
        samples = min(SHARD_SAMPLES, count - start)
        path = folder / "shard.tar"
        with ShardWriter(path) as writer:
            for index, pixels_HWC in enumerate(pictures(samples, edge), start):
                file = io.BytesIO()
                Image.fromarray(pixels_HWC).save(file, "PNG", compress_level=1)
                geometry = {"image_sha256": digest_bytes(str(index).encode())}
                writer.write(f"picture-{index:07}", {"png": file.getvalue(), "json": canonical_json(geometry).encode()})
        blob = store.put_file(path)
        shards.append(Shard(**blob.model_dump(), name=f"shard-{start}", samples=samples, bucket=(edge, edge)))
    return Manifest(
        stage="bucket", dataset="pictures", fingerprint="0" * 64, stage_version=1, spec={}, inputs={}, shards=shards
    )


def main() -> None:
    options = bench.arguments(__doc__ or "", 96, "picture", 4)
    results = {}
    for size in bench.sizes(options):
        with bench.folder() as name:
            results[size] = one_size(size, options, Path(name))
    if not options.peak:
        bench.report("latents", "picture", options, results)


def one_size(size: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    real = size == "real"
    items, rounds, edge = (
        (options.real_items, min(options.rounds, bench.REAL_ROUNDS), REAL_EDGE)
        if real
        else (options.items, options.rounds, EDGE)
    )
    model = str(real_model(folder / "model")) if real else options.model
    config = bench.config_in(folder, model, latents={"batch_size": options.batch_size, "device": options.device})
    upstream = cropped(config, folder, items, edge)
    if options.peak:
        bench.run_stage(LatentsStage(), config, upstream)
        print(bench.peak_mb())
        return {}
    result = {"items": items, **measured(options, config, upstream, pictures(items, edge), rounds)}
    if not real:
        result["peak_mb"] = bench.peak_of("benchmarks.latents", options, items)
        result["peak_10x_mb"] = bench.peak_of("benchmarks.latents", options, 10 * items)
    return result


def real_model(folder: Path) -> Path:
    """An autoencoder of the shape that Stable Diffusion 3 has, with random weights."""
    from diffusers import AutoencoderKL

    folder.mkdir()
    shape = AutoencoderKL.load_config(bench.MODEL / "vae")
    width = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}
    return bench.reshaped(folder, {"vae": AutoencoderKL.from_config({**shape, **width})}, ())


def measured(
    options: argparse.Namespace, config: Config, upstream: Manifest, images: list[np.ndarray], rounds: int
) -> dict[str, Any]:
    device = pick_device(options.device)
    source = ModelSource(config.model, Store(config.store))
    vae = load_vae(source, torch.float32, device)
    rgb_BHWC = torch.from_numpy(np.stack(images))
    ready = [to_pixels(part, torch.float32, device) for part in rgb_BHWC.split(options.batch_size)]

    def floor() -> None:
        for pixels_BCHW in ready:
            encode(vae, pixels_BCHW, "mode", []).cpu()

    return bench.compare(
        rounds,
        lambda: bench.run_stage(LatentsStage(), config, upstream),
        lambda: load_vae(source, torch.float32, device),
        floor,
    )


if __name__ == "__main__":
    main()
