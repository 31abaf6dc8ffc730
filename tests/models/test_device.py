"""Devices, threads, and batches that shrink."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch

from stages.core.errors import ConfigError
from stages.models import device as device_module
from stages.models.device import cpu_limit, is_out_of_memory, pick_device, set_threads, torch_dtype
from stages.models.halving import HalvingBatches

CPU = torch.device("cpu")


def test_devices_are_picked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    assert pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda", 0)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"latents\.device: cuda:2 is asked for, this machine has cuda:0, cuda:1"):
        pick_device("cuda:2", "latents.device")


@pytest.mark.parametrize(
    ("name", "message"),
    [("cuda", "sees no GPU here"), ("gpu", "is no device"), ("mps", "no Metal device"), ("meta", "is no device")],
)
def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"embeds\.device: .*{message}"):
        pick_device(name, "embeds.device")


def test_types_by_name() -> None:
    assert (torch_dtype("fp32"), torch_dtype("no"), torch_dtype("bf16")) == (
        torch.float32,
        torch.float32,
        torch.bfloat16,
    )


@pytest.mark.parametrize(
    ("files", "membership", "quota"),
    [
        ({"cpu.max": "200000 100000\n"}, "0::/\n", 2.0),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, "0::/a/b\n", 3.0),
        ({"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "50000 100000\n"}, "0::/a/b\n", 0.5),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu,cpuacct:/\n", 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu,cpuacct:/\n", None),
        ({}, "", None),
    ],
)
def test_a_containers_quota_is_read(
    tmp_path: Path, files: dict[str, str], membership: str, quota: float | None
) -> None:
    for name, content in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(content)
    (tmp_path / "self").write_text(membership)
    assert device_module._cgroup_quota(tmp_path / "cgroup", tmp_path / "self") == quota


def test_threads_follow_the_quota_and_a_person_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr(device_module.os, "sched_getaffinity", lambda _: set(range(8)))
        monkeypatch.setattr(device_module, "_cgroup_quota", lambda *_: 2.5)
        assert cpu_limit() == 3
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert set_threads() == 3 == torch.get_num_threads()
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert set_threads() == 1 == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def test_out_of_memory_is_known_in_all_its_forms() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_batches_shrink_and_stay_small() -> None:
    sizes: list[int] = []
    warnings: list[str] = []

    def work(part: slice) -> list[int]:
        numbers = list(range(100))[part]
        sizes.append(len(numbers))
        if len(numbers) > 3:
            raise torch.OutOfMemoryError("too many")
        return numbers

    batches = HalvingBatches(8, CPU, warnings.append, "Buy more.")
    assert list(chain(*batches.run(7, work))) == list(range(7))
    assert sizes == [7, 3, 3, 1]
    assert len(warnings) == 1
    sizes.clear()
    assert list(chain(*batches.run(5, work))) == list(range(5))
    assert sizes == [3, 2]


def test_other_errors_pass_and_a_single_item_that_does_not_fit_is_final() -> None:
    def wrong(part: slice) -> None:
        raise RuntimeError("shapes do not match")

    def full(part: slice) -> None:
        raise torch.OutOfMemoryError("too many")

    batches = HalvingBatches(4, CPU, lambda _: None, "Buy more.")
    with pytest.raises(RuntimeError, match="shapes"):
        batches.run(4, wrong)
    with pytest.raises(ConfigError, match=r"no memory for a single one .*Buy more"):
        batches.run(4, full)
