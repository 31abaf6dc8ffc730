"""A Docker engine for the tests: the machine's own where DOCKER_HOST names one, else a private daemon.

A private daemon has its own socket, images and containers, and touches neither the machine's network nor another
engine; builds and containers use the machine's network as it is. Environment:

LORALINE_TEST_DOCKER     a folder to keep the daemon's images in between runs; else they are deleted afterwards
LORALINE_TEST_IMAGE      a finished image of target cpu to test, in place of building one
LORALINE_REQUIRE_DOCKER  1: no engine is a failure, not a skip

`python -m tests.docker.engine` starts one and says so, or says why there is none. With --build it makes the image of
target cpu, too: kept in LORALINE_TEST_DOCKER, it is there when the tests build it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
BASE_IMAGE = "python:3.11-slim-bookworm"
WHEELS_IMAGE = "loraline-wheels:test"
# No network of its own is made (--bridge=none): neither rights for it nor traces of it are needed.
FLAGS = ("--bridge=none", "--iptables=false", "--ip-forward=false", "--ip-masq=false")


class EngineUnavailableError(RuntimeError):
    """No engine can be had here; the message says why."""


@dataclass(frozen=True)
class Engine:
    """An engine that runs, and the client for it."""

    host: str
    client: str

    def run(
        self, *arguments: str, check: bool = True, folder: Path = ROOT, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`docker ARGUMENTS`; its output as text.

        Raises:
            AssertionError: it failed, and `check` is set.
        """
        environment = {**os.environ, "DOCKER_HOST": self.host, "DOCKER_BUILDKIT": "1", "BUILDKIT_PROGRESS": "plain"}
        answer = subprocess.run(
            [self.client, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=folder,
            input=stdin,
            check=False,
        )
        if check and answer.returncode != 0:
            raise AssertionError(f"docker {' '.join(arguments)}\n{(answer.stdout + answer.stderr)[-6000:]}")
        return answer

    def has(self, image: str) -> bool:
        return self.run("image", "inspect", image, check=False).returncode == 0

    def build(self, target: str, tag: str, folder: Path = ROOT, arguments: Mapping[str, str] | None = None) -> str:
        """Builds a target of the Dockerfile; what the builder said."""
        options = ["--network", "host"]
        for name, value in {**self.build_arguments(), **(arguments or {})}.items():
            options += ["--build-arg", f"{name}={value}"]
        return self.run("build", "--target", target, "--tag", tag, *options, ".", folder=folder).stderr

    def build_arguments(self) -> dict[str, str]:
        """Where the Dockerfile finds here what it takes from registries elsewhere."""
        wheels = {"WHEELS_IMAGE": WHEELS_IMAGE, "CPU_INDEX": ""} if self.has(WHEELS_IMAGE) else {}
        return {"BASE_IMAGE": BASE_IMAGE, **wheels}

    def containers(self, label: str) -> list[dict[str, Any]]:
        """All containers with a label, running or not, as the engine describes them."""
        found = self.run("ps", "--all", "--quiet", "--filter", f"label={label}").stdout.split()
        return list(json.loads(self.run("inspect", *found).stdout)) if found else []

    def remove(self, label: str) -> None:
        """Removes all containers with a label, running or not."""
        for container in self.containers(label):
            self.run("rm", "--force", "--volumes", container["Id"], check=False)


@contextmanager
def running_engine() -> Iterator[Engine]:
    """The engine, for as long as the context lasts.

    Raises:
        EngineUnavailableError: there is no client, no daemon, or not the rights to start one.
    """
    # Debian's client knows BuildKit by itself; others need a plug-in for it.
    clients = ("/usr/bin/docker", shutil.which("docker") or "/nowhere")
    client = next((path for path in clients if Path(path).exists()), None)
    if client is None:
        raise EngineUnavailableError("there is no docker client: apt-get install docker.io")
    if os.environ.get("DOCKER_HOST"):
        yield _answering(Engine(os.environ["DOCKER_HOST"], client), 10)
        return
    daemon = shutil.which("dockerd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin")
    if daemon is None:
        raise EngineUnavailableError("there is no docker daemon: apt-get install docker.io")
    if os.geteuid() != 0:
        raise EngineUnavailableError("a private daemon wants root; set DOCKER_HOST to an engine that you may use")
    kept = os.environ.get("LORALINE_TEST_DOCKER")
    folder = Path(kept or tempfile.mkdtemp(prefix="loraline-docker-"))
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "daemon.log"
    engine = Engine(f"unix://{folder}/docker.sock", client)
    command = [daemon, "--host", engine.host, "--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec"]
    command += ["--pidfile", f"{folder}/docker.pid", *FLAGS]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        try:
            _answering(engine, 60, process)
        except EngineUnavailableError as error:
            raise EngineUnavailableError(f"{error}: {log.read_text()[-600:]}") from None
        yield engine
    finally:
        # Containers first: a daemon that is gone cannot stop them any more.
        if process.poll() is None:
            left = engine.run("ps", "--quiet", check=False).stdout.split()
            if left:
                engine.run("kill", *left, check=False)
            process.terminate()
            process.wait(60)
        # The daemon leaves the machine's network mounted here, once a container has used it.
        subprocess.run(["umount", f"{folder}/exec/netns/default"], capture_output=True, check=False)
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def _answering(engine: Engine, patience_s: float, process: subprocess.Popen[bytes] | None = None) -> Engine:
    until = time.monotonic() + patience_s
    while time.monotonic() < until and (process is None or process.poll() is None):
        if engine.run("version", check=False).returncode == 0:
            return engine
        time.sleep(0.2)
    raise EngineUnavailableError(f"no docker engine answers at {engine.host}")


def provide_base_image(engine: Engine) -> None:
    """The base image: there already, from its registry, or a stand-in out of Debian packages.

    Raises:
        EngineUnavailableError: none of them can be had.
    """
    if engine.has(BASE_IMAGE) or engine.run("pull", BASE_IMAGE, check=False).returncode == 0:
        return
    script = Path(__file__).with_name("make-base-image.sh")
    environment = {**os.environ, "DOCKER": engine.client, "DOCKER_HOST": engine.host}
    made = subprocess.run(
        ["bash", str(script), BASE_IMAGE], env=environment, capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        raise EngineUnavailableError(f"{BASE_IMAGE} can neither be pulled nor made: {made.stderr.strip()[-600:]}")


def provide_wheels(engine: Engine) -> None:
    """PyTorch's wheel for CPUs as an image, if pip's settings name a folder with it; else the build asks PyTorch."""
    found = subprocess.run(["pip", "config", "get", "global.find-links"], capture_output=True, text=True, check=False)
    folder = Path(found.stdout.strip() or "/nowhere")
    if engine.has(WHEELS_IMAGE) or not list(folder.glob("torch-*cpu*.whl")):
        return
    with tempfile.TemporaryDirectory() as context:
        for wheel in folder.glob("torch-*cpu*.whl"):
            shutil.copyfile(wheel, Path(context) / wheel.name)
        (Path(context) / "Dockerfile").write_text("FROM scratch\nCOPY *.whl /\n")
        engine.run("build", "--tag", WHEELS_IMAGE, ".", folder=Path(context))


def main() -> int:
    try:
        with running_engine() as engine:
            print(f"a docker engine runs: {engine.run('version', '--format', '{{.Server.Version}}').stdout.strip()}")
            if sys.argv[1:] == ["--build"]:
                provide_base_image(engine)
                provide_wheels(engine)
                engine.build("cpu", "loraline:early")
    except EngineUnavailableError as reason:
        print(f"no docker engine: {reason}", file=sys.stderr)
        return 69
    return 0


if __name__ == "__main__":
    sys.exit(main())
