"""Build and train the demo's Stable Diffusion 3, and write it as a diffusers folder in float16.

    python examples/demo/make_model.py --out examples/demo/tiny-sd3
    python examples/demo/make_model.py --out /tmp/untrained --untrained       # the same layout within seconds

Two trainings follow each other: the autoencoder; then the transformer together with the text encoders, on latents that
were encoded once. Each ends after its number of steps, or after its minutes if that is sooner. The same
seed and numbers of steps give the same model on the same machine, as long as no limit of minutes is met. While the
transformer trains, --out is rewritten every 500 steps, so that a usable model is there at any time.

The transformer can be trained by several processes, once the autoencoder is there:

    torchrun --nproc-per-node 2 examples/demo/make_model.py --out OUT --autoencoder FOLDER
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import train_autoencoder
import train_transformer
from architecture import Parts, build, save
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn


def trained_autoencoder(vae: AutoencoderKL, options: argparse.Namespace) -> AutoencoderKL:
    """Train the autoencoder and write the statistics of its latents into its configuration."""
    train_autoencoder.train(
        vae, steps=options.autoencoder_steps, minutes=options.autoencoder_minutes, seed=options.seed + 1
    )
    train_autoencoder.balance_channels(vae, seed=options.seed + 2)
    shift, scale = train_autoencoder.measure_latents(vae, seed=options.seed + 2)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    print(f"autoencoder: shift_factor {shift:.4f}, scaling_factor {scale:.4f}", flush=True)
    return vae


def take_weights(parts: Parts, folder: Path) -> None:
    """Load the transformer, the text encoders and their tokenizers of a model that this script wrote."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    parts.transformer.load_state_dict(
        SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer").state_dict()
    )
    for name, encoder in zip(names, parts.text_encoders, strict=True):
        encoder.load_state_dict(type(encoder).from_pretrained(folder, subfolder=name).state_dict())
    first, second, third = (
        type(tokenizer).from_pretrained(folder, subfolder=name.replace("text_encoder", "tokenizer"))
        for name, tokenizer in zip(names, parts.tokenizers, strict=True)
    )
    parts.tokenizers = (first, second, third)


def make_model(options: argparse.Namespace) -> None:
    """Build, train unless told not to, and save."""
    parts: Parts = build(options.seed)
    if options.untrained:
        print(f"untrained model of {save(parts, options.out) / 1e6:.1f} MB in {options.out}")
        return
    modules = nn.ModuleList([parts.vae, parts.transformer, *parts.text_encoders]).to(options.device)
    if options.autoencoder is None:
        parts.vae = trained_autoencoder(parts.vae, options)
    else:
        parts.vae = AutoencoderKL.from_pretrained(str(options.autoencoder), dtype=torch.float32).to(options.device)
    if options.continue_from is not None:
        take_weights(parts, options.continue_from)
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        dist.init_process_group("gloo")
    shelves = train_transformer.encode_pictures(parts.vae, options.pictures // processes, options.seed + 4 + 100 * rank)
    print(f"{sum(len(shelf.pictures) for shelf in shelves)} pictures encoded", flush=True)

    def checkpoint(step: int) -> None:
        written = save(parts, options.out)
        print(f"transformer: {step} steps done, {written / 1e6:.1f} MB in {options.out}", flush=True)

    train_transformer.train(
        parts,
        shelves,
        steps=options.steps,
        minutes=options.minutes,
        seed=options.seed + 5,
        checkpoint=checkpoint,
        batch_size=options.batch_size,
    )
    modules.to("cpu")
    if processes > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    print(f"trained model of {save(parts, options.out) / 1e6:.1f} MB in {options.out}")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Build and train the demo's tiny Stable Diffusion 3.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; what it holds is replaced")
    parser.add_argument("--untrained", action="store_true", help="write fresh weights at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; more than the free cores is far slower")
    parser.add_argument("--autoencoder", type=Path, help="take this trained autoencoder (a diffusers folder)")
    parser.add_argument(
        "--continue-from", type=Path, help="continue from the transformer and text encoders of this model"
    )
    parser.add_argument("--autoencoder-steps", type=int, default=5000, help="of the autoencoder")
    parser.add_argument("--autoencoder-minutes", type=float, default=30.0, help="limit of the autoencoder")
    parser.add_argument("--pictures", type=int, default=20000, help="how many to encode for the transformer")
    parser.add_argument("--steps", type=int, default=5000, help="of the transformer")
    parser.add_argument("--minutes", type=float, default=60.0, help="limit of the transformer's training")
    parser.add_argument("--batch-size", type=int, default=32, help="of the transformer's training, in each process")
    options = parser.parse_args()
    if min(options.autoencoder_steps, options.steps, options.pictures, options.batch_size) < 1:
        raise SystemExit("make_model.py: steps, pictures and batch size must be at least 1")
    torch.set_num_threads(options.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    make_model(options)


if __name__ == "__main__":
    main()
