"""docker/compose.yaml: valid by the published schema, complete by the registry, closed to the outside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.registry import STAGES
from tests.deploy.rendering import ROOT

FILES = ("docker/compose.yaml", "docker/compose.gpu.yaml")


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    tree = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))
    return dict(tree["services"])


@pytest.mark.parametrize("path", FILES)
def test_the_file_follows_the_compose_specification(path: str, tmp_path: Path) -> None:
    pytest.importorskip("check_jsonschema", reason="pip install check-jsonschema")
    # Merged first: `<<` is YAML's business, the schema knows nothing of it.
    (tmp_path / "compose.json").write_text(json.dumps(yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))))
    answer = subprocess.run(
        [
            sys.executable,
            "-m",
            "check_jsonschema",
            "--builtin-schema",
            "vendor.compose-spec",
            str(tmp_path / "compose.json"),
        ],
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_every_pool_has_a_worker(services: dict[str, dict[str, Any]]) -> None:
    pools = {
        service["command"][service["command"].index("--pool") + 1]
        for service in services.values()
        if "worker" in service.get("command", [])
    }
    assert pools == {stage.hardware for stage in STAGES}


def test_what_is_named_is_there(services: dict[str, dict[str, Any]]) -> None:
    tree = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        for mount in service.get("volumes", []):
            source = mount.partition(":")[0]
            if source.startswith("."):
                assert (ROOT / "docker" / source).resolve().exists(), mount
            else:
                assert source in tree["volumes"], mount


def test_ports_are_open_to_this_machine_alone(services: dict[str, dict[str, Any]]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_our_own_containers_are_locked_and_stages_share_no_volume(services: dict[str, dict[str, Any]]) -> None:
    ours = {name: service for name, service in services.items() if "build" in service}
    assert set(ours) == {"server", "setup", "worker-cpu", "worker-gpu", "demo"}
    for name, service in ours.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["build"]["target"] == "cpu", name
    writable = [
        {mount.partition(":")[0] for mount in ours[name]["volumes"] if not mount.endswith(":ro")}
        for name in ("worker-cpu", "worker-gpu")
    ]
    assert writable[0].isdisjoint(writable[1])


def test_images_of_others_are_pinned_and_can_be_changed(services: dict[str, dict[str, Any]]) -> None:
    for name in ("postgres", "s3"):
        image = services[name]["image"]
        assert image.startswith("${")
        assert ":latest" not in image
        assert image.count(":") >= 2, image  # one of the default, one of its tag
