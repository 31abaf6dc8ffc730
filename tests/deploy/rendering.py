"""Renders a committed base job template as a worker does before it starts a run, without a server."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun

ROOT = Path(__file__).parent.parent.parent


def load_script(name: str) -> ModuleType:
    """A script of deploy/ as a module (the folder is no package: it is not installed)."""
    specification = importlib.util.spec_from_file_location(f"deploy_{name}", ROOT / "deploy" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


make_templates = load_script("make_templates")
FILES = {name: (kind, gpu) for kind in make_templates.KINDS for name, gpu in make_templates.names(kind).items()}


def worker_class(kind: str) -> Any:
    """The worker of a kind; where its package is missing the test is skipped, and says so."""
    try:
        return make_templates.worker_class(kind)
    except ImportError as error:
        pytest.skip(f"the {kind} worker is not installed ({error}): pip install -c docker/constraints.txt '.[deploy]'")


def template(name: str) -> dict[str, Any]:
    """A committed base job template."""
    return dict(json.loads((ROOT / "deploy" / "work-pools" / f"{name}.json").read_text(encoding="utf-8")))


def flow_run() -> FlowRun:
    return FlowRun(id=uuid4(), flow_id=uuid4(), deployment_id=uuid4(), name="latents[photos] 1/4")


def rendered(name: str, **variables: Any) -> Any:
    """The job configuration that a worker of that pool makes of these job variables."""
    worker = worker_class(FILES[name][0])
    # Nothing in the templates refers to the server, so whatever stands for its client is never used.
    configuration = asyncio.run(
        worker.job_configuration.from_template_and_values(template(name), variables, client=object())
    )
    configuration.prepare_for_flow_run(flow_run())
    return configuration


def placeholders(value: Any) -> set[str]:
    """Names of all variables that a template uses."""
    from prefect.utilities.templating import find_placeholders

    return {placeholder.name for placeholder in find_placeholders(value)}
