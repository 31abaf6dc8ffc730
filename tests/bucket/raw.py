"""A data set of raw shards, as the download stage leaves them, for tests of what comes after it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stages.config import Config
from stages.core.artifact import Output
from stages.core.events import Reporter, Silent
from stages.core.fingerprint import canonical_json, digest_bytes, digest_lines
from stages.core.shard import ShardWriter
from stages.core.stage import Context, Inputs, Setting, Stage
from stages.core.store import Store
from stages.pipeline import Node, Pipeline

Files = Sequence[tuple[str, bytes]]


class RawShards(Stage):
    """Stands in for the download: the files that it was given, `per_shard` in a shard."""

    name = "download"
    version = 1
    per_dataset = True

    def __init__(self, files: Files, per_shard: int = 4) -> None:
        self.files, self.per_shard = list(files), per_shard

    def settings(self, setting: Setting) -> dict[str, Any]:
        return {"files": digest_lines(f"{path} {digest_bytes(data)}" for path, data in self.files)}

    def run(self, context: Context, inputs: Inputs) -> Output:
        shards = []
        for start in range(0, len(self.files), self.per_shard):
            path = context.scratch / f"{start}.tar"
            lines = []
            with ShardWriter(path) as shard:
                for name, data in self.files[start : start + self.per_shard]:
                    key = key_of(name)
                    provenance = {"path": name, "sha256": digest_bytes(data), "bytes": len(data)}
                    extension = name.rpartition(".")[2]
                    members = {extension: data, "txt": b"a thing", "json": canonical_json(provenance).encode()}
                    shard.write(key, members)
                    lines.append(f"{key} {digest_bytes(data)}")
            facets = {"pixels": digest_lines(lines)}
            number = f"{start // self.per_shard:05d}"
            shards.append(context.save_shard(path, number, shard.samples, facets=facets))
        pixels = digest_lines(f"{name} {digest_bytes(data)}" for name, data in self.files)
        return Output(shards=shards, counts={"images": len(self.files)}, facets={"pixels": pixels})


def key_of(path: str) -> str:
    return f"{Path(path).stem}-{hashlib.sha256(path.encode()).hexdigest()[:10]}"


def pipeline(folder: Path, model: Path, files: Files, stages: Sequence[Stage], **bucket: Any) -> Pipeline:
    """A pipeline whose store is in `folder` and whose first stage holds these files."""
    config = Config.model_validate(
        {
            "name": "test",
            "store": {"url": f"file://{folder}/store", "cache_dir": str(folder / "cache")},
            "model": {"pretrained_model_name_or_path": str(model)},
            "datasets": [{"id": "photos", "source": {"type": "local", "path": str(folder)}}],
            "bucket": {"resolution": 0.004, "processes": 1, **bucket},
            "publish": {"target": "folder", "path": str(folder / "out")},
        }
    )
    return Pipeline(config, Store(config.store), [RawShards(files), *stages])


def run(line: Pipeline, reporter: Reporter | None = None) -> Any:
    """Runs download and bucket; returns the bucket manifest."""
    manifests: dict[Node, Any] = {}
    for node in line.order:
        manifests[node] = line.run_node(node, manifests, reporter or Silent())
    return manifests[line.nodes_of("bucket")[0]]


def gradient(width: int, height: int, shift: int = 0) -> Image.Image:
    """A smooth picture in which every place has a colour of its own."""
    x_HW, y_HW = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    third_HW = (x_HW + y_HW + shift) / 2 % 256
    return Image.fromarray(np.stack([x_HW, y_HW, third_HW], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
