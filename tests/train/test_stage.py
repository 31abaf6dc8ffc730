"""What is refused before any training, and what the artifact and the run's folder hold."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stages.core.artifact import Manifest, Shard
from stages.core.errors import ConfigError, InputError
from stages.core.events import Message, Metric, Picture, Progress, Recorder
from stages.core.filesystem import ObjectFiles
from stages.core.stage import Inputs, Setting
from stages.core.store import Store
from stages.train.stage import TrainStage
from tests.train.conftest import Made

BUCKETS = {(64, 48): 5, (48, 48): 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train__lora__targets": ["to_q", "to_w"]},
            "train.lora.targets: 'to_w' matches no linear layer; near it are attn.to",
        ),
        ({"train__lora__exclude_blocks": [7]}, "train.lora.exclude_blocks: there is no block 7; this model has 0 to 2"),
        (
            {"train__base_model_precision": "int8-quanto", "train__quantize_exclude": ["proj.out"]},
            "train.quantize_exclude: 'proj.out' matches no linear layer; near it are proj_out",
        ),
        ({"validation__width": 100}, "validation.width: 100 is no multiple of 16, which the model needs; try 96"),
        ({"validation__height": 512}, "validation.height: 512 is more than this model can draw, 256"),
        ({"train__device": "cuda:7"}, "train.device: cuda:7"),
        ({"train__lr_warmup_steps": 9}, "train.lr_warmup_steps: 9 is more than train.steps, 4"),
    ],
)
def test_wrong_settings(make: Any, changes: dict[str, Any], message: str) -> None:
    if "cuda" in message and torch.cuda.device_count() > 7:
        pytest.skip("there is such a device here")
    made = make({(64, 48): 2})
    stage = TrainStage()
    stage.check(Setting(made.config, made.store))
    with pytest.raises(ConfigError) as caught:
        stage.check(Setting(made.changed(**changes), made.store))
    assert str(caught.value).startswith(message)


def bucket_manifest(*shards: tuple[tuple[int, int], int]) -> Inputs:
    made = [
        Shard(sha256=f"{number:064x}", bytes=1, name=str(number), samples=samples, bucket=bucket)
        for number, (bucket, samples) in enumerate(shards)
    ]
    manifest = Manifest(stage="bucket", fingerprint="0" * 64, stage_version=1, spec={}, inputs={}, shards=made)
    return Inputs({("bucket", "one"): manifest})


@pytest.mark.parametrize(
    ("batch", "parts", "advice"),
    [
        (4, 2, "lower train.gradient_accumulation_steps to 1"),
        (8, 1, "lower train.train_batch_size to 5"),
        (8, 2, "lower train.train_batch_size to 5 and train.gradient_accumulation_steps to 1"),
    ],
)
def test_too_few_images_for_a_step(make: Any, batch: int, parts: int, advice: str) -> None:
    made = make({(64, 48): 2}, train__train_batch_size=batch, train__gradient_accumulation_steps=parts)
    setting = Setting(made.config, made.store)
    done = bucket_manifest(((64, 48), 3), ((48, 48), 2))
    with pytest.raises(InputError) as caught:
        TrainStage().foresee(setting, done)
    expected = (
        f"train: one step takes train_batch_size {batch} x gradient_accumulation_steps {parts} = {batch * parts} "
        f"images, the data sets have 5 after cropping. Add images, or {advice}."
    )
    assert str(caught.value) == expected
    TrainStage().foresee(setting, bucket_manifest(((64, 48), batch * parts)))
    TrainStage().foresee(setting, Inputs({}))


def test_no_images_at_all(make: Any) -> None:
    made = make({(64, 48): 2})
    with pytest.raises(InputError, match=r"the data sets have none after cropping"):
        TrainStage().foresee(Setting(made.config, made.store), bucket_manifest())


def test_pictures_larger_than_the_model_takes(make: Any) -> None:
    made = make({(64, 48): 2})
    with pytest.raises(InputError, match=r"bucket\[one\] has pictures of 64x272, this model takes at most 256 pixels"):
        TrainStage().foresee(Setting(made.config, made.store), bucket_manifest(((64, 272), 9)))


def test_pictures_that_the_model_would_cut(make: Any) -> None:
    made = make({(64, 48): 2})
    with pytest.raises(
        InputError, match=r"bucket\[one\] has pictures of 64x72, this model takes edges .* multiples of 16"
    ):
        TrainStage().foresee(Setting(made.config, made.store), bucket_manifest(((64, 72), 9)))


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"train__device": "cpu", "train__checkpoint_every": 3, "train__keep_checkpoints": 9}, True),
        ({"train__gradient_checkpointing": True}, True),
        ({"train__lora__alpha": 4.0}, True),  # what it is when not given: the rank
        ({"train__lora__alpha": 5.0}, False),
        ({"train__learning_rate": 2e-3}, False),
        ({"validation__seed": 1}, False),
        ({"seed": 1}, False),
        ({"publish__description": "other"}, True),
    ],
)
def test_only_what_changes_the_numbers_is_in_the_fingerprint(make: Any, changes: dict[str, Any], same: bool) -> None:
    made = make({(64, 48): 2})
    assert (made.job(made.changed(**changes)).fingerprint == made.job().fingerprint) == same


def test_artifact_and_run_folder(make: Any) -> None:
    made: Made = make(BUCKETS)
    recorder = Recorder()
    manifest = made.run(recorder, validation__prompts=["a red square", "a blue circle"])
    names = [file.name for file in manifest.files]
    assert names == [
        "pytorch_lora_weights.safetensors",
        "train.jsonl",
        "evaluation.json",
        *(f"validation/{step:06d}-{index}.png" for step in (0, 2, 4) for index in (0, 1)),
    ]
    for name in names[3:]:
        with Image.open(io.BytesIO(made.store.read_blob(manifest.file(name)))) as picture:
            assert picture.size == (64, 48)
    lines = [json.loads(line) for line in made.store.read_blob(manifest.file("train.jsonl")).splitlines()]
    assert [sorted(line) for line in lines] == [["grad_norm", "loss", "lr", "step"]] * 4
    assert manifest.info["pictures"][3] == {
        "step": 2,
        "index": 1,
        "prompt": "a blue circle",
        "file": "validation/000002-1.png",
    }
    assert [found[0] for found in manifest.info["held_out"]] == [0, 2, 4]
    assert manifest.info["samples"] == 8
    # 9 pictures, 1 held out: 8 in batches of 2 of one bucket each
    assert manifest.info["epochs"] == pytest.approx(
        4 / sum(-(-count // 2) for count in _trained(made, manifest)), abs=1e-3
    )
    kinds = {type(event) for event in recorder.events}
    assert {Metric, Picture, Progress, Message} <= kinds
    folder = made.store.files.absolute(f"runs/{manifest.info['run']}")
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in written if "loss" in line] == [line["loss"] for line in lines]
    assert all(line["time"] > 0 for line in written)
    assert_events(folder / "tensorboard", [line["loss"] for line in lines])


def _trained(made: Made, manifest: Manifest) -> list[int]:
    held = {entry["key"] for entry in json.loads(made.store.read_blob(manifest.file("evaluation.json")))["held_out"]}
    keys = [key for key in made.latents if key not in held]
    return [sum(key.startswith(f"{width}x{height}") for key in keys) for width, height in BUCKETS]


def assert_events(folder: Path, losses: list[float]) -> None:
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert [event.step for event in events.Scalars("held_out_loss")] == [0, 2, 4]
    assert [event.step for event in events.Images("validation/0")] == [0, 2, 4]


def test_a_store_that_is_not_local(make: Any, tmp_path: Path) -> None:
    """Everything also goes through an object store's calls: journal, checkpoints and pictures are uploaded."""
    made: Made = make(BUCKETS, train__checkpoint_every=2)
    local = made.run()
    remote = Store(made.config.store, ObjectFiles(f"file://{tmp_path}/store", {"auto_mkdir": True}))
    made.store.files.absolute(local.path).unlink()
    made.store = remote
    again = made.run()
    assert {file.name: file.sha256 for file in again.files} == {file.name: file.sha256 for file in local.files}
    folder = tmp_path / "store" / "runs" / again.info["run"]
    assert (folder / "metrics.jsonl").stat().st_size > 0
    assert list((folder / "tensorboard").iterdir())


def test_nothing_is_held_out_of_a_data_set_that_is_too_small(make: Any) -> None:
    made = make({(64, 48): 2})
    recorder = Recorder()
    manifest = made.run(recorder)
    assert manifest.info["held_out"] == []
    warnings = [event.text for event in recorder.events if isinstance(event, Message) and event.level == "warning"]
    assert warnings == ["too few images to hold any out: there is no held-out loss"]


def test_filled_buckets_are_said(make: Any) -> None:
    made = make({(64, 48): 3, (48, 48): 4}, train__evaluation__share=0.0)
    recorder = Recorder()
    made.run(recorder, validation__prompts=[])
    texts = [event.text for event in recorder.events if isinstance(event, Message)]
    assert "7 samples to train on, 0 held out; an epoch has 4 batches: 48x48 4, 64x48 3" in texts
    assert any(text.endswith("in every epoch: 64x48 1") for text in texts)
