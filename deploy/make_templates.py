"""Makes the base job templates of the work pools: each worker's own default, and what loraline's stages need on top.

    python deploy/make_templates.py            writes deploy/work-pools/*.json
    python deploy/make_templates.py --check    only says which of them are out of date (exit code 1)

The worker packages have to be installed (`pip install -c docker/constraints.txt ".[deploy]"`). A pool is called `cpu`
or `gpu` everywhere; which kind of infrastructure is behind the name is decided when the pool is created.

Variables with one name in every kind of pool that knows them: `image`, `env`, `cpus`, `memory`, `gpus`, `scratch`,
`shm`. A kind where the machine's type decides (ECS, Vertex AI) has variables of its own instead, and ignores these.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "work-pools"
Template = dict[str, Any]

WORKERS = {
    "process": "prefect.workers.process:ProcessWorker",
    "docker": "prefect_docker.worker:DockerWorker",
    "kubernetes": "prefect_kubernetes.worker:KubernetesWorker",
    "ecs": "prefect_aws.workers.ecs_worker:ECSWorker",
    "vertex": "prefect_gcp.workers.vertex:VertexAIWorker",
}

# The user of the image; everything that it may write to is below /tmp.
UID = 10001
WRITABLE = "/tmp"  # noqa: S108 (a mount of its own in every container)
SHARED = "/dev/shm"  # noqa: S108 (as above)
# Time to write a checkpoint (25 s), to upload it, and to tell the server.
GRACE_S = 90
# A run whose machine is gone is known by its silence: deploy/automations.yaml waits for four of these signs of life.
# Thirty seconds is the shortest time that Prefect takes.
SIGNS_OF_LIFE = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
# A container that is asked to leave (spot, eviction, drain) gives its run back to be started again elsewhere.
ENVIRONMENT = {
    **SIGNS_OF_LIFE,
    "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "reschedule",
    "PREFECT_HOME": f"{WRITABLE}/loraline/prefect",
}


def process(template: Template, gpu: bool) -> None:
    """Runs in the worker's own environment; image and resources are the worker's."""
    variables = template["variables"]["properties"]
    variables["env"]["default"] = SIGNS_OF_LIFE
    # A temporary folder would hide the store of a relative file:// URL.
    variables["working_dir"]["description"] = "Where runs start; relative paths in a configuration are relative to it."


def docker(template: Template, gpu: bool) -> None:
    job, variables = template["job_configuration"], template["variables"]["properties"]
    _image(template)
    variables["env"]["default"] = ENVIRONMENT
    variables["image_pull_policy"]["default"] = "IfNotPresent"
    variables["memory"] = _text("Memory limit, such as 16G.", None)
    variables["shm"] = _text("Size of /dev/shm.", "8g" if gpu else "1g")
    variables["read_only"] = _value(
        "boolean", "Mount the root file system read-only (give tmpfs for /tmp then).", False
    )
    variables["tmpfs"] = _value("object", 'File systems in memory, such as {"/tmp": "size=32g"}.', {})
    del variables["mem_limit"], variables["privileged"], variables["container_create_kwargs"]
    job["mem_limit"] = "{{ memory }}"
    job["privileged"] = False
    job["container_create_kwargs"] = {
        "shm_size": "{{ shm }}",
        "read_only": "{{ read_only }}",
        "tmpfs": "{{ tmpfs }}",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
    }
    if gpu:
        variables["gpu_count"] = _value("integer", "GPUs for each container; -1 is all of the machine.", -1)
        variables["gpu_driver"] = _text("The container runtime's name of the GPU driver.", "nvidia")
        job["container_create_kwargs"]["device_requests"] = [
            {"driver": "{{ gpu_driver }}", "count": "{{ gpu_count }}", "capabilities": [["gpu"]]}
        ]


def kubernetes(template: Template, gpu: bool) -> None:
    job, variables = template["job_configuration"], template["variables"]["properties"]
    _image(template)
    variables["env"]["default"] = ENVIRONMENT
    variables["namespace"]["default"] = "loraline"
    variables["service_account_name"]["default"] = "loraline"
    # 0: Prefect starts an evicted run again. Were Kubernetes to do so as well, two pods would work on one run.
    variables["backoff_limit"] |= {"default": 0, "maximum": 0}
    variables["finished_job_ttl"]["default"] = 86400
    # Pulling an image of several GB onto a node that has only just been made takes minutes.
    variables["pod_watch_timeout_seconds"]["default"] = 1800
    for name in ("cpu_request", "cpu_limit", "memory_request", "memory_limit"):
        del variables[name]
    variables["cpus"] = _text("CPU request; there is no CPU limit, an idle core may be used.", "4" if gpu else "2")
    variables["memory"] = _text("Memory request and limit.", "32G" if gpu else "8G")
    variables["scratch"] = _text("Ephemeral storage: caches and shards being made, all below /tmp.", "100Gi")
    variables["shm"] = _text("Size of /dev/shm, in memory.", "8Gi" if gpu else "1Gi")
    variables["termination_grace_s"] = _value("integer", "Seconds between SIGTERM and SIGKILL.", GRACE_S)
    variables["timeout_s"] = _value("integer", "Ends a job that runs longer than this many seconds.", None)
    variables["env_from"] = _value(
        "array",
        "Secrets and config maps by reference, each as environment variables.",
        [{"secretRef": {"name": "loraline", "optional": True}}],
    )
    variables["secret_env"] = _value(
        "array",
        'Single keys of secrets: [{"name": ..., "valueFrom": {"secretKeyRef": {"name": ..., "key": ...}}}].',
        [],
    )
    variables["node_selector"] = _value("object", "Labels that a node must have.", {})
    variables["tolerations"] = _value(
        "array",
        "Taints that are put up with.",
        [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}] if gpu else [],
    )
    variables["affinity"] = _value("object", "Affinity of the pod.", None)
    variables["priority_class"] = _text("Priority class of the pod.", None)
    variables["runtime_class"] = _text("Runtime class of the pod (some clusters want 'nvidia').", None)
    variables["image_pull_secrets"] = _value("array", "Secrets to pull the image with.", [])
    variables["pod_annotations"] = _value(
        "object",
        "Annotations of the pod; by default autoscalers do not move it to tidy up.",
        {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"},
    )
    resources: dict[str, Any] = {"memory": "{{ memory }}", "ephemeral-storage": "{{ scratch }}"}
    if gpu:
        variables["gpus"] = _text("GPUs for each pod.", "1")
        resources["nvidia.com/gpu"] = "{{ gpus }}"
    manifest = job["job_manifest"]
    manifest["spec"]["activeDeadlineSeconds"] = "{{ timeout_s }}"
    manifest["spec"]["template"]["metadata"] = {"annotations": "{{ pod_annotations }}"}
    pod = manifest["spec"]["template"]["spec"]
    # The default template has these two in the pod, where Kubernetes does not know them; they belong to the job.
    manifest["spec"]["completions"], manifest["spec"]["parallelism"] = pod.pop("completions"), pod.pop("parallelism")
    pod |= {
        "terminationGracePeriodSeconds": "{{ termination_grace_s }}",
        "automountServiceAccountToken": False,
        "nodeSelector": "{{ node_selector }}",
        "tolerations": "{{ tolerations }}",
        "affinity": "{{ affinity }}",
        "priorityClassName": "{{ priority_class }}",
        "runtimeClassName": "{{ runtime_class }}",
        "imagePullSecrets": "{{ image_pull_secrets }}",
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": UID,
            "runAsGroup": UID,
            "fsGroup": UID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "{{ shm }}"}},
            {"name": "scratch", "emptyDir": {"sizeLimit": "{{ scratch }}"}},
        ],
    }
    pod["containers"][0] |= {
        # The worker puts `env` in front of a list that it finds here.
        "env": "{{ secret_env }}",
        "envFrom": "{{ env_from }}",
        "resources": {"requests": {"cpu": "{{ cpus }}", **resources}, "limits": resources},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "shm", "mountPath": SHARED}, {"name": "scratch", "mountPath": WRITABLE}],
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def ecs(template: Template, gpu: bool) -> None:
    job, variables = template["job_configuration"], template["variables"]["properties"]
    _image(template)
    variables["env"]["default"] = ENVIRONMENT
    variables["container_name"]["default"] = "loraline"
    variables["auto_deregister_task_definition"]["default"] = True
    # `memory` is a text like 16G in the other kinds of pool: the two names must not meet.
    variables["task_cpu_units"] = variables.pop("cpu") | {
        "description": "CPU of the task: 1024 is one core.",
        "default": 7168 if gpu else 4096,
    }
    variables["task_memory_mib"] = variables.pop("memory") | {
        "description": "Memory of the task in MiB; leave the machine's agent about a tenth.",
        "default": 28672 if gpu else 16384,
    }
    variables["secrets"] = _value(
        "array",
        'Secrets by reference: [{"name": "HF_TOKEN", "valueFrom": "arn:aws:secretsmanager:..."}].',
        [],
    )
    container, override = job["task_definition"]["containerDefinitions"][0], job["task_run_request"]["overrides"]
    for place in (job["task_definition"], override, override["containerOverrides"][0]):
        place |= {"cpu": "{{ task_cpu_units }}", "memory": "{{ task_memory_mib }}"}
    container |= {"essential": True, "secrets": "{{ secrets }}", "stopTimeout": GRACE_S}
    if not gpu:
        variables["scratch_gib"] = _value("integer", "Ephemeral storage of a Fargate task, 21 to 200 GiB.", 100)
        job["task_definition"]["ephemeralStorage"] = {"sizeInGiB": "{{ scratch_gib }}"}
        return
    # Fargate has no GPUs: the task goes to EC2 machines that a capacity provider starts and stops.
    variables["launch_type"]["default"] = "EC2"
    variables["capacity_provider_strategy"] |= {
        "default": [{"capacityProvider": "loraline-gpu", "weight": 1, "base": 0}],
        "description": "The capacity provider of the cluster's GPU machines.",
    }
    variables["gpus"] = _text("GPUs for each task.", "1")
    variables["shm_mib"] = _value("integer", "Size of /dev/shm in MiB.", 8192)
    container |= {
        "resourceRequirements": [{"type": "GPU", "value": "{{ gpus }}"}],
        "linuxParameters": {"sharedMemorySize": "{{ shm_mib }}"},
    }
    job["task_definition"]["requiresCompatibilities"] = ["EC2"]


def vertex(template: Template, gpu: bool) -> None:
    variables = template["variables"]["properties"]
    _image(template)
    variables["env"]["default"] = ENVIRONMENT
    variables["machine_type"]["default"] = "g2-standard-16" if gpu else "n2-standard-8"
    if gpu:
        variables["accelerator_type"]["default"] = "NVIDIA_L4"
        variables["accelerator_count"]["default"] = 1
    variables["boot_disk_size_gb"]["default"] = 200
    variables["maximum_run_time_hours"]["default"] = 48
    variables["scheduling"]["description"] = 'Such as {"strategy": "SPOT"} for machines that may be taken away.'
    variables["service_account_name"]["description"] = "Service account that the stage runs as."


KINDS: dict[str, Callable[[Template, bool], None]] = {
    "process": process,
    "docker": docker,
    "kubernetes": kubernetes,
    "ecs": ecs,
    "vertex": vertex,
}


def names(kind: str) -> dict[str, bool]:
    """The files of a kind, and whether each is for GPUs. A process has no resources: one template serves both pools."""
    return {"process": False} if kind == "process" else {f"{kind}-cpu": False, f"{kind}-gpu": True}


def worker_class(kind: str) -> Any:
    """The worker's class.

    Raises:
        ImportError: its package is not installed.
    """
    module, _, name = WORKERS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def make(kind: str, gpu: bool) -> Template:
    """The base job template of a kind of pool.

    Raises:
        ImportError: the worker's package is not installed.
    """
    template = _without_prose(copy.deepcopy(worker_class(kind).get_default_base_job_template()))
    KINDS[kind](template, gpu)
    return template


def _without_prose(value: Any, inside_properties: bool = False) -> Any:
    """Drops descriptions and examples (but not a variable that happens to be called so): the form shows titles, and
    what needs saying is said above."""
    if isinstance(value, dict):
        return {
            key: _without_prose(part, key == "properties")
            for key, part in value.items()
            if inside_properties or key not in ("description", "examples")
        }
    return [_without_prose(part) for part in value] if isinstance(value, list) else value


def _image(template: Template) -> None:
    """The image must be named: a default would be another program's."""
    variables = template["variables"]
    variables["properties"]["image"] = {
        "type": "string",
        "title": "Image",
        "description": "loraline's image: target cpu, cuda or rocm of the Dockerfile.",
    }
    variables["required"] = sorted({*variables.get("required", []), "image"})


def _value(kind: str, description: str, default: Any) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": kind, "description": description}
    if default is None:
        return {"anyOf": [{"type": kind}, {"type": "null"}], "description": description, "default": None}
    return schema | {"default": default}


def _text(description: str, default: str | None) -> dict[str, Any]:
    return _value("string", description, default)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is out of date")
    check = parser.parse_args().check
    stale = []
    for kind in KINDS:
        for name, gpu in names(kind).items():
            path, text = FOLDER / f"{name}.json", json.dumps(make(kind, gpu), indent=2) + "\n"
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(name)
                if not check:
                    path.write_text(text, encoding="utf-8")
    print(f"{'out of date' if check else 'written'}: {', '.join(stale) or 'none'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
