"""`loraline doctor`: what it finds right, and that it finds what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages import doctor
from stages.core.store import StoreSection
from stages.doctor import Finding, Options, examine, read_pins, report
from tests.servers.s3 import S3Server


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.delenv(doctor.PINS, raising=False)


def found(options: Options) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(options)}


@pytest.mark.slow
def test_a_healthy_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = StoreSection(url=f"file://{tmp_path}/store", cache_dir=str(tmp_path / "cache"))
    assert report(Options(store=store), as_json=True) is True
    answer = json.loads(capsys.readouterr().out)
    assert answer["healthy"] is True
    statuses = {finding["check"]: finding["status"] for finding in answer["findings"]}
    assert list(statuses) == list(doctor.CHECKS)
    assert statuses["libraries"] == statuses["precisions"] == statuses["folders"] == statuses["store"] == "ok"


def only(monkeypatch: pytest.MonkeyPatch, name: str, **options: Any) -> Finding:
    monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name]})
    return found(Options(**options))[name]


def test_a_library_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LIBRARIES", ("json", "no_such_library"))
    finding = only(monkeypatch, "libraries")
    assert finding.status == "fail"
    assert "no_such_library" in finding.text


def test_versions_that_were_not_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    pins = tmp_path / "constraints.txt"
    right = metadata.version("pydantic")
    pins.write_text(f"# tested\npydantic=={right}  # the models\nnot-installed-here==1.0\n")
    monkeypatch.setenv(doctor.PINS, str(pins))
    assert only(monkeypatch, "versions").text == "1 libraries have the tested versions"
    pins.write_text("pydantic==0.0.1\n")
    finding = only(monkeypatch, "versions")
    assert finding.status == "warn"
    assert f"pydantic {right}, tested with 0.0.1" in finding.text
    monkeypatch.setenv(doctor.PINS, str(tmp_path / "missing.txt"))
    assert only(monkeypatch, "versions").status == "fail"


def test_the_committed_pins_can_be_read() -> None:
    pins = read_pins((Path(__file__).parent.parent.parent / "docker" / "constraints.txt").read_text(encoding="utf-8"))
    assert {"torch", "prefect", "fastapi", "optimum-quanto"} <= set(pins)
    assert all(version[0].isdigit() for version in pins.values())


def test_a_build_of_torch_is_the_version_that_it_is_a_build_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pins").write_text("pydantic==2.0\n")
    monkeypatch.setenv(doctor.PINS, str(tmp_path / "pins"))
    monkeypatch.setattr(doctor, "_installed", lambda name: "2.0+cpu")
    assert only(monkeypatch, "versions").status == "ok"


def test_a_copy_inside_another_library_is_not_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "_vendor" / "inner_library-1.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: inner-library\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(record.parent))
    (tmp_path / "pins").write_text("inner-library==2.0\n")
    monkeypatch.setenv(doctor.PINS, str(tmp_path / "pins"))
    assert only(monkeypatch, "versions").text == "0 libraries have the tested versions"


def test_no_gpu_is_a_failure_only_for_who_wants_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert only(monkeypatch, "device").status in ("ok", "warn")
    assert only(monkeypatch, "device", gpu=True).status == "fail"


def test_every_precision_level_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.models.quantise import LEVELS

    finding = only(monkeypatch, "precisions")
    assert finding.status == "ok"
    assert all(name in finding.text for name in LEVELS)


def test_a_level_that_computes_nonsense_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn

    from stages.models import quantise

    def broken(linear: nn.Linear) -> nn.Module:
        return nn.Linear(linear.in_features, linear.out_features)

    monkeypatch.setattr(quantise, "LEVELS", {"broken": quantise.Level("broken", 8, broken)})
    finding = only(monkeypatch, "precisions")
    assert finding.status == "fail"
    assert finding.text.startswith("broken:")


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("in the way")
    monkeypatch.setenv("PREFECT_HOME", str(blocked / "prefect"))
    finding = only(monkeypatch, "folders")
    assert finding.status == "fail"
    assert "PREFECT_HOME" in finding.text
    assert "HF_HOME" not in finding.text


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage("/"))
    for free, status in ((1e9, "fail"), (10e9, "warn"), (100e9, "ok")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, free=free: usage(int(200e9), 0, int(free)))
        assert only(monkeypatch, "disk").status == status


def test_a_store_on_s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in s3.environment().items():
        monkeypatch.setenv(key, value)
    assert only(monkeypatch, "store", store=StoreSection(url=f"s3://{s3.bucket}/runs")).status == "ok"
    assert s3.keys() == [], "it leaves nothing behind"
    finding = only(monkeypatch, "store", store=StoreSection(url="s3://no-such-bucket-here/runs"))
    assert finding.status == "fail"
    assert "no-such-bucket-here" in finding.text


def test_a_store_that_overwrites(rclone: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in rclone.environment().items():
        monkeypatch.setenv(key, value)
    finding = only(monkeypatch, "store", store=StoreSection(url=f"s3://{rclone.bucket}/runs"))
    assert finding.status == "fail"
    assert "create-only" in finding.text


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def breaks(options: Options) -> Any:
        raise RuntimeError("the moon is full")

    monkeypatch.setattr(doctor, "CHECKS", {"moon": breaks})
    assert report(Options()) is False
    printed = capsys.readouterr().out
    assert "the moon is full" in printed
    assert "not fit" in printed
