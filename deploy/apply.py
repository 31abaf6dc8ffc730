#!/usr/bin/env python3
"""Makes the work pools cpu and gpu of a kind, all deployments, and what ends runs that nobody works on.

    deploy/apply.py KIND [GPUS] [--gpu-kind KIND]

KIND is process, docker, kubernetes, ecs or vertex; the pool gpu may be of another one than cpu. GPUS is how many stages
may use a GPU at the same time (1). May be run again at any time: everything is updated, sensors (deploy/sensor.py) with
their configurations and schedules kept.

PREFECT_API_URL      the server
LORALINE_IMAGE       the image of target cpu; not needed by process
LORALINE_GPU_IMAGE   that of target cuda or rocm; the same one if unset
LORALINE_REVISION    of the code in them; shown as the deployments' version
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from server import look_for_server

HERE = Path(__file__).parent
# By our names: those of Prefect's workers.
TYPES = {"process": "process", "docker": "docker", "kubernetes": "kubernetes", "ecs": "ecs", "vertex": "vertex-ai"}


def make_pools(kinds: dict[str, str], gpus: int) -> str | None:
    """Makes both pools with the base job templates of deploy/work-pools, or brings them up to date: one that is paused
    stays so, and `cpu` keeps a limit that somebody gave it.

    Args:
        kinds: of the pools, by their names.
        gpus: the limit of the pool gpu.

    Returns:
        What is in the way; nothing was changed then.
    """
    # Prefect reads its settings when it is imported.
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterName

    with get_client(sync_client=True) as client:
        chosen = WorkPoolFilter(name=WorkPoolFilterName(any_=list(kinds)))
        found = {pool.name: pool.type for pool in client.read_work_pools(work_pool_filter=chosen)}
        for name, type_ in found.items():
            if type_ != TYPES[kinds[name]]:
                return (
                    f"the work pool {name!r} is there already, of type {type_}, and a pool's type cannot be changed: "
                    f"end its workers and `prefect work-pool delete {name}`, then apply again"
                )
        for name, kind in kinds.items():
            file = HERE / "work-pools" / ("process.json" if kind == "process" else f"{kind}-{name}.json")
            template = json.loads(file.read_text(encoding="utf-8"))
            limits = {"concurrency_limit": gpus} if name == "gpu" else {}
            if name in found:
                client.update_work_pool(name, WorkPoolUpdate(base_job_template=template, **limits))
            else:
                client.create_work_pool(
                    WorkPoolCreate(name=name, type=TYPES[kind], base_job_template=template, **limits)
                )
            print(f"work pool {name!r}: {kind}" + (f", {gpus} at the same time" if limits else ""))
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=TYPES)
    parser.add_argument("gpus", nargs="?", type=int, default=1)
    parser.add_argument("--gpu-kind", choices=TYPES, help="of the pool gpu, where it is another one")
    arguments = parser.parse_args()
    kinds = {"cpu": arguments.kind, "gpu": arguments.gpu_kind or arguments.kind}
    if arguments.gpus < 1:
        parser.error("GPUS: at least 1, or no stage that wants a GPU would ever begin")
    look_for_server(parser)
    if not os.environ.get("LORALINE_IMAGE"):
        if set(kinds.values()) != {"process"}:
            parser.error("LORALINE_IMAGE is not set: the image that stages run in, such as registry/loraline:1.0-cpu")
        # A process runs in its worker's own environment: there is no image to name.
        os.environ["LORALINE_IMAGE"] = "none"
    os.environ["LORALINE_GPU_IMAGE"] = os.environ.get("LORALINE_GPU_IMAGE") or os.environ["LORALINE_IMAGE"]
    os.environ["LORALINE_REVISION"] = os.environ.get("LORALINE_REVISION") or "unknown"
    if problem := make_pools(kinds, arguments.gpus):
        print(f"error: {problem}", file=sys.stderr)
        return 64
    command = [
        sys.executable,
        "-m",
        "prefect",
        "--no-prompt",
        "deploy",
        "--all",
        "--prefect-file",
        "deploy/prefect.yaml",
    ]
    if code := subprocess.run(command, cwd=HERE.parent, check=False).returncode:
        return code
    import automations
    import sensor

    sensor.renew()
    automations.apply_all()
    return 0


if __name__ == "__main__":
    sys.exit(main())
