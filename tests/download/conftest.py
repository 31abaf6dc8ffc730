"""Small sources, and a way to run the download stage on them without the other stages."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages.config import Config
from stages.core.artifact import Manifest
from stages.core.events import Recorder
from stages.core.runner import Job, execute, memo_path
from stages.core.shard import read_shard
from stages.core.stage import Context, Inputs, Setting
from stages.core.store import Store
from stages.download.stage import DownloadStage
from tests.servers.hub import HubServer


def image_bytes(seed: int = 0, size: tuple[int, int] = (40, 30), kind: str = "PNG", **options: Any) -> bytes:
    """A picture of its own for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind, **options)
    return data.getvalue()


def fill(folder: Path, count: int, start: int = 0) -> None:
    """Images with captions; every third caption is one that was there before."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        (folder / f"image-{number:03d}.png").write_bytes(image_bytes(number))
        (folder / f"image-{number:03d}.txt").write_text(f"a picture of {number - number % 3}\n")


class Bench:
    """A configuration with one data set, its store, and the download stage."""

    def __init__(
        self, root: Path, source: dict[str, Any] | None = None, dataset: dict[str, Any] | None = None, **download: Any
    ) -> None:
        self.root = root
        self.photos = root / "photos"
        tree = {
            "name": "test",
            "store": {"url": str(root / "store"), "cache_dir": str(root / "cache")},
            "model": {"pretrained_model_name_or_path": "nowhere"},
            "datasets": [
                {"id": "photos", "source": source or {"type": "local", "path": str(self.photos)}, **(dataset or {})}
            ],
            "download": {"shard_samples": 4, "processes": 1, **download},
            "publish": {"path": str(root / "out")},
        }
        self.config = Config.model_validate(tree)
        self.store = Store(self.config.store)
        self.stage = DownloadStage()
        self.setting = Setting(self.config, self.store, self.config.datasets[0])
        self.recorder = Recorder()

    def spec(self) -> dict[str, Any]:
        return self.stage.spec(self.setting)

    def job(self) -> Job:
        return Job(self.stage, self.setting, "download[photos]", self.spec(), Inputs({}), {})

    def run(self, **options: Any) -> Manifest:
        self.recorder = Recorder()
        manifest = execute(self.job(), self.recorder, **options)
        assert manifest is not None
        return manifest

    def context(self, scratch: Path) -> Context:
        job = self.job()
        return Context(self.setting, job.label, job.spec, job.fingerprint, self.recorder, scratch)

    def finished_units(self, scratch: Path) -> list[str]:
        """Names of the units of the present state that need no work."""
        context = self.context(scratch)
        units = self.stage.units(context, Inputs({}))
        paths = {unit.name: memo_path(self.stage, context.spec, unit) for unit in units}
        return [name for name, path in paths.items() if self.store.get_json(path) is not None]

    def samples(self, manifest: Manifest) -> dict[str, dict[str, bytes]]:
        """All samples by their source path."""
        found = {}
        for shard in manifest.shards:
            for key, members in read_shard(self.store.fetch(shard)):
                found[json.loads(members["json"])["path"]] = {"key": key.encode(), **members}
        return found

    def captions(self, manifest: Manifest) -> list[dict[str, str]]:
        """The lines of all caption sidecars."""
        texts = [self.store.read_blob(shard.sidecars["captions"]).decode() for shard in manifest.shards]
        return [json.loads(line) for text in texts for line in text.splitlines()]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    fill(bench.photos, 10)
    return bench


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on loopback with small pages; the environment leads the client to it, without a token."""
    monkeypatch.setattr("stages.core.hub.FIRST_PAUSE_S", 0.01)
    with HubServer(tmp_path / "hub", tree_page_size=7) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN")
        yield server
