"""A finished run in a store, made through the real types but without any model: small drawings, invented curves."""

from __future__ import annotations

import io
import json
import math
import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from stages.config import Config
from stages.core.artifact import Blob, Manifest, NamedFile, Refusal, Shard
from stages.core.fingerprint import digest_bytes, digest_of
from stages.core.shard import ShardWriter
from stages.core.stage import Need, Stage
from stages.core.store import Store, StoreSection
from stages.pipeline import Pipeline
from stages.report.build import RunRecord

SIZES = ((96, 96), (112, 80), (80, 112), (128, 72))
COLOURS = {"red": "#d8433b", "green": "#3a9d5d", "blue": "#3b6fd8", "yellow": "#e3b62f", "violet": "#8a4fc9"}
GROUNDS = {"white": "#f4f2ec", "black": "#20222a", "grey": "#9aa0a8", "sand": "#dcc9a3"}
NEEDS: dict[str, tuple[Need, ...]] = {
    "download": (),
    "bucket": (Need("download", "pixels"),),
    "latents": (Need("bucket"),),
    "embeds": (Need("download", "captions"),),
    "train": (Need("download", "pairs"), Need("latents"), Need("embeds")),
    "publish": (Need("train"),),
}
SECONDS = {"download": 2.4, "bucket": 4.1, "latents": 11.8, "embeds": 7.2, "train": 141.0, "publish": 0.6}


class Standing(Stage):
    """A stage of the graph that is never run here."""

    def __init__(self, name: str) -> None:
        self.name, self.needs = name, NEEDS[name]
        self.per_dataset = name in ("download", "bucket", "latents")
        self.version = 1

    def settings(self, setting: Any) -> dict[str, Any]:
        return {}

    def run(self, context: Any, inputs: Any) -> Any:
        raise AssertionError("nothing runs in the report's tests")


@dataclass
class Run:
    """A run: the pipeline over its store, and what became of each node."""

    pipeline: Pipeline
    records: list[RunRecord]
    captions: dict[str, str] = field(default_factory=dict)

    def record(self, label: str) -> RunRecord:
        return next(record for record in self.records if record.label == label)

    def replaced(self, *changed: RunRecord) -> list[RunRecord]:
        by_label = {record.label: record for record in changed}
        return [by_label.get(record.label, record) for record in self.records]


class StoreBuilder:
    """Writes artifacts as the stages would: shards of samples, sidecars, files, and a manifest last."""

    def __init__(self, store: Store, scratch: Path) -> None:
        self.store, self.scratch = store, scratch

    def shard(
        self,
        name: str,
        samples: dict[str, dict[str, bytes]],
        bucket: tuple[int, int] | None = None,
        sidecars: dict[str, Blob] | None = None,
    ) -> Shard:
        path = self.scratch / f"{name}.tar"
        with ShardWriter(path) as writer:
            for key, members in samples.items():
                writer.write(key, members)
        blob = self.store.put_file(path)
        return Shard(**blob.model_dump(), name=name, samples=len(samples), bucket=bucket, sidecars=sidecars or {})

    def file(self, name: str, data: bytes) -> NamedFile:
        return NamedFile(**self.store.put_bytes(data, Path(name).suffix).model_dump(), name=name)

    def commit(self, stage: str, dataset: str | None, clock: float, **parts: Any) -> Manifest:
        minute, second = divmod(int(clock), 60)
        manifest = Manifest(
            stage=stage,
            dataset=dataset,
            fingerprint=digest_of([stage, dataset, str(self.store.url)]),
            stage_version=1,
            inputs={f"{need.stage}.{need.facet}": digest_of([need]) for need in NEEDS[stage]},
            versions={"python": "3.11.9", "loraline": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1"},
            created_at=f"2026-03-14T09:{minute:02d}:{second:02d}+00:00",
            duration_s=SECONDS[stage],
            code_revision="5f0c2a9d41c7b6e3f8a0d1b2c3e4f5061728394a",
            **parts,
        )
        return self.store.commit(manifest)


@cache
def drawing(size: tuple[int, int], seed: int) -> tuple[bytes, str]:
    """A ring on a ground as PNG bytes, and its caption."""
    chance = random.Random(seed)
    colour, ground = chance.choice(list(COLOURS)), chance.choice(list(GROUNDS))
    scale = 3
    picture = Image.new("RGB", (size[0] * scale, size[1] * scale), GROUNDS[ground])
    pen = ImageDraw.Draw(picture)
    radius = chance.uniform(0.22, 0.36) * min(picture.size)
    x, y = (chance.uniform(0.4, 0.6) * edge for edge in picture.size)
    for part, paint in ((1.0, COLOURS[colour]), (0.62, GROUNDS[ground]), (0.3, COLOURS[colour])):
        pen.ellipse([x - radius * part, y - radius * part, x + radius * part, y + radius * part], fill=paint)
    buffer = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue(), f"a {colour} zorbel ring on a {ground} ground"


def make_run(folder: Path, images: int = 60, hostile: bool = False, steps: int = 300, big: int = 1) -> Run:
    """A run over `images` drawings.

    Args:
        hostile: captions, names, reasons and prompts that try to break out of the page.
        big: pictures are this many times larger than they need be.
    """
    config = Config.model_validate(
        {
            "name": "zorbel-rings",
            "seed": 7,
            "store": {"url": str(folder / "store"), "cache_dir": str(folder / "cache")},
            "model": {"pretrained_model_name_or_path": "examples/demo/tiny-sd3"},
            "datasets": [{"id": "rings", "source": {"type": "local", "path": "examples/demo/rings"}}],
            "bucket": {"resolution": 0.009, "crop_aspect": "preserve"},
            "train": {"steps": steps},
            "publish": {"target": "folder", "path": "out/zorbel-rings"},
        }
    )
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    store = Store(StoreSection(url=config.store.url, cache_dir=config.store.cache_dir))
    builder = StoreBuilder(store, scratch)
    pipeline = Pipeline(config, store, [Standing(name) for name in NEEDS])
    chance = random.Random(3)
    attack = "<script>alert('caption')</script><img src=\"http://evil.example/x.png\" onerror=x>\u202e\x07"
    captions: dict[str, str] = {}
    raw: dict[str, dict[str, bytes]] = {}
    crops: dict[tuple[int, int], dict[str, dict[str, bytes]]] = {}
    for index in range(images):
        size = SIZES[min(int(chance.expovariate(1.1)), len(SIZES) - 1)]
        size = (size[0] * big, size[1] * big)
        data, caption = drawing(size, seed=index % 60)
        key = f"ring-{index:04d}-{digest_bytes(str(index).encode())[:10]}"
        captions[key] = attack if hostile and index % 3 == 0 else caption
        raw[key] = {"png": data, "txt": captions[key].encode(), "json": b"{}"}
        crops.setdefault(size, {})[key] = {"png": data, "json": json.dumps({"key": key, "bucket": size}).encode()}
    lines = "".join(json.dumps({"key": key, "caption": caption}) + "\n" for key, caption in captions.items())
    listed = store.put_bytes(lines.encode(), ".jsonl")
    refused = [
        Refusal(name="sub/broken-header.jpg", reason="cannot be decoded: file is truncated (12 bytes not processed)"),
        Refusal(name="sub/empty.png", reason="cannot be decoded: file is truncated (4 bytes not processed)"),
        Refusal(name="no-words.jpg", reason="no caption: no-words.txt is missing"),
    ]
    if hostile:
        refused.append(Refusal(name="<b onclick=x>\"'.png", reason="</li><script src=//evil.example></script>"))
    manifests = {
        "download": builder.commit(
            "download",
            "rings",
            3,
            shards=[builder.shard("raw-0000", raw, sidecars={"captions": listed})],
            counts={"images": images, "refused": len(refused), "distinct_captions": len(set(captions.values()))},
            refused=refused,
            facets={"pixels": digest_of([1]), "captions": digest_of([2]), "pairs": digest_of([3])},
            spec={"from": {"type": "local", "path": "examples/demo/rings"}, "caption_strategy": "textfile"},
        ),
    }
    cropped = [builder.shard(f"raw-0000-{w}x{h}", samples, bucket=(w, h)) for (w, h), samples in sorted(crops.items())]
    manifests["bucket"] = builder.commit(
        "bucket",
        "rings",
        7,
        shards=cropped,
        counts={"images": images},
        spec=config.bucket.model_dump(),
        info={"alignment": 16},
    )
    latents = [
        builder.shard(
            shard.name, {key: {"safetensors": b"\0" * 64} for key in crops[shard.bucket or (0, 0)]}, shard.bucket
        )
        for shard in cropped
    ]
    manifests["latents"] = builder.commit(
        "latents", "rings", 19, shards=latents, counts={"images": images}, spec={"dtype": "fp32", "posterior": "mode"}
    )
    embedded = {digest_bytes(text.encode()): {"safetensors": b"\0" * 64} for text in {*captions.values(), ""}}
    manifests["embeds"] = builder.commit(
        "embeds",
        None,
        15,
        shards=[builder.shard("embeds-0000", embedded)],
        counts={"captions": len(embedded)},
        spec={"t5_length": 256, "t5_padding": "unmodified"},
    )
    manifests["train"] = _train(builder, config, hostile, attack, steps, big)
    manifests["publish"] = builder.commit(
        "publish",
        None,
        161,
        counts={"files": 9},
        spec={"target": "hub", "repo": "someone/zorbel-rings"},
        info={
            "target": "hub",
            "repo": "someone/zorbel-rings",
            "commit": "0a1b2c3d4e5f60718293a4b5c6d7e8f901234567",
            "url": "https://hub.example/someone/zorbel-rings",
        },
    )
    records = []
    for node in pipeline.order:
        reason = {"bucket": "resolution 0.008 -> 0.009 MP", "download": "unchanged", "publish": "train changed"}
        action = "reused" if node.stage == "download" else "ran"
        seconds = 0.0 if action == "reused" else SECONDS[node.stage]
        text = reason.get(node.stage, "first run")
        records.append(RunRecord(node.label, action, text, seconds, manifests[node.stage]))
    return Run(pipeline, records, captions)


def _train(builder: StoreBuilder, config: Config, hostile: bool, attack: str, steps: int, big: int) -> Manifest:
    chance = random.Random(11)
    log = [
        {
            "step": step,
            "loss": round((0.25 + 0.45 * math.exp(-step / 90)) * chance.lognormvariate(0, 0.35), 6),
            "lr": 1e-4 * min(1.0, step / 20),
            "grad_norm": round(0.2 + 0.6 * math.exp(-step / 60) * chance.uniform(0.7, 1.4), 5),
        }
        for step in range(1, steps + 1)
    ]
    rounds = [
        {
            "step": step,
            "loss": round(0.26 + 0.36 * math.exp(-step / 80), 5),
            "by_sigma": {
                str(sigma): round(0.1 + 0.3 * (sigma - 0.4) ** 2 + 0.4 * math.exp(-step / 80), 5)
                for sigma in (0.125, 0.375, 0.625, 0.875)
            },
        }
        for step in range(0, steps + 1, steps // 6)
    ]
    files = [
        builder.file("pytorch_lora_weights.safetensors", b"\0" * 5000),
        builder.file("train.jsonl", "".join(json.dumps(line) + "\n" for line in log).encode()),
        builder.file("evaluation.json", json.dumps({"held_out": [{}] * 10, "rounds": rounds}).encode()),
    ]
    prompts = ["a red zorbel ring on a white ground", "a blue zorbel ring on a sand ground", "a zorbel ring at night"]
    if hostile:
        prompts[0] = attack
    pictures = []
    for index, prompt in enumerate(prompts):
        for step in range(0, steps + 1, steps // 3):
            data, _ = drawing((96 * big, 96 * big), seed=900 + index + (0 if step else 50))
            name = f"validation/{step}-{index}.png"
            files.append(builder.file(name, data))
            pictures.append({"step": step, "index": index, "prompt": prompt, "file": name})
    return builder.commit(
        "train",
        None,
        160,
        files=files,
        counts={"steps": steps, "samples": 4 * steps},
        spec=config.train.model_dump(),
        info={
            "pictures": pictures,
            "base_layers": [
                {"layers": "attn.to_q", "count": 8, "level": "int8-quanto", "parameters": 524_288, "bytes": 530_432},
                {"layers": "proj_out", "count": 1, "level": "no_change", "parameters": 16_448, "bytes": 32_896},
            ],
            "adapter_parameters": 294_912,
            "epochs": 5.607,
            "device": "cpu",
            "peak_rss_mb": 812.4,
        },
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in which everything went well."""
    return make_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose captions, prompts, names and reasons are attacks on the page."""
    return make_run(tmp_path_factory.mktemp("hostile"), images=24, hostile=True)
