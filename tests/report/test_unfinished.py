"""A training that did not finish: what it left in the store is shown, and said to be unfinished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.core.artifact import Manifest, NamedFile
from stages.core.errors import PreemptedError
from stages.core.preemption import StopFlag
from stages.core.runner import execute
from stages.pipeline import Node, Pipeline
from stages.report.build import RunRecord, build_report
from stages.report.measured import TRAIN, find_unfinished
from stages.report.record import manifests_of
from tests.report.conftest import Run, drawing, make_run
from tests.report.test_report import Page, check_is_safe
from tests.train.conftest import Made, make, model_folder  # noqa: F401
from tests.train.test_resume import StopAt


def cut_off(run: Run, error: str = "the device has too little memory") -> list[RunRecord]:
    return run.replaced(
        RunRecord("train", "failed", error, 34.2), RunRecord("publish", "not run", "an earlier stage failed")
    )


def folder_of(run: Run) -> Path:
    """Where the training that these records tell of keeps what it has so far."""
    manifests = manifests_of(run.pipeline, cut_off(run))
    name = f"runs/train-{run.pipeline.job(TRAIN, manifests).fingerprint[:16]}"
    folder = Path(run.pipeline.config.store.url) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def line(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "loss": 1.0 / step, "lr": 1e-4, "grad_norm": 0.3, **more}


def write_journal(folder: Path, steps: range, torn: str = "") -> None:
    lines = [json.dumps({"time": 1.5, **line(step)}) for step in steps]
    lines += [json.dumps({"step": step, "time": 1.5, "held_out_loss": 2.0 / step}) for step in steps if step % 10 == 0]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + torn)


def write_checkpoint(run: Run, folder: Path, step: int, whole: bool = True, drawn_at: tuple[int, ...] = ()) -> None:
    store, pictures = run.pipeline.store, []
    for drawn in drawn_at or (0, step):
        blob = store.put_bytes(drawing((96, 96), seed=700 + drawn)[0], ".png")
        name = f"validation/{drawn}-0.png"
        stored = NamedFile(**blob.model_dump(), name=name).model_dump(mode="json")
        pictures.append({"step": drawn, "index": 0, "prompt": "a ring <b>", "file": name, "stored": stored})
    rounds = [{"step": at, "loss": 0.9 - at / 100, "by_sigma": {"0.5": 0.8}} for at in (0, step)]
    history = {
        "steps": [line(at) for at in range(1, step + 1)],
        "rounds": rounds,
        "pictures": pictures,
        "previous": None,
    }
    place = folder / "checkpoints" / f"{step:08d}"
    place.mkdir(parents=True)
    if whole:
        record = {"schema": 1, "step": step, "sha256": "0" * 64, "history": history}
        (place / "checkpoint.json").write_text(json.dumps(record))


def charts(page: Page) -> set[str]:
    return {drawing["aria-label"] for drawing in page.all("svg") if drawing.get("class") == "chart"}


def test_curves_and_pictures_of_a_training_that_failed(tmp_path: Path) -> None:
    run = make_run(tmp_path, images=20, steps=60)
    folder = folder_of(run)
    write_journal(folder, range(1, 38), torn='{"step": 38, "lo')
    write_checkpoint(run, folder, 30)
    write_checkpoint(run, folder, 35, whole=False)
    page = Page(build_report(run.pipeline, cut_off(run), "train: the device has too little memory"))
    check_is_safe(page)
    assert (
        "Trained for 37 of 60 steps; the loss on pictures held out fell from 0.9 to 0.6. It failed at train."
        in page.text
    )
    assert "unfinished It got to step 37 of 60. Run again, it goes on after step 30, its last checkpoint." in page.text
    assert {"Training loss by step", "Held-out loss by step", "Held-out loss by noise level"} <= charts(page)
    assert "so far · step 30" in page.text
    assert "after · step" not in page.text
    assert len(list(page.all("img"))) == 2 + 20
    assert "Missing from this report" not in page.text


def test_a_journal_alone_is_enough(tmp_path: Path) -> None:
    run = make_run(tmp_path, images=8, steps=60)
    write_journal(folder_of(run), range(1, 6))
    page = Page(build_report(run.pipeline, cut_off(run)))
    check_is_safe(page)
    assert "It got to step 5 of 60 and left no checkpoint: run again, it begins anew." in page.text
    assert "Training loss by step" in charts(page)
    assert "No validation pictures are in a checkpoint." in page.text


def test_one_round_of_held_out_loss_is_no_change_yet(tmp_path: Path) -> None:
    run = make_run(tmp_path, images=8, steps=60)
    write_journal(folder_of(run), range(1, 12))
    text = Page(build_report(run.pipeline, cut_off(run))).text
    assert "Trained for 11 of 60 steps. It failed at train." in text
    assert "0.2 at step 10. Same noise" in text


def test_pictures_of_the_base_alone_are_those_before(tmp_path: Path) -> None:
    run = make_run(tmp_path, images=8, steps=60)
    write_checkpoint(run, folder_of(run), 30, drawn_at=(0,))
    text = Page(build_report(run.pipeline, cut_off(run))).text
    assert "before · step 0 none drawn with the adapter yet" in text
    assert "so far · step" not in text


def test_what_another_training_left_is_not_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path, images=8, steps=60)
    folder = folder_of(run)
    write_journal(folder, range(1, 6))
    folder.rename(folder.with_name("train-0123456789abcdef"))
    page = Page(build_report(run.pipeline, cut_off(run)))
    assert charts(page) == set()
    assert "left no curves and no pictures in the store" in page.text


def test_a_damaged_checkpoint_is_named_and_costs_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path, images=8, steps=60)
    folder = folder_of(run)
    write_checkpoint(run, folder, 30)
    (folder / "checkpoints/00000030/checkpoint.json").write_text('{"step": 30}')
    page = Page(build_report(run.pipeline, cut_off(run)))
    check_is_safe(page)
    assert "what the unfinished training left" in page.text
    assert len(list(page.all("img"))) == 8


def test_a_finished_training_is_never_said_to_be_unfinished(tmp_path: Path) -> None:
    run = make_run(tmp_path, images=8, steps=60)
    write_journal(folder_of(run), range(1, 6))
    text = Page(build_report(run.pipeline, run.records)).text
    assert "Trained for 60 steps" in text
    assert "unfinished" not in text


def test_the_base_model_is_not_looked_at_where_no_training_left_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, images=8)
    monkeypatch.setattr(Pipeline, "job", lambda *_: pytest.fail("looked the base model up"))
    assert find_unfinished(run.pipeline, manifests_of(run.pipeline, cut_off(run))) is None


def test_the_train_stages_own_folder_is_found(make: Any) -> None:  # noqa: F811
    """Holds the layout: a real training, stopped in the middle."""
    made: Made = make({(64, 48): 5, (48, 48): 4}, train__steps=6, train__checkpoint_every=10)
    pipeline = Pipeline(made.config, made.store)
    found = {
        (stage, dataset): manifest
        for stage in ("download", "latents")
        for dataset, manifest in made.inputs.all(stage).items()
    }
    found["embeds", None] = made.inputs.one("embeds")
    manifests: dict[Node, Manifest] = {
        Node(stage, dataset): manifest.model_copy(update={"facets": {"pairs": "0" * 64}})
        for (stage, dataset), manifest in found.items()
    }
    flag = StopFlag()
    with pytest.raises(PreemptedError):
        execute(pipeline.job(TRAIN, manifests), StopAt(3, flag), stop=flag)
    left = find_unfinished(pipeline, manifests)
    assert left is not None
    assert left.end is not None
    assert (left.end.done, left.end.total, left.end.checkpoint) == (3, 6, 3)
    assert [record["step"] for record in left.log] == [1, 2, 3]
    assert [entry.step for entry in left.rounds] == [0, 2]
    assert [len(made.store.read_blob(picture.blob())) > 100 for picture in left.pictures] == [True, True]
