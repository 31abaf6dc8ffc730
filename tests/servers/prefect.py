"""A real Prefect server and real process workers, on loopback, with a home of their own."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch
from urllib.error import URLError

import psutil

ROOT = Path(__file__).parent.parent.parent
START_S = 300
# `prefect`, as where none of its integrations is installed: a worker of processes needs none, and loading them is most
# of its start.
WORKER = """
from prefect._internal.plugins import collections
collections._collections = {}
from prefect.cli import app
app()
"""


@dataclass
class PrefectServer:
    """A running server: its API, its home, and the processes that belong to it."""

    url: str
    home: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        """What a process needs to talk to this server."""
        return {
            "PREFECT_API_URL": self.url,
            "PREFECT_HOME": str(self.home),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_WORKER_PREFETCH_SECONDS": "1",
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
            # The server would cancel the children of a cancelled run, later: the tests are about our doing so at once.
            "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_ENABLED": "false",
        }

    @contextmanager
    def worker(self, pool: str, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
        """A process worker of a pool that is there, in a process group of its own."""
        env = {**os.environ, **self.environment(), **environment}
        log = (self.home / f"worker-{pool}-{len(self.processes)}.log").open("wb")
        # Without --limit: a worker with one dies of a run that is retried while its process is still leaving.
        name = f"{pool}-{len(self.processes)}"
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, "worker", "start", "--pool", pool, "--name", name],
            env=env,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.processes.append(worker)
        try:
            yield worker
        finally:
            kill_trees(worker)
            log.close()


def kill_trees(*processes: subprocess.Popen[bytes]) -> None:
    """Kills processes and all that they have started, at once, as a machine that loses its power does. (Asked to leave,
    a worker and a server take some 20 s.)

    Args:
        processes: each was started in a session of its own.
    """
    # One that was killed before took its group along, whose number may be somebody else's by now.
    groups = [process.pid for process in processes if process.returncode != -signal.SIGKILL]
    still: set[psutil.Process] = set()
    # Whoever is still starts no other: again, until there is nobody new.
    while moving := {member for process in processes for member in _tree(process)} - still:
        for member in moving:
            with suppress(psutil.NoSuchProcess):
                member.suspend()
        still |= moving
    for member in still:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)  # what one left behind that had ended already
    for process in processes:
        process.wait()


def _tree(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    if process.poll() is not None:
        return []
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


@contextmanager
def prefect_server(home: Path) -> Iterator[PrefectServer]:
    """A server on a free port, with SQLite in `home`; ended on the way out."""
    home.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = PrefectServer(f"http://127.0.0.1:{port}/api", home)
    shutil.copyfile(empty_database(), home / "prefect.db")
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, **server.environment()},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_until_healthy(server.url, process, home / "server.log")
            yield server
        finally:
            kill_trees(process)


@contextmanager
def prefect_in_this_process() -> Iterator[None]:
    """Prefect's own harness (a server, and the settings of this process), with its tables made before."""
    # Prefect reads its settings when it is imported.
    from prefect.testing.utilities import prefect_test_harness

    folder = tempfile.mkdtemp(prefix="prefect-")  # the harness deletes it
    shutil.copyfile(empty_database(), Path(folder, "prefect-test.db"))
    with patch("prefect.testing.utilities.mkdtemp", return_value=folder), prefect_test_harness(START_S):
        yield


def empty_database() -> Path:
    """A database with all of Prefect's tables: making them anew takes a server half of its start."""
    folder = Path(tempfile.gettempdir(), f"loraline-tests-{os.getuid()}-prefect-{version('prefect')}")
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} belongs to somebody else"
    made = folder / "prefect.db"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes run side by side
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=folder) as home:
                command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
                # Whatever server the person at this machine uses is not to be touched.
                own = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
                environment = {**own, "PREFECT_HOME": home, "DO_NOT_TRACK": "1"}
                subprocess.run(command, env=environment, check=True, capture_output=True)
                Path(home, "prefect.db").rename(made)
    return made


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the Prefect server ended: {log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            time.sleep(0.3)
    raise RuntimeError(f"the Prefect server did not answer within {START_S} s: {log.read_text()[-2000:]}")
