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


def test_memory_is_asked_for_as_much_as_may_be_used(objects: list[dict[str, Any]]) -> None:
    """Nothing of this is then the first that a node under pressure throws out."""
    for entry in objects:
        if entry["kind"] in ("Deployment", "StatefulSet"):
            (container,) = entry["spec"]["template"]["spec"]["containers"]
            resources = container["resources"]
            assert resources["requests"]["memory"] == resources["limits"]["memory"], entry["metadata"]["name"]


def test_the_server_asks_for_a_password_that_workers_have_and_jobs_refer_to(objects: list[dict[str, Any]]) -> None:
    by_name = {entry["metadata"]["name"]: entry for entry in objects if entry["kind"] == "Deployment"}
    reference = {"secretKeyRef": {"name": "prefect-api", "key": "auth-string"}}
    for name, variable in (
        ("prefect-server", "PREFECT_SERVER_API_AUTH_STRING"),
        ("worker-cpu", "PREFECT_API_AUTH_STRING"),
        ("worker-gpu", "PREFECT_API_AUTH_STRING"),
    ):
        environment = by_name[name]["spec"]["template"]["spec"]["containers"][0]["env"]
        assert {"name": variable, "valueFrom": reference} in environment
        if name.startswith("worker"):
            values = {entry["name"]: entry.get("value") for entry in environment}
            prefix = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET"
            assert (values[f"{prefix}_NAME"], values[f"{prefix}_KEY"]) == ("prefect-api", "auth-string")


def test_database_and_server_hear_only_those_who_need_them(objects: list[dict[str, Any]]) -> None:
    policies = {entry["metadata"]["name"]: entry["spec"] for entry in objects if entry["kind"] == "NetworkPolicy"}
    pods = {
        tuple(entry["spec"]["template"]["metadata"]["labels"].items())
        for entry in objects
        if entry["kind"] in ("Deployment", "StatefulSet")
    }
    (database,) = policies["postgres"]["ingress"]
    assert database["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "prefect-server"}}}]
    (server,) = policies["prefect-server"]["ingress"]
    assert server["from"] == [{"podSelector": {}}], "pods of this namespace"
    for policy in policies.values():
        assert policy["policyTypes"] == ["Ingress"]
        assert tuple(policy["podSelector"]["matchLabels"].items()) in pods, "it is about a pod that there is"


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
