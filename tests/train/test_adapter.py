"""The adapter's file: what diffusers makes of it is what the trainer had."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from optimum.quanto import freeze, quantize
from PIL import Image
from safetensors import safe_open

from stages.core.artifact import Manifest
from tests.train.conftest import Made

FILE = "pytorch_lora_weights.safetensors"


def published(made: Made, manifest: Manifest, folder: Path) -> Path:
    folder.mkdir()
    shutil.copyfile(made.store.fetch(manifest.file(FILE)), folder / FILE)
    return folder


def picture(made: Made, manifest: Manifest, name: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(made.store.read_blob(manifest.file(name)))))


def draw(pipeline: StableDiffusion3Pipeline, made: Made, seed: int) -> np.ndarray:
    text, pooled = made.texts["a red square"]
    negative, negative_pooled = made.texts[""]
    image = pipeline(
        prompt_embeds=text[None],
        pooled_prompt_embeds=pooled[None],
        negative_prompt_embeds=negative[None],
        negative_pooled_prompt_embeds=negative_pooled[None],
        width=64,
        height=48,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(seed),
    ).images[0]
    return np.asarray(image)


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto", "bf16"])
@pytest.mark.parametrize("alpha", [None, 16.0, 1.5])
def test_diffusers_draws_the_trainers_picture(
    make: Any, model_folder: Path, tmp_path: Path, alpha: float | None, precision: str
) -> None:
    made = make({(64, 48): 6}, train__learning_rate=0.2, train__lora__rank=4, train__lora__alpha=alpha)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if precision == "bf16":
        made.config = made.changed(train__mixed_precision="bf16")
        made.texts = {caption: (text.to(dtype), pooled.to(dtype)) for caption, (text, pooled) in made.texts.items()}
    else:
        made.config = made.changed(train__base_model_precision=precision)
    manifest = made.run(validation__prompts=["a red square", "a red square"])
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        model_folder,
        torch_dtype=dtype,
        text_encoder=None,
        text_encoder_2=None,
        text_encoder_3=None,
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
    )
    if precision == "int8-quanto":
        quantize(pipeline.transformer, weights="qint8", exclude=["proj_out", "pos_embed.proj"])
        freeze(pipeline.transformer)
    before = draw(pipeline, made, 1)
    pipeline.load_lora_weights(published(made, manifest, tmp_path / "published"))
    after = draw(pipeline, made, 1)

    def difference(one: np.ndarray, other: np.ndarray) -> int:
        return int(np.abs(one.astype(int) - other.astype(int)).max())

    first, last = (picture(made, manifest, f"validation/{step:06d}-1.png") for step in (0, 4))
    assert difference(first, before) <= 1
    assert difference(last, after) <= 1
    assert difference(before, after) > 10, "the adapter does something"
    assert difference(picture(made, manifest, "validation/000004-0.png"), last) > 10, "prompt i is drawn from seed + i"


def test_metadata_names_alpha_and_how_it_was_made(make: Any) -> None:
    made = make({(64, 48): 6}, train__lora__alpha=3.0, train__sigmas__shift="auto", train__objective="x0")
    manifest = made.run(validation__prompts=[], train__lora__exclude_blocks=[0, 1])
    with safe_open(made.store.fetch(manifest.file(FILE)), "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
    lora = json.loads(metadata["lora_adapter_metadata"])
    assert lora == {
        "transformer.r": 4,
        "transformer.lora_alpha": 3,
        "transformer.target_modules": ["to_k", "to_out.0", "to_q", "to_v"],
        "transformer.exclude_modules": r"transformer_blocks\.(0|1)\..*",
    }
    assert metadata["loraline.objective"] == "x0"
    assert metadata["loraline.sigma_shift"] == "auto"
    assert metadata["loraline.train_fingerprint"] == manifest.fingerprint
    assert len(metadata["loraline.base_model_weights"]) == 64
    assert len(names) == 8
    assert all(name.startswith("transformer.transformer_blocks.2.attn.to_") for name in names)


def test_the_same_run_gives_the_same_bytes(make: Any, tmp_path: Path) -> None:
    made = make({(64, 48): 6, (48, 48): 3}, train__lora__dropout=0.2, train__caption_dropout=0.3)
    first = made.run()
    path = made.store.files.absolute(first.path)
    path.unlink()
    again = made.run()
    assert {file.name: file.sha256 for file in again.files} == {file.name: file.sha256 for file in first.files}
    other = made.run(seed=1)
    assert other.file(FILE).sha256 != first.file(FILE).sha256
