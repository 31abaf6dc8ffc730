"""Devices, number types and threads: what the machine has, and what of it a stage may use."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stages.core.errors import ConfigError

if TYPE_CHECKING:  # torch takes a second to import: every function here imports it late, so that `--help` does not
    import torch

Precision = Literal["fp32", "bf16"]

_OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")


def pick_device(name: str = "auto", field: str = "device") -> torch.device:
    """The device of a name: 'auto' is the first GPU where there is one, else the CPU.

    Args:
        name: 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', ... (an AMD GPU is a 'cuda' device to PyTorch as well).
        field: the configuration field that the name comes from, for messages.

    Raises:
        ConfigError: no such kind of device, or this machine (or this build of PyTorch) does not have it.
    """
    import torch

    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{field}: {name!r} is no device; give auto, cpu, cuda or cuda:0, cuda:1, ...") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ConfigError(
                f"{field}: {name} is asked for, but PyTorch {torch.__version__} sees no GPU here. Check the driver and "
                f"that this is a CUDA or ROCm build of PyTorch, or set {field} to auto or cpu."
            )
        if device.index is not None and device.index >= count:
            names = ", ".join(f"cuda:{index}" for index in range(count))
            raise ConfigError(f"{field}: {name} is asked for, this machine has {names}")
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"{field}: {name} is asked for, but PyTorch has no Metal device here; set it to auto or cpu")
    if device.type not in ("cpu", "mps"):
        raise ConfigError(f"{field}: {name!r} is no device that loraline works on; give auto, cpu, cuda, cuda:1, ...")
    return device


def torch_dtype(precision: str) -> torch.dtype:
    """The PyTorch type of a configuration's 'fp32', 'bf16' or 'no' (mixed precision switched off: fp32).

    Raises:
        KeyError: another name; configurations are typed, so that is a mistake in the code.
    """
    import torch

    return {"fp32": torch.float32, "no": torch.float32, "bf16": torch.bfloat16}[precision]


def cpu_limit() -> int:
    """Cores that this process may really use: those it is allowed to run on, and no more than its control group's
    quota pays for. A container started with `--cpus 2` still sees all of the machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return max(1, cores if quota is None else min(cores, round(quota + 0.49)))


def _cgroup_quota(root: Path, membership: Path) -> float | None:
    """CPU quota in cores, the smallest on the way from this process's control group to the root; None without one.

    Version 2 has 'cpu.max' ("200000 100000" or "max 100000"), version 1 a pair of files under 'cpu/'.
    """
    groups = {Path("/")}
    try:
        for line in membership.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" or "cpu" in controllers.split(","):
                groups.update([Path(path), *Path(path).parents])
    except (OSError, ValueError):
        pass
    quotas: list[float] = []
    for group in groups:
        inner = str(group).lstrip("/")
        try:
            quota, period = (root / inner / "cpu.max").read_text().split()
            if quota != "max":
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError):
            pass
        try:
            used = int((root / "cpu" / inner / "cpu.cfs_quota_us").read_text())
            if used > 0:
                quotas.append(used / int((root / "cpu" / inner / "cpu.cfs_period_us").read_text()))
        except (OSError, ValueError):
            pass
    return min(quotas, default=None)


def set_threads() -> int:
    """Gives PyTorch as many CPU threads as there are cores to run them on; OMP_NUM_THREADS is a person's last word.

    Returns:
        The number of threads.
    """
    import torch

    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(wanted) if wanted.isdigit() and int(wanted) > 0 else cpu_limit()
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return threads


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device (or the machine) has no memory left."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU's allocator and cuDNN raise a plain RuntimeError, told apart by its text alone.
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY_TEXTS)


def free_memory(device: torch.device) -> None:
    """Hands back what dropped tensors held: before the next encoder is loaded, and after an out-of-memory error."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
