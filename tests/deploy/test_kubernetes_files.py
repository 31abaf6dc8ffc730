"""deploy/kubernetes: put together by kustomize, valid by the published schemas, and no right too many."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest
import yaml

from stages.registry import STAGES
from tests.deploy.rendering import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"


@pytest.fixture(scope="module")
def objects() -> list[dict[str, Any]]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl on this machine: its `kustomize` puts the files together")
    answer = subprocess.run([kubectl, "kustomize", str(FOLDER)], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return [entry for entry in yaml.safe_load_all(answer.stdout) if entry]


def test_every_object_is_valid(objects: list[dict[str, Any]]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    assert len(objects) >= 10
    for entry in objects:
        validate.validate(entry, "1.30", strict=True)
        assert entry["kind"] == "Namespace" or entry["metadata"]["namespace"] == "loraline"


def test_there_is_a_worker_for_every_pool(objects: list[dict[str, Any]]) -> None:
    arguments = [
        entry["spec"]["template"]["spec"]["containers"][0]["args"] for entry in objects if entry["kind"] == "Deployment"
    ]
    pools = {args[args.index("--pool") + 1] for args in arguments if "--pool" in args}
    assert pools == {stage.hardware for stage in STAGES}


def test_every_pod_passes_the_restricted_security_standard(objects: list[dict[str, Any]]) -> None:
    pods = [entry["spec"]["template"]["spec"] for entry in objects if entry["kind"] in ("Deployment", "StatefulSet")]
    assert len(pods) == 4
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_no_secret_is_in_the_files_and_nobody_may_read_them_all(objects: list[dict[str, Any]]) -> None:
    assert "Secret" not in {entry["kind"] for entry in objects}
    assert not {"ClusterRole", "ClusterRoleBinding"} & {entry["kind"] for entry in objects}
    (role,) = (entry for entry in objects if entry["kind"] == "Role")
    for rule in role["rules"]:
        assert "*" not in rule["verbs"]
        if "secrets" in rule["resources"]:
            assert not {"get", "list", "watch"} & set(rule["verbs"])


def test_the_account_of_the_pools_is_there(objects: list[dict[str, Any]]) -> None:
    from tests.deploy.rendering import template

    accounts = {entry["metadata"]["name"] for entry in objects if entry["kind"] == "ServiceAccount"}
    for name in ("kubernetes-cpu", "kubernetes-gpu"):
        variables = template(name)["variables"]["properties"]
        assert variables["service_account_name"]["default"] in accounts
        assert variables["namespace"]["default"] == "loraline"
