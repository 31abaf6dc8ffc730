"""A run that was cut off and went on ends with the same bytes as one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.core.artifact import Manifest
from stages.core.errors import InputError, PreemptedError
from stages.core.events import Event, Message, Metric, Recorder
from stages.core.preemption import StopFlag
from stages.core.store import Store
from tests.train.conftest import Made

BUCKETS = {(64, 48): 5, (48, 48): 4}
CHANGES: dict[str, Any] = {
    "train__steps": 7,
    "train__checkpoint_every": 2,
    "train__lora__dropout": 0.1,
    "train__caption_dropout": 0.3,
    "train__gradient_accumulation_steps": 2,
    "train__lr_scheduler": "linear",
}


class StopAt(Recorder):
    """Asks the run to stop when a step is reported."""

    def __init__(self, step: int, flag: StopFlag) -> None:
        super().__init__()
        self.step, self.flag = step, flag

    def emit(self, event: Event) -> None:
        super().emit(event)
        if isinstance(event, Metric) and event.step == self.step and "loss" in event.values:
            self.flag.set("SIGTERM")


def files(manifest: Manifest) -> dict[str, str]:
    return {file.name: file.sha256 for file in manifest.files}


def run_folder(made: Made, manifest: Manifest) -> Path:
    return made.store.files.absolute(f"runs/{manifest.info['run']}")


def forget(made: Made, manifest: Manifest) -> None:
    """Takes the manifest and all checkpoints away."""
    made.store.files.absolute(manifest.path).unlink()
    for path in (run_folder(made, manifest) / "checkpoints").glob("*/*"):
        path.unlink()


def stopped_at(made: Made, step: int) -> None:
    flag = StopFlag()
    with pytest.raises(PreemptedError):
        made.run(StopAt(step, flag), stop=flag)


def steps_seen(recorder: Recorder) -> list[int]:
    return [event.step for event in recorder.events if isinstance(event, Metric) and "loss" in event.values]


@pytest.mark.parametrize("at", [1, 4])
def test_stopped_and_resumed_equals_uninterrupted(make: Any, at: int) -> None:
    made = make(BUCKETS, **CHANGES)
    whole = made.run()
    forget(made, whole)
    stopped_at(made, at)
    recorder = Recorder()
    resumed = made.run(recorder)
    assert files(resumed) == files(whole)
    assert resumed.info["held_out"] == whole.info["held_out"]
    assert steps_seen(recorder) == list(range(at + 1, 8)), "no step was done twice"


def test_killed_between_checkpoints_goes_on_from_the_last(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.train.loop import Trainer

    made = make(BUCKETS, **CHANGES)
    whole = made.run()
    forget(made, whole)
    real = Trainer.train_step

    def dies(self: Any, step: int, batches: Any) -> Any:
        if step == 6:
            raise KeyboardInterrupt
        return real(self, step, batches)

    monkeypatch.setattr(Trainer, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        made.run()
    monkeypatch.setattr(Trainer, "train_step", real)
    recorder = Recorder()
    resumed = made.run(recorder)
    assert steps_seen(recorder) == [5, 6, 7]
    assert files(resumed) == files(whole)
    lines = (run_folder(made, whole) / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["step"] for line in lines if "grad_norm" in line]
    assert losses == [1, 2, 3, 4, 5, 6, 7], "what the killed run wrote beyond its checkpoint is gone"


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_damaged_checkpoint_is_passed_over(make: Any, damage: str) -> None:
    made = make(BUCKETS, **CHANGES)
    whole = made.run()
    forget(made, whole)
    stopped_at(made, 5)  # 4 and 5 are kept
    newest = run_folder(made, whole) / "checkpoints" / "00000005" / "state.safetensors"
    data = newest.read_bytes()
    if damage == "flipped":
        newest.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        newest.write_bytes(data[: len(data) // 2])
    else:
        newest.unlink()
    recorder = Recorder()
    resumed = made.run(recorder)
    assert steps_seen(recorder) == [5, 6, 7]
    warnings = [event.text for event in recorder.events if isinstance(event, Message) and event.level == "warning"]
    assert warnings == ["the checkpoint of step 5 is damaged; the one before it is taken"]
    assert files(resumed) == files(whole)


def test_half_written_checkpoint_is_none(make: Any) -> None:
    made = make(BUCKETS, **CHANGES)
    whole = made.run()
    forget(made, whole)
    stopped_at(made, 3)
    (run_folder(made, whole) / "checkpoints" / "00000003" / "checkpoint.json").unlink()
    recorder = Recorder()
    made.run(recorder)
    assert steps_seen(recorder) == [3, 4, 5, 6, 7]


def test_only_some_checkpoints_are_kept(make: Any) -> None:
    made = make(BUCKETS, train__steps=9, train__checkpoint_every=2, train__keep_checkpoints=2)
    folder = run_folder(made, made.run()) / "checkpoints"
    whole = sorted(path.parent.name for path in folder.glob("*/checkpoint.json"))
    assert whole == ["00000006", "00000008"]
    assert not list(folder.glob("0000000[24]/*"))


def test_checkpoints_hold_no_pickle(make: Any) -> None:
    made = make(BUCKETS, train__steps=3, train__checkpoint_every=2)
    manifest = made.run()
    folder = run_folder(made, manifest) / "checkpoints" / "00000002"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    record = Store(made.config.store).get_json(f"runs/{manifest.info['run']}/checkpoints/00000002/checkpoint.json")
    assert record["step"] == 2


def test_loss_that_is_no_number_names_step_and_samples(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.train import objective

    made = make(BUCKETS, **CHANGES)
    real = objective.losses
    calls: list[int] = []

    def explodes(*arguments: Any) -> Any:
        found = real(*arguments)
        calls.append(1)
        return found * float("nan") if found.requires_grad and len(calls) > 20 else found

    monkeypatch.setattr(objective, "losses", explodes)
    with pytest.raises(InputError, match=r"step \d: the loss is nan .* with the samples \d+x48_\d") as caught:
        made.run()
    assert "train.learning_rate" in str(caught.value)
    assert not list(made.store.files.absolute("artifacts").glob("train/*"))
