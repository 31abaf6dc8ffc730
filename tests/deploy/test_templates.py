"""The base job templates: made by deploy/make_templates.py, rendered by the workers' own classes, judged by the schemas
of those who will read them (Kubernetes, the AWS and Google clients, docker)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.deploy.rendering import FILES, ROOT, flow_run, make_templates, placeholders, rendered, template, worker_class

IMAGE = "registry.example/loraline:1-cuda"


@pytest.mark.parametrize("name", FILES)
def test_the_committed_file_is_what_the_script_makes(name: str) -> None:
    kind, gpu = FILES[name]
    worker_class(kind)
    text = (ROOT / "deploy" / "work-pools" / f"{name}.json").read_text(encoding="utf-8")
    assert json.dumps(make_templates.make(kind, gpu), indent=2) + "\n" == text, "run python deploy/make_templates.py"


def test_no_other_file_is_in_the_folder() -> None:
    assert {path.stem for path in (ROOT / "deploy" / "work-pools").iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_variable_is_used_and_every_used_one_is_there(name: str) -> None:
    there = template(name)
    known = set(there["variables"]["properties"])
    used = placeholders(there["job_configuration"])
    assert used <= known
    # Two that the workers read by themselves, outside the template.
    assert known - used <= {"cluster", "vpc_id"}
    assert set(there["variables"].get("required", [])) <= known


@pytest.mark.parametrize("name", [name for name in FILES if name != "process"])
def test_an_image_has_to_be_named(name: str) -> None:
    variables = template(name)["variables"]
    assert "image" in variables["required"]
    assert "default" not in variables["properties"]["image"]


# -- Kubernetes --------------------------------------------------------------------------------------------------------


def job(name: str, **variables: Any) -> dict[str, Any]:
    """A rendered job, valid by the schemas of an old and of the newest Kubernetes."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    manifest = dict(rendered(name, image=IMAGE, **variables).job_manifest)
    for version in ("1.25", validate.latest_version().rpartition(".")[0]):
        validate.validate(manifest, version, strict=True)
    return manifest


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return dict(manifest["spec"]["template"]["spec"])


def test_kubernetes_gpu_job() -> None:
    manifest = job("kubernetes-gpu", gpus="2", memory="64G", env={"HF_HUB_OFFLINE": "1"})
    pod = pod_of(manifest)
    container = pod["containers"][0]
    assert manifest["spec"]["backoffLimit"] == 0
    assert manifest["spec"]["ttlSecondsAfterFinished"] == 86400
    annotations = manifest["spec"]["template"]["metadata"]["annotations"]
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert container["image"] == IMAGE
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert "command" not in container, "the image's entry point stays"
    assert container["resources"]["limits"] == {
        "memory": "64G",
        "ephemeral-storage": "100Gi",
        "nvidia.com/gpu": "2",
    }
    assert container["resources"]["requests"]["cpu"] == "4"
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    assert pod["terminationGracePeriodSeconds"] == 90
    assert pod["serviceAccountName"] == "loraline"
    assert pod["automountServiceAccountToken"] is False
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]] == {"medium": "Memory", "sizeLimit": "8Gi"}
    assert volumes[mounts["/tmp"]] == {"sizeLimit": "100Gi"}


def test_kubernetes_environment_holds_what_is_needed_and_no_secret() -> None:
    container = pod_of(job("kubernetes-gpu", env={"HF_HUB_OFFLINE": "1"}))["containers"][0]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    assert environment["PREFECT_HOME"].startswith("/tmp/")
    assert container["envFrom"] == [{"secretRef": {"name": "loraline", "optional": True}}]
    other = [{"secretRef": {"name": "hub-token"}}, {"configMapRef": {"name": "store"}}]
    assert pod_of(job("kubernetes-gpu", env_from=other))["containers"][0]["envFrom"] == other


def test_kubernetes_secrets_by_key() -> None:
    reference = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    manifest = job("kubernetes-cpu", secret_env=[reference], env={"A": "b"})
    environment = pod_of(manifest)["containers"][0]["env"]
    assert reference in environment
    assert {"name": "A", "value": "b"} in environment


def test_kubernetes_job_refers_to_the_servers_password() -> None:
    import asyncio

    from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings

    worker = worker_class("kubernetes")(work_pool_name="gpu", create_pool_if_not_found=False)
    with temporary_settings({PREFECT_API_AUTH_STRING: "admin:hidden"}):
        configuration = rendered("kubernetes-gpu", image=IMAGE)
    replace = worker._replace_env_variable_with_secret
    asyncio.run(replace("PREFECT_API_AUTH_STRING", configuration, secret_name="prefect-api", secret_key="auth-string"))
    environment = pod_of(configuration.job_manifest)["containers"][0]["env"]
    assert {
        "name": "PREFECT_API_AUTH_STRING",
        "valueFrom": {"secretKeyRef": {"name": "prefect-api", "key": "auth-string"}},
    } in environment
    assert "hidden" not in json.dumps(configuration.job_manifest)


def test_kubernetes_pod_passes_the_restricted_security_standard() -> None:
    for name in ("kubernetes-cpu", "kubernetes-gpu"):
        pod = pod_of(job(name))
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["containers"][0]["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_kubernetes_cpu_job_asks_for_no_gpu() -> None:
    manifest = job("kubernetes-cpu")
    assert "nvidia.com/gpu" not in json.dumps(manifest)
    assert pod_of(manifest)["tolerations"] == []


def test_kubernetes_placement() -> None:
    affinity = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}]
            }
        }
    }
    pod = pod_of(
        job(
            "kubernetes-gpu",
            node_selector={"accelerator": "l40s"},
            affinity=affinity,
            priority_class="batch",
            runtime_class="nvidia",
            image_pull_secrets=[{"name": "registry"}],
            timeout_s=3600,
        )
    )
    assert pod["nodeSelector"] == {"accelerator": "l40s"}
    assert pod["affinity"] == affinity
    assert pod["priorityClassName"] == "batch"
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["imagePullSecrets"] == [{"name": "registry"}]


def test_kubernetes_what_is_not_given_is_left_out() -> None:
    manifest = job("kubernetes-gpu")
    assert "activeDeadlineSeconds" not in manifest["spec"]
    assert not {"affinity", "priorityClassName", "runtimeClassName"} & pod_of(manifest).keys()
    assert "{{" not in json.dumps(manifest)


# -- docker ------------------------------------------------------------------------------------------------------------


def test_docker_gpu_container() -> None:
    from docker.types import HostConfig

    configuration = rendered("docker-gpu", image=IMAGE, memory="16G", gpu_count=2)
    assert configuration.image_pull_policy == "IfNotPresent"
    assert configuration.privileged is False
    host = HostConfig(version="1.41", mem_limit=configuration.mem_limit, **configuration.container_create_kwargs)
    assert host["DeviceRequests"] == [
        {"Driver": "nvidia", "Count": 2, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}
    ]
    assert host["ShmSize"] == 8 << 30
    assert host["Memory"] == 16 << 30
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges"]


def test_docker_cpu_container_read_only() -> None:
    from docker.types import HostConfig

    configuration = rendered(
        "docker-cpu", image=IMAGE, read_only=True, tmpfs={"/tmp": "size=4g"}, image_pull_policy="Never"
    )
    assert configuration.image_pull_policy == "Never"
    host = HostConfig(version="1.41", **configuration.container_create_kwargs)
    assert host["ReadonlyRootfs"] is True
    assert host["Tmpfs"] == {"/tmp": "size=4g"}
    assert "DeviceRequests" not in host
    assert configuration.env["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"


# -- process -----------------------------------------------------------------------------------------------------------


def test_process_ignores_what_it_does_not_know() -> None:
    configuration = rendered("process", image=IMAGE, memory="16G", gpus="1", env={"A": "b"})
    assert configuration.env["A"] == "b"
    assert configuration.command.endswith("-m prefect.engine")


# -- AWS ECS -----------------------------------------------------------------------------------------------------------


def judge_by_aws(operation: str, request: dict[str, Any]) -> None:
    """Holds a request against AWS's own description of the service, as its client does before it sends one."""
    import botocore.session
    from botocore.validate import ParamValidator

    service = botocore.session.Session().get_service_model("ecs")
    report = ParamValidator().validate(request, service.operation_model(operation).input_shape)
    assert not report.has_errors(), report.generate_report()


def ecs_requests(name: str, **variables: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The task definition that is registered and the request to run it; nobody is asked."""
    worker_type = worker_class("ecs")
    configuration = rendered(name, image=IMAGE, execution_role_arn="arn:aws:iam::123456789012:role/ecs", **variables)
    worker = worker_type(work_pool_name=name, create_pool_if_not_found=False)
    definition = worker._prepare_task_definition(configuration, region="us-east-1", flow_run=flow_run())
    judge_by_aws("RegisterTaskDefinition", definition)
    worker._validate_task_definition(definition, configuration)
    arn = "arn:aws:ecs:us-east-1:123456789012:task-definition/loraline:1"
    request = worker._prepare_task_run_request(configuration, definition, arn, True)
    judge_by_aws("RunTask", request)
    return definition, request


def test_ecs_gpu_task_runs_on_the_capacity_provider() -> None:
    secret = {"name": "HF_TOKEN", "valueFrom": "arn:aws:secretsmanager:us-east-1:123456789012:secret:hub"}
    made, request = ecs_requests("ecs-gpu", gpus="4", secrets=[secret], memory="64G", cluster="training")
    container = made["containerDefinitions"][0]
    assert container["image"] == IMAGE
    assert container["resourceRequirements"] == [{"type": "GPU", "value": "4"}]
    assert container["linuxParameters"]["sharedMemorySize"] == 8192
    assert container["secrets"] == [secret]
    assert container["stopTimeout"] == 90
    assert made["requiresCompatibilities"] == ["EC2"]
    assert request["capacityProviderStrategy"] == [{"capacityProvider": "loraline-gpu", "weight": 1, "base": 0}]
    assert "launchType" not in request
    assert request["cluster"] == "training"
    override = request["overrides"]["containerOverrides"][0]
    assert override["command"] == ["prefect", "flow-run", "execute"]
    assert {"name": "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR", "value": "reschedule"} in override["environment"]


def test_ecs_cpu_task_runs_on_fargate() -> None:
    network = {"subnets": ["subnet-1"], "securityGroups": ["sg-1"], "assignPublicIp": "DISABLED"}
    # awsvpc's addresses are looked up in the account: this part is given, as the account has no such network.
    configuration = rendered("ecs-cpu", image=IMAGE, vpc_id="vpc-1", network_configuration=network)
    assert configuration.network_configuration == network
    worker = worker_class("ecs")(work_pool_name="cpu", create_pool_if_not_found=False)
    definition = worker._prepare_task_definition(configuration, region="us-east-1", flow_run=flow_run())
    judge_by_aws("RegisterTaskDefinition", definition)
    assert definition["requiresCompatibilities"] == ["FARGATE"]
    assert definition["networkMode"] == "awsvpc"
    assert definition["ephemeralStorage"] == {"sizeInGiB": 100}
    assert (definition["cpu"], definition["memory"]) == ("4096", "16384")
    assert "resourceRequirements" not in definition["containerDefinitions"][0]


# -- Google Vertex AI --------------------------------------------------------------------------------------------------


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's credentials in the place of those of the machine."""
    google_auth = pytest.importorskip("google.auth", reason="pip install prefect-gcp")
    credentials = pytest.importorskip("google.auth.credentials").AnonymousCredentials()
    monkeypatch.setattr(google_auth, "default", lambda *_, **__: (credentials, "project"))


def vertex(**variables: Any) -> Any:
    account = "trainer@project.iam.gserviceaccount.com"
    return rendered("vertex-gpu", image=IMAGE, region="europe-west4", service_account_name=account, **variables)


def test_vertex_gpu_job(google: None) -> None:
    configuration = vertex(memory="64G", env={"A": "b"})
    assert configuration.region == "europe-west4"
    spec = configuration.job_spec
    assert spec["service_account_name"] == "trainer@project.iam.gserviceaccount.com"
    assert spec["maximum_run_time_hours"] == 48
    (pool,) = spec["worker_pool_specs"]
    assert pool["machine_spec"] == {
        "machine_type": "g2-standard-16",
        "accelerator_type": "NVIDIA_L4",
        "accelerator_count": 1,
    }
    assert pool["container_spec"]["image_uri"] == IMAGE
    assert pool["container_spec"]["command"] == ["prefect", "flow-run", "execute"]
    environment = {entry["name"]: entry["value"] for entry in pool["container_spec"]["env"]}
    assert environment["A"] == "b"
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    assert pool["disk_spec"] == {"boot_disk_size_gb": 200, "boot_disk_type": "pd-ssd"}


def test_vertex_job_is_what_googles_client_takes(google: None) -> None:
    pytest.importorskip("google.cloud.aiplatform", reason="pip install 'prefect-gcp[aiplatform]'")
    worker = worker_class("vertex")(work_pool_name="gpu", create_pool_if_not_found=False)
    spec = worker._build_job_spec(vertex(scheduling={"strategy": "SPOT"}))
    pool = spec.worker_pool_specs[0]
    assert pool.machine_spec.accelerator_type.name == "NVIDIA_L4"
    assert pool.machine_spec.accelerator_count == 1
    assert pool.container_spec.image_uri == IMAGE
    assert spec.service_account == "trainer@project.iam.gserviceaccount.com"
    assert spec.scheduling.strategy.name == "SPOT"
