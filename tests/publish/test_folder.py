"""Publishing into a folder: whole, idempotent, and careful with what is not ours."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from stages.core.errors import ConfigError, InputError
from stages.core.fingerprint import digest_file
from stages.publish import folder as folder_module
from tests.publish.conftest import ADAPTER, Bench, make_bench, picture


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout_and_record(bench: Bench) -> None:
    manifest = bench.run()
    out = bench.root / "out"
    files = contents(out)
    assert set(files) == {
        "README.md",
        "loraline.json",
        "evaluation.json",
        "train.jsonl",
        ADAPTER,
        *(f"images/{side}-{index}.png" for side in ("before", "after") for index in (0, 1)),
    }
    assert files[ADAPTER] == b"adapter " * 500
    assert files["images/before-1.png"] == picture("grey", 1)
    assert files["images/after-1.png"] == picture("red", 1)
    record = json.loads(files["loraline.json"])
    assert record["files"][ADAPTER]["sha256"] == digest_file(out / ADAPTER)
    assert set(record["files"]) == set(files) - {"loraline.json"}
    assert set(record["artifacts"]) == {"download[photos]", "bucket[photos]", "latents[photos]", "embeds", "train"}
    train = bench.manifests["train", None]
    assert record["artifacts"]["train"]["fingerprint"] == train.fingerprint
    assert record["artifacts"]["train"]["digest"] == train.digest()
    assert record["artifacts"]["train"]["code_revision"] == "abc123"
    assert manifest.info["files"]["loraline.json"]["sha256"] == digest_file(out / "loraline.json")
    assert bench.stage.still_there(bench.setting, manifest) is None


def test_data_sets_that_share_an_artifact_are_both_in_the_record(tmp_path: Path) -> None:
    """Two data sets of the same source and settings: the manifest tells of the one that was first."""
    source = {"type": "local", "path": str(tmp_path / "photos")}
    datasets = [{"id": name, "source": source} for name in ("photos", "twins")]
    bench = make_bench(tmp_path, {"target": "folder", "path": str(tmp_path / "out")}, datasets=datasets)
    bench.manifests["download", "twins"] = bench.manifests["download", "photos"]
    bench.run()
    record = json.loads((bench.root / "out" / "loraline.json").read_text())
    assert record["artifacts"]["download[twins]"] == record["artifacts"]["download[photos]"]


def test_twice_is_once(bench: Bench) -> None:
    bench.run()
    before = {path: path.stat().st_ino for path in (bench.root / "out").rglob("*")}
    bench.run(force=True)
    assert {path: path.stat().st_ino for path in (bench.root / "out").rglob("*")} == before


def test_an_older_adapter_is_replaced_and_foreign_files_stay(bench: Bench) -> None:
    bench.run()
    out = bench.root / "out"
    (out / "notes.txt").write_text("mine")
    (out / "images" / "holiday.png").write_bytes(b"mine too")
    bench.config = bench.config.model_copy(
        update={"validation": bench.config.validation.model_copy(update={"prompts": ["one only"]})}
    )
    bench.train(adapter=b"newer " * 100)
    bench.run()
    files = contents(out)
    assert files[ADAPTER] == b"newer " * 100
    assert files["notes.txt"] == b"mine"
    assert {name for name in files if name.startswith("images/")} == {
        "images/before-0.png",
        "images/after-0.png",
        "images/holiday.png",
    }
    assert not [name for name in files if ".loraline-publish" in name]


def test_a_record_of_somebody_else_deletes_nothing(bench: Bench) -> None:
    out = bench.root / "out"
    out.mkdir()
    precious = bench.root / "precious.txt"
    precious.write_text("keep")
    (out / "own.txt").write_text("keep")
    names = ["../precious.txt", str(precious), "own.txt", "images/../own.txt", "images/../../precious.txt"]
    (out / "loraline.json").write_text(json.dumps({"files": {name: {} for name in names}}))
    bench.run()
    assert precious.exists()
    assert (out / "own.txt").exists()


@pytest.mark.parametrize("damage", ["delete", "change", "folder"])
def test_a_changed_adapter_is_noticed_and_made_good(bench: Bench, damage: str) -> None:
    manifest = bench.run()
    out = bench.root / "out"
    if damage == "delete":
        (out / ADAPTER).unlink()
    elif damage == "change":
        data = bytearray((out / ADAPTER).read_bytes())
        data[7] ^= 1
        (out / ADAPTER).write_bytes(data)
    else:
        out.rename(bench.root / "moved")
    reason = bench.stage.still_there(bench.setting, manifest)
    assert reason is not None
    assert ADAPTER in reason
    bench.run()
    assert (out / ADAPTER).read_bytes() == b"adapter " * 500
    assert bench.stage.still_there(bench.setting, manifest) is None


def test_a_card_that_was_edited_by_hand_is_left(bench: Bench) -> None:
    manifest = bench.run()
    (bench.root / "out" / "README.md").write_text("my own words")
    assert bench.stage.still_there(bench.setting, manifest) is None
    bench.run()
    assert (bench.root / "out" / "README.md").read_text() == "my own words"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("at", range(0, 9, 2))
def test_a_failure_half_way_leaves_nothing_half_done(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, existing: bool, at: int
) -> None:
    out = bench.root / "out"
    if existing:
        bench.run()
        before = contents(out)
        bench.train(adapter=b"newer " * 100)
    copied = 0
    true_copy = folder_module._copy

    def failing_copy(item: object, folder: Path) -> None:
        nonlocal copied
        if copied == (min(at, 2) if existing else at):
            raise OSError(28, os.strerror(28))
        copied += 1
        true_copy(item, folder)  # type: ignore[arg-type]

    monkeypatch.setattr(folder_module, "_copy", failing_copy)
    with pytest.raises(ConfigError, match="No space left"):
        bench.run()
    if existing:
        assert contents(out) == before
    else:
        assert not out.exists()
    assert not list(bench.root.rglob(".loraline-publish*"))
    monkeypatch.setattr(folder_module, "_copy", true_copy)
    bench.run()
    assert contents(out)[ADAPTER] == (b"newer " * 100 if existing else b"adapter " * 500)


def test_bad_targets_are_found_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (str(tmp_path / "file"), str(tmp_path / "file" / "below")):
        bench = make_bench(tmp_path, {"path": path})
        with pytest.raises(ConfigError, match=r"publish\.path"):
            bench.stage.check(bench.setting)
    bench = make_bench(tmp_path, {"path": str(tmp_path / "new" / "deep")})
    bench.stage.check(bench.setting)
    assert not (tmp_path / "new").exists()


def test_no_adapter_is_an_error(bench: Bench) -> None:
    train = bench.manifests["train", None]
    bench.manifests["train", None] = train.model_copy(
        update={"files": [file for file in train.files if file.name != ADAPTER]}
    )
    with pytest.raises(InputError, match="holds no pytorch_lora_weights"):
        bench.run()
    assert not (bench.root / "out").exists()
