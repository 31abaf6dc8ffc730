"""Training against plain PyTorch, diffusers and PEFT: the same samples, noise and noise levels, nothing more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from optimum.quanto import freeze, quantize
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from stages.train.draws import seed_for
from stages.train.order import Order, ShardRows
from tests.train.conftest import Made

BUCKETS = {(64, 48): 5, (48, 48): 4}


def records(made: Made, manifest: Any) -> list[dict[str, float]]:
    text = made.store.read_blob(manifest.file("train.jsonl"))
    return [json.loads(line) for line in text.splitlines()]


def adapter_of(made: Made, manifest: Any) -> dict[str, torch.Tensor]:
    return load_file(made.store.fetch(manifest.file("pytorch_lora_weights.safetensors")))


def reference_loss(
    model: SD3Transformer2DModel, made: Made, keys: list[str], number: int, objective: str, drop: bool = False
) -> torch.Tensor:
    """The paper's loss by hand: x_s = (1 - s) x + s e, target e - x, mean square; s logit-normal, shifted by 3."""
    x = torch.stack([made.latents[key] for key in keys])
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed_for(0, "noise", number)))
    normal = np.random.Generator(np.random.PCG64(seed_for(0, "sigmas", number))).normal(0.0, 1.0, len(keys))
    u = torch.sigmoid(torch.from_numpy(normal)).float()
    s = (3 * u / (1 + 2 * u)).view(-1, 1, 1, 1)
    texts = [made.texts["" if drop else made.captions[key]] for key in keys]
    v = model(
        hidden_states=(1 - s) * x + s * e,
        encoder_hidden_states=torch.stack([text for text, _ in texts]),
        pooled_projections=torch.stack([pooled for _, pooled in texts]),
        timestep=1000 * s.flatten(),
    ).sample
    error = (v - (e - x)) ** 2
    if objective == "x0":
        error = error * s**2
    return error.mean()


def training_rows(made: Made) -> tuple[list[ShardRows], list[list[str]]]:
    """Shards and their keys when nothing is held out, read with webdataset's rule by hand."""
    from stages.core.shard import read_shard

    shards, keys = [], []
    for shard in sorted(made.inputs.one("latents").shards, key=lambda shard: shard.sha256):
        keys.append([key for key, _ in read_shard(made.store.fetch(shard))])
        assert shard.bucket is not None
        shards.append(ShardRows(shard.bucket, range(len(keys[-1]))))
    return shards, keys


@pytest.mark.parametrize("objective", ["velocity", "x0"])
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_first_loss_is_the_papers(make: Any, model_folder: Path, objective: str, dropout: float) -> None:
    made = make(
        BUCKETS,
        train__evaluation__share=0.0,
        train__objective=objective,
        train__caption_dropout=dropout,
        train__steps=1,
    )
    manifest = made.run(validation__prompts=[])
    shards, keys = training_rows(made)
    refs = Order(shards, 2, 64, 0).batch(0)
    model = SD3Transformer2DModel.from_pretrained(model_folder / "transformer")
    with torch.no_grad():
        expected = reference_loss(model, made, [keys[shard][row] for shard, row in refs], 0, objective, dropout == 1.0)
    assert records(made, manifest)[0]["loss"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_three_steps_equal_a_plain_loop(make: Any, model_folder: Path, precision: str, checkpointing: bool) -> None:
    made = make(BUCKETS, train__evaluation__share=0.0, train__steps=3, train__gradient_accumulation_steps=2)
    changes = {
        "train__base_model_precision": precision,
        "train__gradient_checkpointing": checkpointing,
        "train__max_grad_norm": 0.05,
        "train__lora__alpha": 8.0,
        "train__lora__exclude_blocks": [1],
        "train__lr_scheduler": "cosine",
    }
    manifest = made.run(validation__prompts=[], **changes)

    model = SD3Transformer2DModel.from_pretrained(model_folder / "transformer")
    if precision == "int8-quanto":
        quantize(model, weights="qint8", exclude=["proj_out", "pos_embed.proj"])
        freeze(model)
    model.requires_grad_(False)
    torch.manual_seed(seed_for(0, "adapter"))
    names = [f"transformer_blocks.{block}.attn" for block in (0, 2)] + ["transformer_blocks.0.attn2"]
    targets = [f"{name}.{part}" for name in names for part in ("to_q", "to_k", "to_v", "to_out.0")]
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=True))
    parameters = [part for part in model.parameters() if part.requires_grad]
    assert len(parameters) == 24
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    shards, keys = training_rows(made)
    order = Order(shards, 2, 64, 0)
    for step in range(3):
        optimiser.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + np.cos(np.pi * step / 3))
        total = 0.0
        for part in range(2):
            number = 2 * step + part
            batch = [keys[shard][row] for shard, row in order.batch(number)]
            loss = reference_loss(model, made, batch, number, "velocity") / 2
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.05)
        optimiser.step()
        optimiser.zero_grad()
        record = records(made, manifest)[step]
        assert record["loss"] == pytest.approx(total, rel=1e-5)
        assert record["grad_norm"] == pytest.approx(float(norm), rel=1e-4)

    trained = adapter_of(made, manifest)
    expected = {f"transformer.{name}": part for name, part in get_peft_model_state_dict(model).items()}
    assert set(trained) == set(expected)
    moved = 0
    for name, part in expected.items():
        torch.testing.assert_close(trained[name], part, rtol=1e-3, atol=2e-6)
        moved += int("lora_B" in name and part.abs().max() > 1e-4)
    assert moved == 12


def test_gradient_checkpointing_changes_nothing(make: Any) -> None:
    made = make(BUCKETS, train__steps=2)
    plain = made.run(train__gradient_checkpointing=False)
    again = made.job(made.changed(train__gradient_checkpointing=True))
    assert again.lookup() == plain, "it is no part of the fingerprint"


def test_bf16_is_near_fp32(make: Any) -> None:
    made = make(BUCKETS, train__steps=3, train__evaluation__share=0.0)
    exact = records(made, made.run(validation__prompts=[]))
    for precision in ("no_change", "int8-quanto", "int4-quanto"):
        rounded = records(
            made,
            made.run(train__mixed_precision="bf16", train__base_model_precision=precision),
        )
        for one, other in zip(exact, rounded, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=0.03)
            assert other["loss"] != one["loss"]
