"""Is this machine (or this container) fit to run stages? What `loraline doctor` looks at, one function a check.

A check never raises: what it finds wrong is its answer. "fail" means that stages will fail here, "warn" that they may,
or that they will be slow; "skip" that there is nothing to look at.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stages.core.errors import LoralineError
from stages.core.runner import code_revision
from stages.core.store import Store, StoreSection

Status = Literal["ok", "warn", "fail", "skip"]

# What stages import, by import name; none of them is needed to start the command line.
LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "optimum.quanto",
    "safetensors",
    "sentencepiece",
    "google.protobuf",
    "pyvips",
    "isal",
    "PIL",
    "webdataset",
    "s3fs",
    "huggingface_hub",
    "tensorboard",
)
# A text file of `name==version` lines that this installation is meant to match; images set it.
PINS = "LORALINE_CONSTRAINTS"
LEAST_FREE = 2e9
GOOD_FREE = 20e9


@dataclass(frozen=True)
class Finding:
    """The answer of one check."""

    check: str
    status: Status
    text: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Options:
    """What the person asked for."""

    gpu: bool = False
    """No GPU is a failure."""
    store: StoreSection | None = None
    """A store to write to and read from."""


Check = Callable[[Options], tuple[Status, str]]


def check_python(options: Options) -> tuple[Status, str]:
    """The interpreter, and which loraline this is."""
    version = ".".join(map(str, sys.version_info[:3]))
    try:
        loraline = metadata.version("loraline")
    except metadata.PackageNotFoundError:
        return "warn", f"Python {version}; loraline runs from a folder, it is not installed"
    revision = code_revision()
    return "ok", f"Python {version}, loraline {loraline}" + (f" ({revision[:12]})" if revision else "")


def check_libraries(options: Options) -> tuple[Status, str]:
    """Everything that a stage may import can be imported."""
    broken = []
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except Exception as error:  # a library may break in any way while it is imported
            broken.append(f"{name} ({type(error).__name__}: {error})")
    if broken:
        return "fail", f"cannot import {'; '.join(broken)}"
    return "ok", f"{len(LIBRARIES)} libraries can be imported"


def check_versions(options: Options) -> tuple[Status, str]:
    """Installed versions are the tested ones, where the image says which those are."""
    path = os.environ.get(PINS)
    if not path:
        return "skip", f"{PINS} names no list of tested versions"
    try:
        pins = read_pins(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        return "fail", f"{PINS}={path}: {error.strerror}"
    other, missing = [], 0
    for name, wanted in pins.items():
        found = _installed(name)
        if found is None:
            missing += 1  # a list of what was tested together holds more than any one image
            continue
        # 2.13.0 is meant by 2.13.0+cpu and by 2.13.0+cu130 as well.
        if found.partition("+")[0] != wanted:
            other.append(f"{name} {found}, tested with {wanted}")
    if other:
        return "warn", "; ".join(other)
    return "ok", f"{len(pins) - missing} libraries have the tested versions"


def _installed(name: str) -> str | None:
    """The installed version; None where it is not installed, but for a copy that another library brings for itself."""
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    return None if "_vendor" in Path(str(distribution.locate_file(""))).parts else distribution.version


def read_pins(text: str) -> dict[str, str]:
    """The `name==version` lines of a constraints file."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return dict(re.split("===?", line, maxsplit=1) for line in lines if "==" in line)


def check_device(options: Options) -> tuple[Status, str]:
    """The device that `auto` picks can compute, and what it is."""
    import torch

    from stages.models.device import cpu_limit, pick_device

    try:
        device = pick_device("auto")
        ones = torch.ones(64, 64, device=device)
        total = float((ones @ ones).sum())
    except Exception as error:  # a driver may fail in any way
        return "fail", f"PyTorch {torch.__version__} cannot compute here: {error}"
    if total != 64**3:
        return "fail", f"{device} computes wrongly: the sum of a product of ones is {total}, not {64**3}"
    if device.type != "cuda":
        build = torch.version.cuda or torch.version.hip
        text = f"PyTorch {torch.__version__} on {cpu_limit()} CPU cores"
        text += ", no GPU is seen" + ("" if build else " (this build has no GPU support)")
        return ("fail" if options.gpu else "warn" if build else "ok"), text
    cards = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        cards.append(f"{card.name}, {card.total_memory / 1e9:.0f} GB")
    return "ok", f"PyTorch {torch.__version__}: {'; '.join(cards)}"


def check_precisions(options: Options) -> tuple[Status, str]:
    """Every precision level quantises and computes here: without a compiler, without writing anywhere."""
    import torch
    from torch import nn

    from stages.models.device import pick_device
    from stages.models.quantise import LEVELS

    device = pick_device("auto")
    works, other = [], []
    for name, level in LEVELS.items():
        reason = level.available()
        if reason:
            other.append(f"{name}: {reason}")
            continue
        try:
            torch.manual_seed(0)
            linear = nn.Linear(256, 64, device=device, dtype=torch.float32)
            x_BI = torch.randn(8, 256, device=device)
            with torch.no_grad():
                exact_BO = linear(x_BI)
                error = float((level.quantised(linear)(x_BI) - exact_BO).norm() / exact_BO.norm())
        except Exception as problem:  # kernels fail in their own ways
            return "fail", f"{name}: {type(problem).__name__}: {problem}"
        if not error < 0.6:  # 2 bits of random weights; what is broken is above 1, or no number
            return "fail", f"{name}: a layer's output is off by {error:.0%}"
        works.append(f"{name} (error {error:.1%})")
    return ("warn" if other else "ok"), "; ".join([", ".join(works), *other])


def check_folders(options: Options) -> tuple[Status, str]:
    """The folders that libraries write to can be written to."""
    home = Path.home()
    folders = {
        "temporary files": Path(tempfile.gettempdir()),
        "HOME": home,
        "HF_HOME": Path(os.environ.get("HF_HOME", home / ".cache" / "huggingface")),
        "PREFECT_HOME": Path(os.environ.get("PREFECT_HOME", home / ".prefect")),
        "store.cache_dir": Path((options.store or StoreSection()).cache_dir).expanduser(),
    }
    broken = []
    for name, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"loraline")
        except OSError as error:
            broken.append(f"{name} {folder}: {error.strerror}")
    if broken:
        return "fail", "; ".join(broken) + ". Mount a writable folder there, or point the variable elsewhere"
    return "ok", ", ".join(f"{name} {folder}" for name, folder in folders.items())


def check_disk(options: Options) -> tuple[Status, str]:
    """Room for shards that are being made, for the read-through cache, for the base model's weights."""
    cache = Path((options.store or StoreSection()).cache_dir).expanduser()
    free = {}
    for folder in (Path(tempfile.gettempdir()), cache):
        there = next(parent for parent in [folder, *folder.parents] if parent.exists())
        free[str(folder)] = float(shutil.disk_usage(there).free)
    text = ", ".join(f"{folder} {amount / 1e9:.1f} GB free" for folder, amount in free.items())
    least = min(free.values())
    if least < LEAST_FREE:
        return "fail", f"{text}; at least {LEAST_FREE / 1e9:.0f} GB are needed"
    return ("ok" if least >= GOOD_FREE else "warn"), text


def check_store(options: Options) -> tuple[Status, str]:
    """The store can be written to and read from, and keeps create-only writes."""
    if options.store is None:
        return "skip", "no store is named (--config, --store or LORALINE__STORE__URL)"
    try:
        warning = Store(options.store).probe()
    except LoralineError as error:
        return "fail", str(error)
    except Exception as error:  # whatever a file system's driver raises
        return "fail", f"{options.store.url}: {type(error).__name__}: {error}"
    return ("warn", warning) if warning else ("ok", f"{options.store.url}: writes, reads, and keeps create-only writes")


CHECKS: dict[str, Check] = {
    "python": check_python,
    "libraries": check_libraries,
    "versions": check_versions,
    "device": check_device,
    "precisions": check_precisions,
    "folders": check_folders,
    "disk": check_disk,
    "store": check_store,
}


def examine(options: Options) -> Iterator[Finding]:
    """All checks, one after the other."""
    for name, check in CHECKS.items():
        started = time.monotonic()
        try:
            with _quiet():
                status, text = check(options)
        except Exception as error:  # a check that breaks is a finding too
            status, text = "fail", f"{type(error).__name__}: {error}"
        yield Finding(name, status, text, round(time.monotonic() - started, 3))


@contextmanager
def _quiet() -> Iterator[None]:
    """Libraries print as they are imported; standard output belongs to the answer."""
    before, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout = before


def report(options: Options, as_json: bool = False) -> bool:
    """Runs all checks and prints what they found; whether stages can run here."""
    findings = []
    console = Console()
    for finding in examine(options):
        findings.append(finding)
        if not as_json:
            _print(console, finding)
    healthy = all(finding.status != "fail" for finding in findings)
    if as_json:
        record: dict[str, Any] = {"healthy": healthy, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(record, indent=1))
    else:
        console.print("\n[green]fit to run stages[/]" if healthy else "\n[bold red]not fit to run stages[/]")
    return healthy


_MARKS = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[bold red]fail[/]", "skip": "[dim]-[/]"}


def _print(console: Console, finding: Finding) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=10)
    table.add_column(width=4)
    table.add_column(overflow="fold")
    table.add_row(finding.check, _MARKS[finding.status], escape(finding.text))
    console.print(table)
