"""The command line: every bad input is one clear error with its exit code, before any heavy work, leaving nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from typer.testing import CliRunner, Result

from stages.cli import app
from stages.config import StageName
from stages.registry import STAGES
from tests.pictures import draw_pictures, small_config


class Desk:
    """A folder with a configuration and its pictures, and the command `loraline` over it."""

    def __init__(self, folder: Path, pictures: int) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.images.mkdir()
        if pictures:
            draw_pictures(self.images, pictures)
        self.fields: dict[str, Any] = small_config(folder, self.images).model_dump(mode="json")

    def call(self, *arguments: str) -> Result:
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.fields), encoding="utf-8")
        first, *rest = arguments
        return CliRunner().invoke(app, [first, *rest, "--config", str(path)], catch_exceptions=False)

    @property
    def stored(self) -> list[str]:
        """Everything in the store, as relative paths."""
        store = self.folder / "store"
        return sorted(str(path.relative_to(store)) for path in store.rglob("*") if path.is_file())


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path, pictures=6)


def refused(result: Result, code: int, *words: str) -> None:
    text = " ".join(result.output.split())
    assert result.exit_code == code, text
    assert "Traceback" not in text
    assert text.count("error:") == 1, text
    for word in words:
        assert word in text, text


def test_wrong_key_and_wrong_type(desk: Desk) -> None:
    desk.fields["train"]["learnign_rate"] = desk.fields["train"].pop("learning_rate")
    refused(desk.call("plan"), 78, "train.learnign_rate: unknown key; did you mean train.learning_rate?")
    del desk.fields["train"]["learnign_rate"]
    desk.fields["train"]["steps"] = "many"
    refused(desk.call("plan"), 78, "train.steps", "'many'")
    assert desk.stored == []


def test_missing_configuration() -> None:
    result = CliRunner().invoke(app, ["plan", "--config", "nowhere.yaml"])
    refused(result, 78, "nowhere.yaml: no such configuration file")


def test_missing_folder_and_empty_folder(desk: Desk, tmp_path: Path) -> None:
    desk.fields["datasets"][0]["source"]["path"] = str(tmp_path / "nowhere")
    result = desk.call("stage", "download")
    refused(result, 78, "datasets.blots.source", "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    desk.fields["datasets"][0]["source"]["path"] = str(empty)
    refused(desk.call("stage", "download"), 65, "empty")
    assert desk.stored == []


def test_all_images_refused(desk: Desk) -> None:
    for path in desk.images.glob("*.png"):
        path.write_bytes(b"<html>not found</html>")
    refused(desk.call("stage", "download"), 65, "refused")
    assert not [name for name in desk.stored if name.startswith("artifacts/")]


def test_too_few_images_for_a_batch_is_found_before_any_model_is_loaded(desk: Desk) -> None:
    desk.fields["train"].update(train_batch_size=4, gradient_accumulation_steps=2)
    assert desk.call("stage", "download").exit_code in (0, 65)
    result = desk.call("stage", "bucket")
    refused(result, 65, "8", "train_batch_size", "gradient_accumulation_steps")
    refused(desk.call("stage", "latents"), 65, "train_batch_size")
    assert not [name for name in desk.stored if name.startswith("artifacts/latents")]


def test_unknown_model(desk: Desk) -> None:
    desk.fields["model"]["pretrained_model_name_or_path"] = "/no/such/model"
    refused(desk.call("plan"), 78, "model.pretrained_model_name_or_path", "/no/such/model")


def test_a_store_that_cannot_be_written(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    desk.fields["store"]["url"] = f"file://{tmp_path}/file/store"
    refused(desk.call("stage", "download"), 73, "cannot write to the store")


def test_a_missing_input_names_the_stage_to_run(desk: Desk) -> None:
    refused(desk.call("stage", "latents"), 66, "latents[blots] needs bucket[blots]", "loraline stage bucket")
    assert not [name for name in desk.stored if name.startswith("artifacts/")]


def test_unknown_stage_data_set_and_slice(desk: Desk) -> None:
    refused(desk.call("stage", "latent"), 78, "no such stage", "latents")
    refused(desk.call("stage", "bucket", "--dataset", "x"), 78, "there is blots")
    refused(desk.call("stage", "bucket", "--slice", "4/4"), 78, "I/N")
    refused(desk.call("stage", "train", "--slice", "0/2"), 78, "for download, bucket, latents, embeds")
    refused(desk.call("stage", "bucket", "--slice", "0/2", "--merge"), 78, "one at a time")
    refused(desk.call("stage", "bucket", "--input", "download"), 78, "STAGE=FINGERPRINT")


def test_the_plan_tells_what_and_why(desk: Desk) -> None:
    result = desk.call("plan", "--json")
    assert result.exit_code == 0
    steps = json.loads(result.output)
    assert [step["node"] for step in steps] == [
        "download[blots]",
        "bucket[blots]",
        "latents[blots]",
        "embeds",
        "train",
        "publish",
    ]
    assert {step["action"] for step in steps} == {"run"}
    assert not [name for name in desk.stored if name.startswith(("artifacts/", "blobs/"))]
    desk.call("stage", "download")
    desk.call("stage", "bucket")
    desk.fields["bucket"]["resolution"] = 0.008
    text = " ".join(desk.call("plan").output.split())
    assert "resolution 0.004096 -> 0.008 MP" in text


def test_slices_and_a_merge_give_what_one_machine_gives(desk: Desk, tmp_path: Path) -> None:
    assert desk.call("stage", "download").exit_code == 0
    for index in ("0/2", "1/2"):
        assert desk.call("stage", "bucket", "--slice", index).exit_code == 0
    assert not [name for name in desk.stored if name.startswith("artifacts/bucket")]
    assert desk.call("stage", "bucket", "--merge").exit_code == 0
    sliced = [name for name in desk.stored if name.startswith(("artifacts/bucket", "blobs/"))]
    other = Desk(_made(tmp_path / "other"), pictures=6)
    other.fields["datasets"][0]["source"]["path"] = str(desk.images)
    assert other.call("stage", "download").exit_code == 0
    assert other.call("stage", "bucket").exit_code == 0
    assert sliced == [name for name in other.stored if name.startswith(("artifacts/bucket", "blobs/"))]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_events_as_json_lines(desk: Desk) -> None:
    result = desk.call("stage", "download", "--events", "json")
    events = [json.loads(line) for line in result.output.splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["StageStarted", "StageFinished"]
    assert len(events[-1]["fingerprint"]) == 64


def test_the_schema_is_json_schema() -> None:
    schema = json.loads(CliRunner().invoke(app, ["schema"]).output)
    assert schema["properties"].keys() >= {"store", "model", "datasets", "train"}


def test_the_configuration_knows_the_registry_s_names() -> None:
    assert list(get_args(StageName)) == [stage.name for stage in STAGES]


def test_the_list_of_stages_is_the_registry() -> None:
    output = CliRunner().invoke(app, ["stages"]).output
    for stage in STAGES:
        assert stage.name in output
        assert stage.summary
