"""A finished training in a store, without training: what publish reads, and a test Hub to publish to."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stages.config import Config
from stages.core.artifact import Manifest, NamedFile
from stages.core.events import Recorder
from stages.core.runner import Job, execute
from stages.core.stage import Inputs, Setting
from stages.core.store import Store
from stages.publish.stage import PublishStage
from tests.servers.hub import HubServer

ADAPTER = "pytorch_lora_weights.safetensors"


def picture(colour: str, index: int = 0) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (16, 16 + index), colour).save(data, "PNG")
    return data.getvalue()


@dataclass
class Bench:
    """A store with the manifests of all stages before publish, and a configuration."""

    root: Path
    config: Config
    store: Store
    manifests: dict[tuple[str, str | None], Manifest]

    @property
    def stage(self) -> PublishStage:
        return PublishStage()

    @property
    def setting(self) -> Setting:
        return Setting(self.config, self.store)

    def job(self) -> Job:
        digests = {f"{stage}[{dataset}]": manifest.digest() for (stage, dataset), manifest in self.manifests.items()}
        stage = self.stage
        return Job(stage, self.setting, "publish", stage.spec(self.setting), Inputs(self.manifests), digests)

    def run(self, force: bool = False) -> Manifest:
        self.recorder = Recorder()
        manifest = execute(self.job(), self.recorder, force=force)
        assert manifest is not None
        return manifest

    def train(self, adapter: bytes = b"adapter " * 500, pictures: bool = True, **more: Any) -> None:
        """(Re)makes what training left."""
        rounds = {"rounds": [{"step": 0, "loss": 1.25}, {"step": 40, "loss": 0.5}]}
        files = {
            ADAPTER: adapter,
            "evaluation.json": json.dumps(rounds).encode(),
            "train.jsonl": b'{"step": 1, "loss": 1.0}\n',
        }
        if pictures:
            for step, colour in ((0, "grey"), (20, "pink"), (40, "red")):
                for index in range(len(self.config.validation.prompts)):
                    files[f"validation/{step:06d}-{index}.png"] = picture(colour, index)
        files.update(more)
        named = [
            NamedFile(**self.store.put_bytes(data, Path(name).suffix).model_dump(), name=name)
            for name, data in files.items()
        ]
        self._add("train", None, files=named, spec={"steps": 40, "model": {"path": str(self.root / "model")}})

    def _add(self, stage: str, dataset: str | None, **fields: Any) -> None:
        fields.setdefault("spec", {})
        self.manifests[stage, dataset] = Manifest(
            stage=stage,
            dataset=dataset,
            fingerprint=f"{stage:x<64}",
            stage_version=1,
            inputs={},
            versions={"torch": "2.13.0", "loraline": "0.1.0"},
            code_revision="abc123",
            created_at="2026-01-01T00:00:00+00:00",
            **fields,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return make_bench(tmp_path, {"target": "folder", "path": str(tmp_path / "out")})


def make_bench(root: Path, publish: dict[str, Any], **sections: Any) -> Bench:
    tree: dict[str, Any] = {
        "name": "ring",
        "store": {"url": str(root / "store"), "cache_dir": str(root / "cache")},
        "model": {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-large"},
        "datasets": [{"id": "photos", "source": {"type": "local", "path": str(root / "photos")}}],
        "validation": {"prompts": ["a red ring", "a blue ring on grass"]},
        "publish": {"trigger": "zring", **publish},
        **sections,
    }
    config = Config.model_validate(tree)
    bench = Bench(root, config, Store(config.store), {})
    source = {"type": "local", "path": str(root / "photos")}
    counts = {"images": 12, "refused": 0, "distinct_captions": 9}
    bench._add("download", "photos", spec={"from": source, "source": {"kind": "local"}}, counts=counts)
    for stage, dataset in (("bucket", "photos"), ("latents", "photos"), ("embeds", None)):
        bench._add(stage, dataset)
    bench.train()
    return bench


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on loopback; the environment leads the client to it, with a token that may write."""
    monkeypatch.setattr("stages.core.hub.FIRST_PAUSE_S", 0.01)
    with HubServer(tmp_path / "hub") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def hub_bench(tmp_path: Path, hub: HubServer) -> Bench:
    return make_bench(tmp_path, {"target": "hub", "repo": "user/ring-lora"})
