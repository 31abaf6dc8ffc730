"""An adapter that follows another: measured against it on pictures that neither saw, and by choice started from it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch

from stages.core.artifact import Manifest
from stages.core.errors import ConfigError, InputError
from stages.core.events import Message, Recorder
from stages.core.stage import Setting
from stages.train.heldout import border_of, choose_held_out, place_of
from stages.train.stage import TrainStage
from tests.train.conftest import Made, digest
from tests.train.test_resume import stopped_at

BUCKETS = {(64, 48): 8, (48, 48): 6}
QUIET: dict[str, Any] = {"validation__prompts": []}
FILE = "pytorch_lora_weights.safetensors"


def evaluation(made: Made, manifest: Manifest) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(made.store.read_blob(manifest.file("evaluation.json")))
    return record


def weights(made: Made, manifest: Manifest) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(made.store.read_blob(manifest.file(FILE)))


def texts(recorder: Recorder) -> list[str]:
    return [event.text for event in recorder.events if isinstance(event, Message)]


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_a_warm_start_begins_where_the_adapter_before_ended(make: Any, precision: str) -> None:
    made: Made = make(BUCKETS, train__base_model_precision=precision, **QUIET)
    before = made.run()
    recorder = Recorder()
    after = made.run(recorder, train__previous=before.fingerprint, train__warm_start=True)
    ended = evaluation(made, before)["rounds"][-1]
    record = evaluation(made, after)
    assert record["previous"]["fingerprint"] == before.fingerprint
    # Not only near: the same weights on the same pictures with the same noise.
    assert record["previous"]["loss"] == record["rounds"][0]["loss"] == ended["loss"]
    assert record["previous"]["by_sigma"] == record["rounds"][0]["by_sigma"] == ended["by_sigma"]
    assert record["rounds"][0]["loss"] != evaluation(made, before)["rounds"][0]["loss"]
    assert record["rounds"][-1]["loss"] != record["rounds"][0]["loss"]
    assert after.info["previous"] == {"fingerprint": before.fingerprint, "loss": ended["loss"]}
    assert after.info["warm_start"] is True
    assert f"warm start: from the weights of the adapter of {before.fingerprint[:12]}" in texts(recorder)
    header = made.store.read_blob(after.file(FILE))
    assert f'"loraline.warm_start":"{before.fingerprint}"'.encode() in header


def test_measuring_an_adapter_of_another_shape_leaves_the_training_alone(make: Any) -> None:
    made: Made = make(BUCKETS, **QUIET)
    before = made.run(train__lora={"rank": 2, "targets": ["to_k", "to_add_out"], "alpha": 3.0, "exclude_blocks": [1]})
    alone = made.run()
    following = made.run(train__previous=before.fingerprint)
    assert evaluation(made, following)["previous"]["loss"] == evaluation(made, before)["rounds"][-1]["loss"]
    assert evaluation(made, following)["rounds"] == evaluation(made, alone)["rounds"]
    ours, theirs = weights(made, following), weights(made, alone)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert following.info["warm_start"] is False


def test_a_run_that_was_cut_off_keeps_the_measured_loss(make: Any) -> None:
    made: Made = make(BUCKETS, train__checkpoint_every=1, **QUIET)
    before = made.run()
    made.config = made.changed(train__previous=before.fingerprint, train__warm_start=True, train__learning_rate=2e-3)
    whole = made.run()
    made.store.files.absolute(whole.path).unlink()
    for path in made.store.files.absolute(f"runs/{whole.info['run']}/checkpoints").glob("*/*"):
        path.unlink()
    stopped_at(made, 2)
    recorder = Recorder()
    resumed = made.run(recorder)
    assert any(text.startswith("going on after step 2") for text in texts(recorder))
    assert {file.name: file.sha256 for file in resumed.files} == {file.name: file.sha256 for file in whole.files}
    assert resumed.info["previous"] == whole.info["previous"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__lora__rank": 8}, "rank 4 where train.lora has 8"),
        ({"train__lora__alpha": 8.0}, "alpha 4 where train.lora has 8"),
        ({"train__lora__targets": ["to_q"]}, "targets to_k, to_out.0, to_q, to_v where train.lora has to_q"),
        ({"train__lora__exclude_blocks": [1]}, "exclude_blocks [] where train.lora has [1]"),
    ],
)
def test_a_warm_start_needs_an_adapter_of_the_same_shape(make: Any, changes: dict[str, Any], message: str) -> None:
    made: Made = make(BUCKETS, train__steps=1, **QUIET)
    before = made.run()
    cold = made.changed(train__previous=before.fingerprint, **changes)
    TrainStage().check(Setting(cold, made.store))
    warm = made.changed(train__previous=before.fingerprint, train__warm_start=True, **changes)
    with pytest.raises(ConfigError) as caught:
        TrainStage().check(Setting(warm, made.store))
    assert str(caught.value).startswith(f"train.warm_start: the adapter of train.previous ({before.fingerprint[:12]})")
    assert message in str(caught.value)


def test_a_previous_that_is_not_there_or_does_not_fit(make: Any) -> None:
    made: Made = make(BUCKETS, train__steps=1, **QUIET)
    with pytest.raises(ConfigError, match=r"train.previous: .* has no train artifact aaaaaaaaaaaa"):
        TrainStage().check(Setting(made.changed(train__previous="a" * 64), made.store))
    before = made.run()
    spec = {**before.spec, "model": {"transformer": {"config": "another", "weights": "another"}}}
    other = made.store.commit(before.model_copy(update={"fingerprint": "b" * 64, "spec": spec}))
    with pytest.raises(ConfigError, match="trained on a model of another architecture"):
        TrainStage().check(Setting(made.changed(train__previous=other.fingerprint), made.store))
    lora = {**before.spec["train"], "lora": {**before.spec["train"]["lora"], "rank": 2}}
    lying = made.store.commit(
        before.model_copy(update={"fingerprint": "c" * 64, "spec": {**before.spec, "train": lora}})
    )
    with pytest.raises(InputError, match="are not those of an adapter of rank 2 on this base"):
        made.run(train__previous=lying.fingerprint)


def test_only_a_training_that_follows_one_has_another_fingerprint(make: Any) -> None:
    made: Made = make({(64, 48): 2})
    alone = made.job().fingerprint
    assert made.job(made.changed(train__warm_start=True)).fingerprint == alone, "there is nothing to start from"
    assert "previous" not in made.job().spec["train"]
    cold = made.job(made.changed(train__previous="a" * 64)).fingerprint
    warm = made.job(made.changed(train__previous="a" * 64, train__warm_start=True)).fingerprint
    assert len({alone, cold, warm}) == 3


def test_a_warm_start_without_an_adapter_before_is_a_fresh_one(make: Any) -> None:
    made: Made = make({(64, 48): 4}, train__steps=1, **QUIET)
    recorder = Recorder()
    manifest = made.run(recorder, train__warm_start=True)
    assert any("it starts from nothing" in text for text in texts(recorder))
    assert "previous" not in evaluation(made, manifest)


def test_what_cannot_be_compared_is_said(make: Any) -> None:
    """The one before held nothing out: whatever is held out now, it may have been trained on."""
    made: Made = make(BUCKETS, train__steps=1, **QUIET)
    before = made.run(train__evaluation__share=0.0)
    assert before.info["held_out_border"] == ""
    after = made.run(train__previous=before.fingerprint)
    record = evaluation(made, after)
    assert record["previous"] == {
        "fingerprint": before.fingerprint,
        "reason": "every picture that could be held out may be one that it was trained on",
    }
    assert len(record["rounds"]) == 2, "the new one has its own curve all the same"
    neither = made.run(train__previous=before.fingerprint, train__evaluation__share=0.0)
    assert evaluation(made, neither)["previous"]["reason"] == "no pictures are held out"


IMAGES = [digest(f"picture {number}") for number in range(400)]


def test_nothing_is_held_out_that_an_earlier_training_saw() -> None:
    """Through a chain of growing data sets; without the border, a rounded share reaches pictures that were seen."""
    seen: set[str] = set()
    border, reached = None, False
    for count in (21, 50, 51, 90, 140, 200, 333, 400):
        held = choose_held_out(IMAGES[:count], 0.05, 16, 2, border)
        reached = reached or bool(choose_held_out(IMAGES[:count], 0.05, 16, 2) & seen)
        assert held
        assert not held & seen
        border = border_of(held)
        now = set(IMAGES[:count]) - held
        assert all(place_of(image) > border for image in now)
        seen = now
    assert reached, "these numbers do not show what the border is for"


def test_a_warm_start_passes_the_border_on(make: Any) -> None:
    """What the adapter before has seen, one that starts from it has seen as well, however its own choice was made."""
    made: Made = make(BUCKETS, train__steps=1, **QUIET)
    first = made.run(train__evaluation={"share": 0.1, "max_samples": 1, "every": 2, "sigmas": 2})
    wide = {"share": 0.5, "max_samples": 5, "every": 2, "sigmas": 2}
    alone = made.run(train__evaluation=wide)
    cold = made.run(train__previous=first.fingerprint, train__evaluation=wide)
    warm = made.run(train__previous=first.fingerprint, train__evaluation=wide, train__warm_start=True)
    assert alone.info["held_out_border"] > first.info["held_out_border"]
    assert cold.info["held_out_border"] == warm.info["held_out_border"] == first.info["held_out_border"]
    assert len(evaluation(made, warm)["held_out"]) == 1
    blind = made.run(train__evaluation__share=0.0)
    warm_blind = made.run(train__previous=blind.fingerprint, train__warm_start=True)
    assert evaluation(made, warm_blind)["held_out"]
    assert warm_blind.info["held_out_border"] == ""
