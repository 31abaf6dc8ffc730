"""Which published adapter a new one follows: the pointer that is kept, and the configuration that is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.config import Config
from stages.core.artifact import Manifest, Output
from stages.core.events import Recorder
from stages.core.stage import Context, Inputs, Need, Setting, Stage
from stages.pipeline import Node, Pipeline
from stages.report.build import build_report, records_in_store
from stages.retrain import against_published, following
from tests.core.test_pipeline import Total, World
from tests.pictures import draw_pictures, small_config

PUBLISH = Node("publish")


class Training(Total):
    """As the real one, it has `previous` in its spec only where one is given."""

    def settings(self, setting: Setting) -> dict[str, Any]:
        previous = setting.config.train.previous
        return {"train": {"steps": setting.config.train.steps, **({"previous": previous} if previous else {})}}

    def run(self, context: Context, inputs: Inputs) -> Output:
        output = super().run(context, inputs)
        name = context.save_file("name.txt", context.fingerprint.encode())  # as the adapter's file names its training
        return output.model_copy(update={"files": [*output.files, name]})


class Gate(Stage):
    """Publishes into the air, unless the description says no."""

    name = "publish"
    version = 1
    needs = (Need("train"),)

    def settings(self, setting: Setting) -> dict[str, Any]:
        return {"description": setting.config.publish.description}

    def run(self, context: Context, inputs: Inputs) -> Output:
        train = inputs.one("train").fingerprint
        return Output(info={"published": context.config.publish.description != "refuse", "train": train})


class Publishing(World):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.total = Training()

    def pipeline(self, **changes: Any) -> Pipeline:
        opened = super().pipeline(**changes)
        return Pipeline(opened.config, opened.store, (*opened.stages, Gate()))

    def train(self, **changes: Any) -> str:
        """Runs everything; the training's fingerprint."""
        return self.run(**changes)["train"].fingerprint

    def follow(self, **changes: Any) -> str:
        """Runs everything against what is published."""
        config = against_published(self.pipeline(**changes))
        return self.train(**{**changes, "train": config.train})


@pytest.fixture
def world(tmp_path: Path) -> Publishing:
    return Publishing(tmp_path)


def test_what_was_really_published_is_followed_and_what_was_refused_is_not(world: Publishing) -> None:
    assert world.pipeline().published() is None
    assert against_published(world.pipeline()) == world.pipeline().config
    first = world.follow()
    assert world.pipeline().published() == first
    world.text.write_text("aa bb cc dd")
    refused = world.follow(publish={"path": "none", "description": "refuse"})
    assert refused != first
    assert world.pipeline().published() == first
    assert against_published(world.pipeline()).train.previous == first
    world.text.write_text("aa bb cc dd ee")
    second = world.follow()
    assert world.pipeline().published() == second
    manifest = world.pipeline().store.manifest("train", second)
    assert manifest is not None
    assert manifest.spec["train"]["previous"] == first


def test_following_with_nothing_new_does_nothing(world: Publishing) -> None:
    first = world.follow()
    assert world.follow() == first
    world.text.write_text("aa bb cc dd")
    second = world.follow()
    runs = world.total.runs
    assert world.follow() == second
    assert world.total.runs == runs == 2
    assert set(world.reused) == {"download[letters]", "bucket[letters]", "train", "publish"}
    third = world.follow(train={"steps": 7})
    assert third not in (first, second)


def test_publishing_an_older_one_again_moves_the_pointer_back(world: Publishing) -> None:
    first = world.train()
    second = world.train(train={"steps": 7})
    assert world.pipeline().published() == second
    assert world.train() == first
    assert world.pipeline().published() == first


def test_a_refusal_that_is_run_again_moves_nothing(world: Publishing) -> None:
    refuse = {"publish": {"path": "none", "description": "refuse"}}
    world.train(train={"steps": 5}, **refuse)
    assert world.pipeline().published() is None
    published = world.train()
    world.train(train={"steps": 5}, **refuse)
    assert "publish" in world.reused
    assert world.pipeline().published() == published


def run_all(config: Config) -> tuple[Pipeline, dict[Node, Manifest]]:
    pipeline, manifests = Pipeline.open(config), {}
    for node in pipeline.order:
        made = pipeline.run_node(node, manifests, Recorder())
        assert made is not None
        manifests[node] = made
    return pipeline, manifests


@pytest.mark.slow
def test_the_real_stages_refuse_a_worse_adapter_and_the_report_says_why(tmp_path: Path) -> None:
    """Two retrainings of grown data: one that is thrown off by its learning rate is refused, one is published."""
    images = draw_pictures(tmp_path / "images", 16)
    config = small_config(
        tmp_path,
        images,
        publish={"target": "folder", "path": str(tmp_path / "out"), "maximum_regression": 0.02},
        validation={"prompts": []},
    )
    _, made = run_all(config)
    first = made[Node("train")].fingerprint
    assert "no adapter before it was named" in made[PUBLISH].info["decision"]
    record = json.loads((tmp_path / "out" / "loraline.json").read_text())
    assert record["artifacts"]["train"]["fingerprint"] == first

    draw_pictures(images, 4, start=16)
    bad = config.model_copy(
        update={"train": config.train.model_copy(update={"learning_rate": 0.5, "warm_start": True, "steps": 6})}
    )
    pipeline, made = run_all(against_published(Pipeline.open(bad)))
    assert made[PUBLISH].info["published"] is False
    assert json.loads((tmp_path / "out" / "loraline.json").read_text()) == record
    html = build_report(pipeline, records_in_store(pipeline))
    assert "Not published: the held-out loss is" in html
    assert pipeline.published() == first

    good = following(config.model_copy(update={"train": config.train.model_copy(update={"warm_start": True})}), first)
    pipeline, made = run_all(good)
    assert made[PUBLISH].info["published"] is True, made[PUBLISH].info["decision"]
    assert first[:12] in made[PUBLISH].info["decision"]
    second = made[Node("train")].fingerprint
    assert pipeline.published() == second
    assert json.loads((tmp_path / "out" / "loraline.json").read_text())["artifacts"]["train"]["fingerprint"] == second
    assert f"| Started from | the adapter of {first[:12]} |" in (tmp_path / "out" / "README.md").read_text()
