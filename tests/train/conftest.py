"""Inputs of the train stage, written through the real store: random latents and text embeddings of a small model.

The tiny model here is made on the spot (its weights are random), so that these tests are about training alone.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from stages.config import Config
from stages.core.artifact import KEYS, Blob, Manifest, Output, Shard
from stages.core.events import Recorder
from stages.core.preemption import StopFlag
from stages.core.runner import Job, execute
from stages.core.shard import ShardWriter
from stages.core.stage import Inputs, Setting
from stages.core.store import Store
from stages.train.stage import TrainStage

CLIP, T5, CLIP_WIDTH, T5_WIDTH, POOLED = 3, 5, 24, 32, 24


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 3 in the diffusers layout, small and random. Without text encoders: training reads none."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    for name, part in transformer.named_parameters():
        if name.endswith("proj_out.weight") or "norm1" in name:
            torch.nn.init.normal_(part, std=0.05)
    transformer.save_pretrained(folder / "transformer")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Made:
    """What the fixture's factory made: a way to run the stage, and the tensors that it will read."""

    store: Store
    config: Config
    inputs: Inputs
    latents: dict[str, torch.Tensor]
    texts: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """(L, D) and (D,) by caption, as encode_prompt would give them."""
    captions: dict[str, str]

    def job(self, config: Config | None = None) -> Job:
        stage, setting = TrainStage(), Setting(config or self.config, self.store)
        digests = {"download.pairs": "a", "latents.content": "b", "embeds.content": "c"}
        return Job(stage, setting, "train", stage.spec(setting), self.inputs, digests)

    def run(self, recorder: Recorder | None = None, stop: StopFlag | None = None, **changes: Any) -> Manifest:
        job = self.job(self.changed(**changes))
        stage = job.stage
        stage.check(job.setting)
        manifest = execute(job, recorder or Recorder(), stop=stop)
        assert manifest is not None
        return manifest

    def changed(self, **changes: Any) -> Config:
        tree = self.config.model_dump(mode="json")
        for dotted, value in changes.items():
            node, parts = tree, dotted.split("__")
            for part in parts[:-1]:
                node = node[part]
            node[parts[-1]] = value
        return Config.model_validate(tree)


def config_tree(folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "test",
        "store": {"url": f"file://{tmp_path}/store", "cache_dir": f"{tmp_path}/cache"},
        "model": {"pretrained_model_name_or_path": str(folder)},
        "datasets": [{"id": "one", "source": {"type": "local", "path": str(tmp_path)}}],
        "embeds": {"t5_length": T5},
        "train": {
            "steps": 4,
            "train_batch_size": 2,
            "base_model_precision": "no_change",
            "mixed_precision": "no",
            "gradient_checkpointing": False,
            "learning_rate": 1e-3,
            "lora": {"rank": 4},
            "evaluation": {"every": 2, "max_samples": 2, "share": 0.1, "sigmas": 2},
            "caption_dropout": 0.0,
        },
        "validation": {
            "prompts": ["a red square"],
            "inference_steps": 2,
            "width": 64,
            "height": 48,
            "every": 2,
        },
        "publish": {"path": str(tmp_path / "published")},
    }


@pytest.fixture
def make(model_folder: Path, tmp_path: Path) -> Any:
    """A factory of inputs: `make({(64, 48): 5, (48, 48): 4})` gives so many samples in each bucket, two to a shard."""

    def factory(buckets: dict[tuple[int, int], int], per_shard: int = 3, t5_stored: int = T5, **changes: Any) -> Made:
        config = Config.model_validate(config_tree(model_folder, tmp_path))
        store = Store(config.store)
        generator = torch.Generator().manual_seed(1)
        latents: dict[str, torch.Tensor] = {}
        captions: dict[str, str] = {}
        lines, shards = [], []
        for (width, height), count in buckets.items():
            keys = [f"{width}x{height}_{number}-0123456789" for number in range(count)]
            for start in range(0, count, per_shard):
                path = tmp_path / "shard.tar"
                with ShardWriter(path) as writer:
                    for key in keys[start : start + per_shard]:
                        latents[key] = torch.randn(16, height // 8, width // 8, generator=generator)
                        captions[key] = f"picture {key}"
                        writer.write(
                            key, {"safetensors": safetensors.torch.save({"latents": latents[key]}), "json": b"{}"}
                        )
                        lines.append(
                            {
                                "key": key,
                                "caption": captions[key],
                                "caption_sha256": digest(captions[key]),
                                "image_sha256": digest(f"image {key}"),
                            }
                        )
                blob = store.put_file(path, ".tar")
                shards.append(
                    Shard(
                        **blob.model_dump(),
                        name=f"{width}x{height}-{start:05d}",
                        samples=writer.samples,
                        bucket=(width, height),
                        sidecars={KEYS: listed(store, writer)},
                    )
                )
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        raw = store.put_bytes(b"raw", ".tar")
        raw_shard = Shard(
            **raw.model_dump(), name="raw", samples=len(lines), sidecars={"captions": store.put_bytes(text, ".jsonl")}
        )
        texts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        path = tmp_path / "embeds.tar"
        with ShardWriter(path) as writer:
            for caption in dict.fromkeys(["", "a red square", "a blue circle", *captions.values()]):
                clip = torch.randn(CLIP, CLIP_WIDTH, generator=generator)
                t5 = torch.randn(t5_stored, T5_WIDTH, generator=generator)
                pooled = torch.randn(POOLED, generator=generator)
                stored = {"clip": clip, "t5": t5, "pooled": pooled}
                writer.write(digest(caption), {"safetensors": safetensors.torch.save(stored), "json": b"{}"})
                tokens = torch.zeros(CLIP + T5, T5_WIDTH)
                tokens[:CLIP, :CLIP_WIDTH], tokens[CLIP : CLIP + t5_stored] = clip, t5
                texts[caption] = (tokens, pooled)
        blob = store.put_file(path, ".tar")
        embeds_shard = Shard(
            **blob.model_dump(), name="embeds", samples=writer.samples, sidecars={KEYS: listed(store, writer)}
        )
        inputs = Inputs(
            {
                ("download", "one"): manifest("download", [raw_shard]),
                ("latents", "one"): manifest("latents", shards),
                ("embeds", None): manifest("embeds", [embeds_shard]),
            }
        )
        made = Made(store, config, inputs, latents, texts, captions)
        made.config = made.changed(**changes)
        return made

    return factory


def listed(store: Store, writer: ShardWriter) -> Blob:
    """The sidecar that names a shard's samples, as the stages write it."""
    return store.put_bytes("".join(f"{key}\n" for key in writer.keys).encode(), ".txt")


def manifest(stage: str, shards: list[Shard]) -> Manifest:
    output = Output(shards=shards)
    return Manifest(stage=stage, fingerprint="0" * 64, stage_version=1, spec={}, inputs={}, shards=output.shards)
