"""kill -9 in the middle of every stage, then run it again: the same digests in the end, and no finished unit redone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from stages.config import Config
from stages.pipeline import Node, Pipeline
from tests.pictures import draw_pictures, run_all, small_config
from tests.servers.hub import HubServer

pytestmark = [pytest.mark.slow, pytest.mark.kill]
PICTURES = 48
ROOT = Path(__file__).parent.parent


def command(config: Config, stage: str, folder: Path) -> list[str]:
    path = folder / "config.json"
    path.write_text(config.model_dump_json(), encoding="utf-8")
    return [sys.executable, "-m", "stages.cli", "stage", stage, "--config", str(path), "--events", "json"]


def run(
    config: Config, stage: str, folder: Path, environment: Mapping[str, str] | None = None
) -> list[dict[str, object]]:
    """Runs a stage to its end; its events."""
    answer = subprocess.run(
        command(config, stage, folder),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        timeout=300,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr + answer.stdout
    return [json.loads(line) for line in answer.stdout.splitlines() if line.startswith('{"event"')]


def kill_when(
    config: Config,
    stage: str,
    folder: Path,
    ready: Callable[[], bool],
    environment: Mapping[str, str] | None = None,
) -> None:
    """Starts a stage and ends it by SIGKILL as soon as `ready`; it must not have finished before."""
    process = subprocess.Popen(
        command(config, stage, folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 240
        while not ready():
            assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(0.002)
    finally:
        # The whole group: a machine that dies takes the worker processes with it.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def memos(folder: Path, stage: str) -> dict[str, int]:
    """The finished units of a stage and when each was written."""
    found = (folder / "store" / "memo" / stage).glob("*.json")
    return {path.name: path.stat().st_mtime_ns for path in found if not path.name.startswith("source-")}


def finished_units(folder: Path, stage: str) -> dict[str, int]:
    return {name: time_ns for name, time_ns in memos(folder, stage).items() if len(name) == 64 + len(".json")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digest of each artifact of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return run_all(config_for(folder, draw_pictures(folder / "images", PICTURES)))


def config_for(folder: Path, images: Path) -> Config:
    return small_config(folder, images, latents={"batch_size": 1}, embeds={"batch_size": 1}, train={"steps": 12})


def digests(config: Config) -> dict[str, str]:
    pipeline = Pipeline.open(config)
    return {node.label: made.digest() for node in pipeline.order if (made := pipeline.last(node)) is not None}


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disturbed")
    draw_pictures(folder / "images", PICTURES)
    return folder


@pytest.mark.parametrize("stage", ["download", "bucket", "latents", "embeds"])
def test_a_killed_map_stage_goes_on_where_it_was(disturbed: Path, undisturbed: dict[str, str], stage: str) -> None:
    config = config_for(disturbed, disturbed / "images")
    kill_when(config, stage, disturbed, lambda: len(finished_units(disturbed, stage)) >= 2)
    before = finished_units(disturbed, stage)
    node = Pipeline.open(config).nodes_of(stage)[0]
    assert Pipeline.open(config).last(node) is None, "killed too late: the manifest was there"
    events = run(config, stage, disturbed)
    after = finished_units(disturbed, stage)
    assert {name: after[name] for name in before} == before, "a finished unit was written again"
    kept = [str(event["text"]) for event in events if "finished before and are kept" in str(event.get("text"))]
    assert kept == [f"{len(before)} of {len(after)} shards were finished before and are kept"]
    assert digests(config)[node.label] == undisturbed[node.label]


def test_a_killed_training_goes_on_from_its_checkpoint(disturbed: Path, undisturbed: dict[str, str]) -> None:
    config = config_for(disturbed, disturbed / "images")
    runs = disturbed / "store" / "runs"
    kill_when(config, "train", disturbed, lambda: any(runs.glob("train-*/checkpoints/*/checkpoint.json")))
    assert Pipeline.open(config).last(Node("train")) is None
    events = run(config, "train", disturbed)
    steps = [event["step"] for event in events if event["event"] == "Metric"]
    assert min(int(str(step)) for step in steps) > 2, "began again from the first step"
    assert digests(config)["train"] == undisturbed["train"]


def test_a_killed_upload_is_made_once(disturbed: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        environment = hub.environment("write")
        publish = {"target": "hub", "repo": "user/blots-lora"}
        config = small_config(
            disturbed,
            disturbed / "images",
            latents={"batch_size": 1},
            embeds={"batch_size": 1},
            train={"steps": 12},
            publish={**publish, "path": None},
        )
        held = hub.hold("POST", "/commit/")
        kill_when(config, "publish", disturbed, held.reached.is_set, environment)
        held.release.set()
        run(config, "publish", disturbed, environment)
        run(config, "publish", disturbed, environment)
        files = hub.files("user/blots-lora")
        assert "pytorch_lora_weights.safetensors" in files
        titles = [commit.title for commit in hub.commits("user/blots-lora")]
        assert len(titles) == 2, titles  # the repository's own first one, and ours
