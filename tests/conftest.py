"""Shared by all tests: one thread, no telemetry, and servers on loopback only."""

from __future__ import annotations

import os
from pathlib import Path

# Whatever servers and accounts the person at this machine uses are not to be touched.
for name in [name for name in os.environ if name.startswith(("LORALINE__", "AWS_", "HF_", "PREFECT_"))]:
    del os.environ[name]
# Read at import by huggingface_hub and torch: set before any test module imports them.
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["DO_NOT_TRACK"] = "1"
# No test needs blocks, and registering them loads every integration of Prefect.
os.environ["PREFECT_SERVER_REGISTER_BLOCKS_ON_START"] = "false"
os.environ["PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

pytest_plugins = ["tests.servers.s3"]

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny_sd3() -> Path:
    """The embedded tiny Stable Diffusion 3, in the layout of a diffusers pipeline."""
    return ROOT / "examples" / "demo" / "tiny-sd3"


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the caches of the person who runs it."""
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf-home", numbered=True)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, so that no process is left alone with one at the end."""
    marks = ("deployments", "slow")
    items.sort(key=lambda item: next((rank for rank, name in enumerate(marks) if item.get_closest_marker(name)), 2))
