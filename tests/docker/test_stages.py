"""Every stage alone in a container of its own: nothing but environment variables and object storage."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from stages.core.store import Store
from stages.pipeline import Pipeline
from stages.registry import STAGES
from tests.docker.conftest import REVISION
from tests.docker.engine import Engine
from tests.docker.running import LOCKED, as_options, configuration, secrets
from tests.servers.hub import HubServer
from tests.servers.s3 import S3Server

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_six_containers_and_a_bucket(
    engine: Engine, image: str, s3: S3Server, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # int4: the level whose kernels would have to be compiled, where there is no compiler.
    config = configuration(s3, "int4-quanto")
    s3.client().put_object(Bucket=s3.bucket, Key="config.yaml", Body=config.model_dump_json().encode())
    environment = secrets(s3, hub)
    options = as_options(environment)
    seconds = {}
    for stage in STAGES:
        started = time.monotonic()
        command = ["stage", stage.name, "--config", f"s3://{s3.bucket}/config.yaml", "--events", "json"]
        answer = engine.run("run", "--rm", *LOCKED, *options, image, *command, check=False)
        assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
        seconds[stage.name] = round(time.monotonic() - started, 1)
    print(f"\nseconds for each stage in a container of its own: {json.dumps(seconds)}")

    for key, value in {**s3.environment(), **hub.environment()}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "here"))
    pipeline = Pipeline.open(
        config.model_copy(update={"store": config.store.model_copy(update={"cache_dir": str(tmp_path / "cache")})})
    )
    manifests = [pipeline.last(node) for node in pipeline.order]
    assert len(manifests) == len(STAGES)
    for manifest in manifests:
        assert manifest is not None
        assert manifest.code_revision == REVISION
        assert all(Store(config.store).has(blob) for blob in [*manifest.shards, *manifest.files])
    assert any(name.endswith(".safetensors") for name in hub.files("user/blots-lora", kind="model"))
    hidden = [environment["AWS_SECRET_ACCESS_KEY"].encode(), environment["HF_TOKEN"].encode()]
    for key in s3.keys():  # noqa: SIM118 (a method of the server, not of a mapping)
        content = s3.read(key)
        assert not [secret for secret in hidden if secret in content], f"a secret is in {key}"
    assert s3.unfinished_uploads() == []

    # All of it again finds everything done, from other machines, without a word between them.
    answer = engine.run(
        "run", "--rm", *LOCKED, *options, image, "plan", "--config", f"s3://{s3.bucket}/config.yaml", "--json"
    )
    assert {step["action"] for step in json.loads(answer.stdout)} == {"reuse"}


def test_a_wrong_configuration_is_an_exit_code_and_one_message(engine: Engine, image: str, s3: S3Server) -> None:
    command = ["stage", "train", "--config", f"s3://{s3.bucket}/none.yaml"]
    answer = engine.run("run", "--rm", *LOCKED, *as_options(s3.environment()), image, *command, check=False)
    assert answer.returncode == 78
    assert "none.yaml" in answer.stderr
    assert "Traceback" not in answer.stderr
