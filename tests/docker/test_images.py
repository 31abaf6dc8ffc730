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
from tests.servers.s3 import S3Server

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1800)]

# How a careful cluster runs a stage: no root, no rights, nothing to write to but /tmp.
LOCKED = [
    "--read-only",
    "--tmpfs",
    "/tmp",
    "--cap-drop",
    "ALL",
    "--security-opt",
    "no-new-privileges",
    "--network",
    "host",
]


def python(engine: Engine, image: str, code: str) -> Any:
    """What a line of Python in the container prints as JSON."""
    return json.loads(engine.run("run", "--rm", *LOCKED, image, "python", "-c", code).stdout)


def test_it_says_what_it_is(engine: Engine, image: str) -> None:
    (record,) = json.loads(engine.run("image", "inspect", image).stdout)
    labels = record["Config"]["Labels"]
    assert labels["org.opencontainers.image.revision"] == REVISION
    assert labels["org.opencontainers.image.title"] == "loraline"
    assert record["Config"]["User"] == "10001:10001"
    code = "import json; from stages.core.runner import code_revision; print(json.dumps(code_revision()))"
    assert python(engine, image, code) == REVISION


def test_no_compiler_no_cuda_no_secrets_no_tests(engine: Engine, image: str) -> None:
    code = (
        "import json, os, shutil, torch; from importlib import metadata;"
        "names = sorted({d.metadata['Name'].lower() for d in metadata.distributions()});"
        "print(json.dumps({'tools': [t for t in ('gcc', 'cc', 'g++', 'make', 'git', 'nvcc') if shutil.which(t)],"
        "'cuda': torch.version.cuda, 'names': names, 'uid': os.getuid()}))"
    )
    inside = python(engine, image, code)
    assert inside["tools"] == []
    assert inside["cuda"] is None
    assert not [name for name in inside["names"] if name.startswith(("nvidia", "triton", "pytest", "moto"))]
    assert inside["uid"] == 10001
    assert "AWS_SECRET" not in engine.run("history", "--no-trunc", image).stdout


def test_every_library_is_the_pinned_one(engine: Engine, image: str) -> None:
    answer = json.loads(engine.run("run", "--rm", *LOCKED, image, "doctor", "--json").stdout)
    (versions,) = (finding for finding in answer["findings"] if finding["check"] == "versions")
    assert versions["status"] == "ok", versions["text"]


def test_bytecode_is_there_and_valid(engine: Engine, image: str) -> None:
    code = (
        "import importlib.util as u, json, pathlib, sys;"
        "import diffusers, torch, stages.cli;"
        "specs = [m.__spec__ for m in sys.modules.values() if getattr(m, '__spec__', None)];"
        "origins = [s.origin for s in specs if s.has_location];"
        "paths = [p for p in origins if p.endswith('.py') and p.startswith('/opt')];"
        "print(json.dumps([len(paths), [p for p in paths if not pathlib.Path(u.cache_from_source(p)).exists()]]))"
    )
    loaded, without = python(engine, image, code)
    assert loaded > 500
    assert without == []


def test_doctor_is_content_in_a_locked_container(engine: Engine, image: str, s3: S3Server) -> None:
    environment = [f"--env={key}={value}" for key, value in s3.environment().items()]
    answer = engine.run(
        "run",
        "--rm",
        *LOCKED,
        *environment,
        image,
        "doctor",
        "--json",
        "--store",
        f"s3://{s3.bucket}/store",
        check=False,
    )
    findings = {finding["check"]: finding for finding in json.loads(answer.stdout)["findings"]}
    assert answer.returncode == 0, findings
    for check in ("libraries", "versions", "device", "precisions", "folders", "store"):
        assert findings[check]["status"] == "ok", findings[check]
    # Every precision level computes without a compiler, as nobody, on a file system that cannot be written.
    assert "int2-quanto" in findings["precisions"]["text"]


def test_doctor_says_what_a_container_lacks(engine: Engine, image: str) -> None:
    answer = engine.run("run", "--rm", "--network", "host", image, "doctor", "--json", "--gpu", check=False)
    findings = {finding["check"]: finding for finding in json.loads(answer.stdout)["findings"]}
    assert answer.returncode == 1
    assert findings["device"]["status"] == "fail"
    without_tmp = engine.run("run", "--rm", "--network", "host", "--read-only", image, "doctor", check=False)
    assert without_tmp.returncode == 73
    assert "mount a volume or a tmpfs on /tmp" in without_tmp.stderr


def test_prefects_workers_can_start_their_own_command_in_it(engine: Engine, image: str) -> None:
    answer = engine.run("run", "--rm", *LOCKED, image, "prefect", "version")
    assert "3.8" in answer.stdout
    answer = engine.run("run", "--rm", *LOCKED, image, "stages")
    assert "latents" in answer.stdout


def test_it_may_run_as_anyone(engine: Engine, image: str) -> None:
    answer = engine.run("run", "--rm", *LOCKED, "--user", "54321:0", image, "doctor", "--json", check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr


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
    said = engine.build("cpu", "loraline:test-changed", folder=context, arguments=[f"LORALINE_REVISION={REVISION}"])
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
