"""A Prefect server that `deploy/apply.py process` was applied to, and what tests ask of it over its API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.servers.prefect import ROOT, PrefectServer, prefect_server

APPLY = [sys.executable, str(ROOT / "deploy" / "apply.py"), "process"]


class Site:
    """The server and its API as plain JSON: nothing of Prefect is imported, which reads its settings then."""

    def __init__(self, server: PrefectServer) -> None:
        self.server = server
        # No UI to build, and the commands of the environment that runs the tests.
        self.environment = {
            **os.environ,
            **server.environment(),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PREFECT_LOGGING_LEVEL": "ERROR",
        }

    def command(self, command: list[str], environment: Mapping[str, str] | None = None) -> str:
        """Runs a command as a person would who has PREFECT_API_URL set; what it prints."""
        answer = subprocess.run(
            command, env={**self.environment, **(environment or {})}, cwd=ROOT, capture_output=True, text=True
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    def apply(self, gpus: int = 1, **environment: str) -> str:
        return self.command([*APPLY, str(gpus)], environment)

    def post(self, path: str, body: Any = None) -> Any:
        return self._request("POST", path, body if body is not None else {})

    def get(self, path: str) -> Any:
        return self._request("GET", path, None)

    def _request(self, method: str, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.server.url}/{path}", data=data, headers={"content-type": "application/json"}, method=method
        )
        for attempt in range(20):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    text = answer.read()
                return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                # SQLite's one writer is busy: as Prefect's own client, ask again.
                if error.code != 503 or attempt == 19:
                    raise AssertionError(f"{method} {path}: {error.code} {error.read().decode()}") from error
                time.sleep(0.5)
        raise AssertionError("not reached")

    def deployments(self) -> dict[str, dict[str, Any]]:
        return {entry["name"]: entry for entry in self.post("deployments/filter")}

    def automations(self) -> dict[str, dict[str, Any]]:
        """By name; a name that is there twice fails."""
        found = self.post("automations/filter")
        names = [entry["name"] for entry in found]
        assert len(names) == len(set(names)), names
        return dict(zip(names, found, strict=True))

    def start(self, deployment_id: str, parameters: dict[str, Any]) -> str:
        """A run of a deployment; its id."""
        run = self.post(f"deployments/{deployment_id}/create_flow_run", {"parameters": parameters})
        return str(run["id"])

    def state(self, run_id: str) -> dict[str, Any]:
        return dict(self.get(f"flow_runs/{run_id}")["state"])

    def set_state(self, run_id: str, kind: str) -> None:
        answer = self.post(f"flow_runs/{run_id}/set_state", {"state": {"type": kind, "name": kind.title()}})
        assert answer["status"] == "ACCEPT", answer

    def wait_for(self, run_id: str, kinds: set[str], seconds: float) -> dict[str, Any]:
        """The run's state once its type is one of these."""
        deadline = time.monotonic() + seconds
        while (state := self.state(run_id))["type"] not in kinds:
            ended = state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
            assert not ended, f"{state['type']} ({state['message']})"
            assert time.monotonic() < deadline, f"still {state['type']} ({state['message']}) after {seconds:.0f} s"
            time.sleep(0.5)
        return state

    def runs_of(self, deployment_id: str) -> list[dict[str, Any]]:
        """Runs that are there for another reason than a schedule."""
        chosen = {"deployments": {"id": {"any_": [deployment_id]}}}
        return [run for run in self.post("flow_runs/filter", chosen) if not run["auto_scheduled"]]


@contextmanager
def applied(home: Path) -> Iterator[Site]:
    """A server with pools, deployments and automations."""
    with prefect_server(home) as server:
        site = Site(server)
        site.apply(gpus=2)
        yield site
