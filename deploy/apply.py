#!/usr/bin/env python3
"""Makes the work pools cpu and gpu of a kind, all deployments, and what ends runs that nobody works on.

    deploy/apply.py KIND [GPUS]

KIND is process, docker, kubernetes, ecs or vertex. GPUS is how many stages may use a GPU at the same time (1). May be
run again at any time: everything is updated, sensors (deploy/sensor.py) with their configurations and schedules kept.

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

HERE = Path(__file__).parent
# By our names: those of Prefect's workers.
TYPES = {"process": "process", "docker": "docker", "kubernetes": "kubernetes", "ecs": "ecs", "vertex": "vertex-ai"}


def make_pools(kind: str, gpus: int) -> str | None:
    """Makes both pools with the base job templates of deploy/work-pools, or brings them up to date: one that is paused
    stays so, and `cpu` keeps a limit that somebody gave it.

    Returns:
        What is in the way.
    """
    # Prefect reads its settings when it is imported.
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        for name, limits in (("cpu", {}), ("gpu", {"concurrency_limit": gpus})):
            file = HERE / "work-pools" / ("process.json" if kind == "process" else f"{kind}-{name}.json")
            template = json.loads(file.read_text(encoding="utf-8"))
            try:
                found = client.read_work_pool(name)
            except ObjectNotFound:
                client.create_work_pool(
                    WorkPoolCreate(name=name, type=TYPES[kind], base_job_template=template, **limits)
                )
            else:
                if found.type != TYPES[kind]:
                    return (
                        f"the work pool {name!r} is there already, of type {found.type}, and a pool's type cannot be "
                        f"changed: end its workers and `prefect work-pool delete {name}`, then apply again"
                    )
                client.update_work_pool(name, WorkPoolUpdate(base_job_template=template, **limits))
            print(f"work pool {name!r}: {kind}" + (f", {gpus} at the same time" if limits else ""))
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=TYPES)
    parser.add_argument("gpus", nargs="?", type=int, default=1)
    arguments = parser.parse_args()
    if not os.environ.get("PREFECT_API_URL"):
        parser.error(
            "PREFECT_API_URL is not set: the address of your Prefect server, such as http://127.0.0.1:4200/api"
        )
    if not os.environ.get("LORALINE_IMAGE"):
        if arguments.kind != "process":
            parser.error("LORALINE_IMAGE is not set: the image that stages run in, such as registry/loraline:1.0-cpu")
        # A process runs in its worker's own environment: there is no image to name.
        os.environ["LORALINE_IMAGE"] = "none"
    os.environ["LORALINE_GPU_IMAGE"] = os.environ.get("LORALINE_GPU_IMAGE") or os.environ["LORALINE_IMAGE"]
    os.environ["LORALINE_REVISION"] = os.environ.get("LORALINE_REVISION") or "unknown"
    if problem := make_pools(arguments.kind, arguments.gpus):
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
    # Beside this file, as `python deploy/apply.py` finds them.
    import automations
    import sensor

    sensor.renew()
    automations.apply_all()
    return 0


if __name__ == "__main__":
    sys.exit(main())
