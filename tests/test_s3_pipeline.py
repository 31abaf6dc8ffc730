"""All six stages, each alone, over a real S3 server; nothing shared between them but the bucket."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.config import Config
from stages.core.artifact import Shard
from stages.core.store import Store
from stages.pipeline import Pipeline
from stages.registry import STAGES
from tests.pictures import draw_pictures, run_all, small_config
from tests.servers.s3 import S3Server

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


@pytest.fixture
def s3(request: pytest.FixtureRequest) -> S3Server:
    """Ceph where it can be had, else moto: the store's own tests ask both of them everything."""
    server: S3Server
    try:
        server = request.getfixturevalue("ceph")
    except pytest.skip.Exception:
        server = request.getfixturevalue("moto")
    return server.with_new_bucket()


def run_each_stage(config: Config, folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """Every stage in a process of its own, with an empty cache of its own; the artifacts' digests."""
    for number, stage in enumerate(STAGES):
        alone = config.model_copy(
            update={"store": config.store.model_copy(update={"cache_dir": str(folder / f"machine-{number}")})}
        )
        path = folder / f"{stage.name}.json"
        path.write_text(alone.model_dump_json(), encoding="utf-8")
        answer = subprocess.run(
            [sys.executable, "-m", "stages.cli", "stage", stage.name, "--config", str(path), "--events", "json"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
            timeout=300,
            check=False,
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
    pipeline = Pipeline.open(config)
    return {node.label: made.digest() for node in pipeline.order if (made := pipeline.last(node)) is not None}


def test_six_stages_over_s3_make_what_a_folder_makes(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = s3.environment()
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    images = draw_pictures(tmp_path / "images", 8)
    remote = small_config(tmp_path, images, store={"url": f"s3://{s3.bucket}/runs/one"})
    made = run_each_stage(remote, tmp_path, environment)
    assert len(made) == len(STAGES)
    local = run_all(small_config(tmp_path, images))
    assert {label: made[label] for label in made if label != "publish"} == {
        label: local[label] for label in local if label != "publish"
    }

    secret = environment["AWS_SECRET_ACCESS_KEY"].encode()
    store = Store(remote.store)
    for key in s3.keys():  # noqa: SIM118 (a method of the server, not of a mapping)
        assert secret not in s3.read(key), f"the secret is in {key}"
    for manifest in (Pipeline.open(remote).last(node) for node in Pipeline.open(remote).order):
        assert manifest is not None
        for blob in [*manifest.shards, *manifest.files]:
            assert store.has(blob), blob.path
            assert isinstance(blob, Shard) == blob.path.endswith(".tar")
    assert s3.unfinished_uploads() == []
