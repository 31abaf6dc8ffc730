"""How the tests run stages in containers: as a careful cluster would, over a bucket and a Hub on loopback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.config import Config
from tests.pictures import small_config
from tests.servers.hub import HubServer
from tests.servers.s3 import S3Server

# No root, no rights, nothing to write to but /tmp.
LOCKED = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
LOCKED += ["--network", "host"]


def configuration(s3: S3Server, precision: str, **train: Any) -> Config:
    """A small pipeline whose configuration names nothing of this machine but the bucket.

    Args:
        s3: where the store is.
        precision: of the base model, while training.
        train: more fields of the section `train`.
    """
    written = small_config(
        Path("/nowhere"),
        Path("/nowhere"),
        store={"url": f"s3://{s3.bucket}/store", "cache_dir": "/tmp/loraline/cache"},
        model={"pretrained_model_name_or_path": "user/tiny-sd3"},
        datasets=[{"id": "blots", "source": {"type": "hub", "repo": "user/blots"}}],
        train={"base_model_precision": precision, **train},
    )
    record = written.model_dump(mode="json") | {"publish": {"target": "hub", "repo": "user/blots-lora"}}
    return Config.model_validate(record)


def secrets(s3: S3Server, hub: HubServer) -> dict[str, str]:
    """All that a stage is told besides its configuration."""
    return {**s3.environment(), **hub.environment(), "HF_HOME": "/tmp/loraline/huggingface"}


def as_options(environment: dict[str, str]) -> list[str]:
    """An environment as options of `docker run`."""
    return [f"--env={key}={value}" for key, value in environment.items()]
