"""What the stages that encode are tested on: configurations, cropped shards and lists of captions in a real store."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stages.config import Config
from stages.core.artifact import Manifest, Shard
from stages.core.config import validate
from stages.core.events import Recorder
from stages.core.fingerprint import canonical_json, digest_bytes
from stages.core.runner import Job, execute
from stages.core.shard import ShardWriter
from stages.core.stage import Inputs, Setting, Stage
from stages.core.store import Store


def make_config(folder: Path, model: Path | str, **sections: Any) -> Config:
    """A whole configuration over a store in `folder`; `sections` replace what stands here."""
    tree: dict[str, Any] = {
        "name": "test",
        "store": {"url": str(folder / "store"), "cache_dir": str(folder / "cache")},
        "model": {"pretrained_model_name_or_path": str(model)},
        "datasets": [{"id": "pictures", "source": {"type": "local", "path": "unused"}}],
        "publish": {"path": "unused"},
    }
    return validate(Config, {**tree, **sections})


def run(stage: Stage, config: Config, inputs: Mapping[tuple[str, str | None], Manifest]) -> tuple[Manifest, Recorder]:
    """Runs a stage as the pipeline does: fingerprint, memos, manifest."""
    store = Store(config.store)
    setting = Setting(config, store, config.datasets[0] if stage.per_dataset else None)
    digests = {f"{name}[{dataset}]": manifest.digest() for (name, dataset), manifest in inputs.items()}
    job = Job(stage, setting, stage.name, stage.spec(setting), Inputs(inputs), digests)
    recorder = Recorder()
    manifest = execute(job, recorder)
    assert manifest is not None
    return manifest, recorder


def pixels(seed: int, width: int, height: int) -> np.ndarray:
    """A picture (H, W, 3) uint8: a gradient with noise, different for every seed."""
    generator = np.random.default_rng(seed)
    ramp_HW = np.linspace(0, 200, width)[None, :] * np.linspace(0.2, 1, height)[:, None]
    noise_HWC = generator.integers(0, 56, (height, width, 3))
    return (ramp_HW[:, :, None] + noise_HWC).astype(np.uint8)


def png(pixels_HWC: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "PNG", compress_level=1)
    return file.getvalue()


def cropped_shard(store: Store, folder: Path, name: str, seeds: Sequence[int], width: int, height: int) -> Shard:
    """A cropped shard as the bucket stage writes it, one picture for each seed."""
    path = folder / f"{name}.tar"
    with ShardWriter(path) as writer:
        for seed in seeds:
            geometry = {
                "key": f"sample-{seed:04}",
                "image_sha256": digest_bytes(f"picture {seed}".encode()),
                "original_size": [width + 9, height + 5],
                "resized_size": [width + 2, height],
                "crop": [1, 0, width, height],
                "bucket": [width, height],
            }
            writer.write(
                geometry["key"],
                {"png": png(pixels(seed, width, height)), "json": canonical_json(geometry).encode()},
            )
    blob = store.put_file(path, ".tar")
    path.unlink()
    return Shard(**blob.model_dump(), name=name, samples=len(seeds), bucket=(width, height))


def bucket_manifest(shards: Sequence[Shard]) -> Manifest:
    return Manifest(
        stage="bucket",
        dataset="pictures",
        fingerprint="0" * 64,
        stage_version=1,
        spec={},
        inputs={},
        shards=list(shards),
    )


def raw_shard(store: Store, folder: Path, name: str, captions: Sequence[str]) -> Shard:
    """A raw shard with its list of captions, as the download stage leaves it; the images are left out."""
    lines = []
    path = folder / f"{name}.tar"
    with ShardWriter(path) as writer:
        for index, caption in enumerate(captions):
            key = f"{name}-{index:04}"
            writer.write(key, {"txt": caption.encode()})
            record = {
                "key": key,
                "caption": caption,
                "caption_sha256": digest_bytes(caption.encode()),
                "image_sha256": digest_bytes(key.encode()),
            }
            lines.append(json.dumps(record))
    blob = store.put_file(path, ".tar")
    path.unlink()
    sidecar = store.put_bytes("".join(f"{line}\n" for line in lines).encode(), ".jsonl")
    return Shard(**blob.model_dump(), name=name, samples=len(captions), sidecars={"captions": sidecar})


def download_manifest(shards: Sequence[Shard], dataset: str = "pictures") -> Manifest:
    captions = sorted(shard.sidecars["captions"].sha256 for shard in shards)
    return Manifest(
        stage="download",
        dataset=dataset,
        fingerprint="0" * 64,
        stage_version=1,
        spec={},
        inputs={},
        shards=list(shards),
        facets={"captions": digest_bytes(" ".join(captions).encode())},
    )
