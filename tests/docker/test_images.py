"""The image of target cpu: what is in it, what is not, and how it runs where nothing can be written but /tmp."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.docker.conftest import IMAGE, REVISION
from tests.docker.engine import ROOT, Engine
from tests.docker.running import LOCKED, as_options
from tests.servers.s3 import S3Server

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1800)]

LOOK = """
import importlib.util, json, os, pathlib, shutil, sys
from importlib import metadata
import torch, stages.cli, stages.train.stage
from diffusers import StableDiffusion3Pipeline
from stages.core.runner import code_revision
specs = [module.__spec__ for module in sys.modules.values() if getattr(module, "__spec__", None)]
paths = [spec.origin for spec in specs if spec.has_location and spec.origin.endswith(".py")]
paths = [path for path in paths if path.startswith("/opt")]
print(json.dumps({
    "revision": code_revision(),
    "uid": os.getuid(),
    "cuda": torch.version.cuda,
    "names": sorted({found.metadata["Name"].lower() for found in metadata.distributions()}),
    "tools": [tool for tool in ("gcc", "cc", "g++", "make", "git", "nvcc") if shutil.which(tool)],
    "loaded": len(paths),
    "without bytecode": [path for path in paths if not pathlib.Path(importlib.util.cache_from_source(path)).exists()],
    "tests and headers": [str(path) for name in ("torch/test", "torch/include", "numpy/_core/tests")
                          if (path := pathlib.Path(torch.__file__).parent.parent / name).exists()],
}))
"""


@pytest.fixture(scope="module")
def inside(engine: Engine, image: str) -> dict[str, Any]:
    """What a program in a locked container sees of its image."""
    return dict(json.loads(engine.run("run", "--rm", *LOCKED, image, "python", "-c", LOOK).stdout))


def test_it_says_what_it_is(engine: Engine, image: str, inside: dict[str, Any]) -> None:
    (record,) = json.loads(engine.run("image", "inspect", image).stdout)
    labels = record["Config"]["Labels"]
    assert labels["org.opencontainers.image.revision"] == REVISION
    assert labels["org.opencontainers.image.title"] == "loraline"
    assert record["Config"]["User"] == "10001:10001"
    assert inside["revision"] == REVISION
    assert inside["uid"] == 10001


def test_no_compiler_no_cuda_no_secrets_no_tests(engine: Engine, image: str, inside: dict[str, Any]) -> None:
    assert inside["tools"] == []
    assert inside["cuda"] is None
    assert not [name for name in inside["names"] if name.startswith(("nvidia", "triton", "pytest", "moto"))]
    assert inside["tests and headers"] == []
    assert "AWS_SECRET" not in engine.run("history", "--no-trunc", image).stdout


def test_bytecode_is_there(inside: dict[str, Any]) -> None:
    assert inside["loaded"] > 500
    assert inside["without bytecode"] == []


def test_doctor_is_content_in_a_locked_container(engine: Engine, image: str, s3: S3Server) -> None:
    command = ["doctor", "--json", "--store", f"s3://{s3.bucket}/store"]
    # As a user that the image knows nothing of, too: clusters choose their own.
    options = [*LOCKED, "--user", "54321:0", *as_options(s3.environment())]
    answer = engine.run("run", "--rm", *options, image, *command, check=False)
    findings = {finding["check"]: finding for finding in json.loads(answer.stdout)["findings"]}
    assert answer.returncode == 0, findings
    # All libraries are the pinned ones; every precision level computes without a compiler, as nobody, on a file system
    # that cannot be written to.
    for check in ("libraries", "versions", "device", "precisions", "folders", "store"):
        assert findings[check]["status"] == "ok", findings[check]
    assert "int2-quanto" in findings["precisions"]["text"]


def test_doctor_says_what_a_container_lacks(engine: Engine, image: str) -> None:
    answer = engine.run("run", "--rm", "--network", "host", image, "doctor", "--json", "--gpu", check=False)
    findings = {finding["check"]: finding for finding in json.loads(answer.stdout)["findings"]}
    assert answer.returncode == 1
    assert findings["device"]["status"] == "fail"
    without_tmp = engine.run("run", "--rm", "--network", "host", "--read-only", image, "doctor", check=False)
    assert without_tmp.returncode == 73
    assert "mount a volume or a tmpfs on /tmp" in without_tmp.stderr


def test_docker_stop_reaches_what_runs_inside(engine: Engine, image: str) -> None:
    name = f"loraline-stop-{time.time_ns()}"
    code = (
        "import signal, sys, time;"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(143)));"
        "print('ready', flush=True); time.sleep(600)"
    )
    engine.run("run", "--detach", "--name", name, *LOCKED, image, "python", "-c", code)
    try:
        for _ in range(300):
            if "ready" in engine.run("logs", name).stdout:
                break
            time.sleep(0.2)
        engine.run("stop", "--time", "20", name)
        state = json.loads(engine.run("inspect", "--format", "{{json .State}}", name).stdout)
        assert state["ExitCode"] == 128 + signal.SIGTERM
        assert "saved" in engine.run("logs", name).stdout
    finally:
        engine.run("rm", "--force", name, check=False)


def test_a_change_of_code_installs_nothing_anew(engine: Engine, image: str, tmp_path: Path) -> None:
    if image != IMAGE:
        pytest.skip("a finished image was given, nothing is built here")
    context = tmp_path / "context"
    context.mkdir()
    for name in ("Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, context / name)
    for name in ("stages", "flows", "docker"):
        shutil.copytree(ROOT / name, context / name, ignore=shutil.ignore_patterns("__pycache__"))
    changed = context / "stages" / "cli.py"
    changed.write_text(changed.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    started = time.monotonic()
    said = engine.build("cpu", "loraline:test-changed", folder=context, arguments={"LORALINE_REVISION": REVISION})
    print(f"\nbuilt again after a change of code in {time.monotonic() - started:.1f} s")
    layers = [
        json.loads(engine.run("image", "inspect", "--format", "{{json .RootFS.Layers}}", tag).stdout)
        for tag in (image, "loraline:test-changed")
    ]
    differing = [index for index, pair in enumerate(zip(*layers, strict=True)) if pair[0] != pair[1]]
    assert differing == [len(layers[0]) - 1], said[-3000:]
    sizes = engine.run(
        "history", "--human=false", "--format", "{{.Size}} {{.CreatedBy}}", "loraline:test-changed"
    ).stdout
    (code_size,) = (int(line.split()[0]) for line in sizes.splitlines() if "/opt/loraline /opt/loraline" in line)
    assert code_size < 5e6


def test_a_rocm_image_without_an_index_is_refused_at_once(engine: Engine, image: str) -> None:
    if image != IMAGE:
        pytest.skip("a finished image was given, nothing is built here")
    with pytest.raises(AssertionError, match="give --build-arg ROCM_INDEX"):
        engine.build("rocm", "loraline:test-rocm")
