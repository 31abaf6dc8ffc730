"""Small captioned pictures and a configuration over them, for tests that run real stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stages.config import Config
from stages.core.artifact import Manifest
from stages.core.events import Recorder
from stages.pipeline import Node, Pipeline

TINY_SD3 = Path(__file__).parent.parent / "examples" / "demo" / "tiny-sd3"
SIZES = ((96, 96), (128, 96), (96, 128))


def draw_pictures(folder: Path, count: int = 12, start: int = 0) -> Path:
    """Smooth coloured PNGs, `count` of them, each with a caption beside it; the same number gives the same picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        width, height = SIZES[number % len(SIZES)]
        rng = np.random.default_rng(number)
        coarse = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / f"picture-{number:03d}.png")
        (folder / f"picture-{number:03d}.txt").write_text(f"a blot of number {number}", encoding="utf-8")
    return folder


def small_config(folder: Path, images: Path, **changes: Any) -> Config:
    """A whole pipeline that takes seconds: the tiny model, a handful of pictures, a few steps.

    Args:
        folder: where store, cache and the published adapter go.
        images: the pictures.
        changes: sections or fields to put over it; mappings are merged one level deep.
    """
    fields: dict[str, Any] = {
        "name": "small",
        "seed": 3,
        "store": {"url": f"file://{folder}/store", "cache_dir": str(folder / "cache")},
        "model": {"pretrained_model_name_or_path": str(TINY_SD3)},
        "datasets": [{"id": "blots", "source": {"type": "local", "path": str(images)}}],
        "download": {"shard_samples": 4, "processes": 1},
        "bucket": {"resolution": 0.004096, "crop_aspect": "preserve", "processes": 1},
        "latents": {"batch_size": 4},
        "embeds": {"t5_length": 16, "dtype": "fp32"},
        "train": {
            "steps": 4,
            "train_batch_size": 2,
            "mixed_precision": "no",
            "gradient_checkpointing": False,
            "lora": {"rank": 4},
            "evaluation": {"every": 2},
            "checkpoint_every": 2,
        },
        "validation": {"prompts": ["a blot"], "inference_steps": 2, "width": 64, "height": 64, "every": 100},
        "publish": {"target": "folder", "path": str(folder / "published")},
    }
    for key, value in changes.items():
        fields[key] = {**fields[key], **value} if isinstance(value, dict) and key in fields else value
    return Config.model_validate(fields)


def run_all(config: Config) -> dict[str, str]:
    """Runs every stage in this process; the artifacts' digests, by label."""
    pipeline = Pipeline.open(config)
    made: dict[Node, Manifest] = {}
    for node in pipeline.order:
        manifest = pipeline.run_node(node, made, Recorder())
        assert manifest is not None
        made[node] = manifest
    return {node.label: manifest.digest() for node, manifest in made.items()}
