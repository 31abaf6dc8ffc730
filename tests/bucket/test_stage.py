"""The stage as a whole: what it writes, that it is the same every time, and that nothing is done twice."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

import stages.bucket.stage as module
from stages.bucket.stage import BucketStage
from stages.core.errors import InputError, PreemptedError, TransientError
from stages.core.events import Message, Recorder
from stages.core.fingerprint import digest_bytes
from stages.core.preemption import StopFlag
from stages.core.shard import read_shard
from stages.pipeline import Node
from tests.bucket.raw import encoded, gradient, key_of, pipeline, run

PICTURES = (
    ((90, 60), "JPEG"),
    ((60, 90), "PNG"),
    ((64, 64), "WEBP"),
    ((200, 100), "PNG"),
    ((90, 61), "PNG"),
    ((70, 70), "PNG"),
    ((300, 400), "JPEG"),
)
FILES = [
    (f"{number}.{kind.lower()}", encoded(gradient(*size, shift=number), kind))
    for number, (size, kind) in enumerate(PICTURES)
]
PRESERVE = {"crop_aspect": "preserve"}


def samples(line: Any, manifest: Any) -> Iterator[tuple[Any, str, dict[str, bytes]]]:
    for shard in manifest.shards:
        for key, members in read_shard(line.store.fetch(shard)):
            yield shard, key, members


def test_each_shard_holds_one_size_and_all_pictures_are_there(tmp_path: Path, tiny_sd3: Path) -> None:
    line = pipeline(tmp_path, tiny_sd3, FILES, [BucketStage()], **PRESERVE)
    manifest = run(line)
    seen = {}
    for shard, key, members in samples(line, manifest):
        picture = Image.open(io.BytesIO(members["png"]))
        record = json.loads(members["json"])
        assert picture.size == shard.bucket == tuple(record["bucket"])
        assert picture.mode == "RGB"
        assert all(edge % 16 == 0 for edge in picture.size)
        assert sorted(members) == ["json", "png"]
        assert record["key"] == key
        seen[key] = record["image_sha256"]
    assert seen == {key_of(name): digest_bytes(data) for name, data in FILES}
    assert len({shard.bucket for shard in manifest.shards}) > 2
    assert sum(manifest.info["buckets"].values()) == manifest.counts["images"] == len(FILES)
    assert manifest.spec["alignment"] == 16


def test_plain_webdataset_reads_the_crops(tmp_path: Path, tiny_sd3: Path) -> None:
    line = pipeline(tmp_path, tiny_sd3, FILES, [BucketStage()])
    manifest = run(line)
    assert [shard.name for shard in manifest.shards] == ["00000-64x64", "00001-64x64"]
    urls = [str(line.store.fetch(shard)) for shard in manifest.shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in read] == [key_of(name) for name, _ in FILES]
    assert all(sample["png"].shape == (64, 64, 3) and sample["png"].dtype == np.uint8 for sample in read)
    assert all(sample["json"]["bucket"] == [64, 64] for sample in read)


def test_the_same_digests_with_one_worker_and_with_two(tmp_path: Path, tiny_sd3: Path) -> None:
    options = {**PRESERVE, "crop_style": "random"}
    first = run(pipeline(tmp_path / "a", tiny_sd3, FILES, [BucketStage()], **options, processes=1))
    second = run(pipeline(tmp_path / "b", tiny_sd3, FILES, [BucketStage()], **options, processes=2))
    assert [(shard.name, shard.sha256) for shard in first.shards] == [(s.name, s.sha256) for s in second.shards]
    assert first.digest() == second.digest()
    assert first.fingerprint == second.fingerprint


class Counting(BucketStage):
    """Counts the units that are really worked on, and may die after some."""

    def __init__(self, die_after: int | None = None) -> None:
        self.done: list[str] = []
        self.die_after = die_after

    def process(self, context: Any, inputs: Any, units: Any) -> Iterator[Any]:
        for unit, output in super().process(context, inputs, units):
            if self.die_after is not None and len(self.done) >= self.die_after:
                raise RuntimeError("killed")
            self.done.append(unit.name)
            yield unit, output


def test_a_killed_run_goes_on_with_the_shard_that_was_not_finished(tmp_path: Path, tiny_sd3: Path) -> None:
    whole = run(pipeline(tmp_path / "whole", tiny_sd3, FILES, [BucketStage()]))
    dying = Counting(die_after=1)
    with pytest.raises(RuntimeError, match="killed"):
        run(pipeline(tmp_path / "cut", tiny_sd3, FILES, [dying]))
    assert dying.done == ["00000"]
    again = Counting()
    manifest = run(pipeline(tmp_path / "cut", tiny_sd3, FILES, [again]))
    assert again.done == ["00001"]
    assert manifest.digest() == whole.digest()


def test_one_more_picture_redoes_only_its_shard(tmp_path: Path, tiny_sd3: Path) -> None:
    run(pipeline(tmp_path, tiny_sd3, FILES, [BucketStage()]))
    counting = Counting()
    manifest = run(pipeline(tmp_path, tiny_sd3, [*FILES, ("new.png", encoded(gradient(80, 80)))], [counting]))
    assert counting.done == ["00001"]
    assert manifest.counts["images"] == len(FILES) + 1


def test_a_stop_between_pictures_saves_what_is_finished(tmp_path: Path, tiny_sd3: Path) -> None:
    line = pipeline(tmp_path, tiny_sd3, FILES, [BucketStage()])
    raw = {line.order[0]: line.run_node(line.order[0], {}, Recorder())}
    stop = StopFlag()
    stop.set("SIGTERM")
    with pytest.raises(PreemptedError):
        line.run_node(line.order[1], raw, Recorder(), stop=stop)  # type: ignore[arg-type]
    assert line.store.manifest("bucket", str(line.plan()[1].fingerprint)) is None


def test_random_crops_are_drawn_once_from_the_digest(tmp_path: Path, tiny_sd3: Path) -> None:
    files = [(f"{number}.png", encoded(gradient(256, 64, shift=number))) for number in range(6)]

    def lefts(folder: str, chosen: list[tuple[str, bytes]]) -> dict[str, int]:
        line = pipeline(tmp_path / folder, tiny_sd3, chosen, [BucketStage()], crop_style="random")
        return {key: json.loads(members["json"])["crop"][0] for _, key, members in samples(line, run(line))}

    first = lefts("a", files)
    assert len(set(first.values())) > 3
    rest = lefts("b", files[2:])
    assert rest == {key: left for key, left in first.items() if key in rest}


def test_a_broken_picture_is_refused_with_its_reason(tmp_path: Path, tiny_sd3: Path) -> None:
    broken = [("half.png", FILES[1][1][:300]), ("page.jpg", b"<html>not found</html>")]
    manifest = run(pipeline(tmp_path, tiny_sd3, [*FILES, *broken], [BucketStage()], max_refused_share=0.5))
    refused = {refusal.name: refusal.reason for refusal in manifest.refused}
    assert set(refused) == {"half.png", "page.jpg"}
    assert "cannot be decoded" in refused["half.png"]
    assert "no image file" in refused["page.jpg"]
    assert manifest.counts["images"] == len(FILES)


def test_too_many_refused_fail_the_stage(tmp_path: Path, tiny_sd3: Path) -> None:
    broken = [(f"{number}.jpg", b"nothing") for number in range(10, 13)]
    with pytest.raises(InputError, match=r"3 of 10 images were refused.*max_refused_share 0\.1"):
        run(pipeline(tmp_path, tiny_sd3, [*FILES, *broken], [BucketStage()]))
    # A reused artifact is judged by the share that holds now, although it was made under a more generous one.
    run(pipeline(tmp_path, tiny_sd3, [*FILES, *broken], [BucketStage()], max_refused_share=0.3))
    with pytest.raises(InputError, match="3 of 10"):
        run(pipeline(tmp_path, tiny_sd3, [*FILES, *broken], [BucketStage()], max_refused_share=0.2))
    with pytest.raises(InputError, match="all 3 images were refused"):
        run(pipeline(tmp_path, tiny_sd3, broken, [BucketStage()], max_refused_share=1.0))


def test_a_worker_that_dies_is_a_clear_transient_error(
    tmp_path: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module.read_tasks

    def with_a_killer(context: Any, unit: Any) -> Iterator[Any]:
        tasks = list(original(context, unit))
        yield tasks[0]
        yield _Killer(tasks[0])  # a task that ends the process which takes it, as the kernel's OOM killer would

    monkeypatch.setattr(module, "read_tasks", with_a_killer)
    with pytest.raises(TransientError, match=r"bucket\.processes to fewer"):
        run(pipeline(tmp_path, tiny_sd3, FILES, [BucketStage()]))


class _Killer:
    def __init__(self, task: Any) -> None:
        self.unit, self.name = task.unit, task.name

    def __reduce__(self) -> Any:
        return os._exit, (9,)


@pytest.mark.kill
def test_workers_leave_with_a_killed_parent(tmp_path: Path) -> None:
    raw = tmp_path / "raw.png"
    raw.write_bytes(FILES[1][1])
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    root = Path(__file__).parent.parent.parent
    parent = subprocess.Popen(
        [sys.executable, str(script), str(raw)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert parent.stdout is not None
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    for worker in workers:
        while _runs(worker):  # the test's own time limit ends this
            time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        # An orphan that has ended may wait for the init process to take notice.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


PARENT = """
import itertools, multiprocessing, sys
from pathlib import Path
from stages.bucket.geometry import Rules
from stages.bucket.workers import Task, crop_all

if __name__ == "__main__":
    path = Path(sys.argv[1])
    rules = Rules(64, "pixel", True, "square", "center", 0, None, None, 4, 16)
    tasks = (Task(0, "key", "name", path, 0, path.stat().st_size, "0") for _ in itertools.count())
    for number, _ in enumerate(crop_all(tasks, rules, 2)):
        if number == 20:
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
"""


def test_plan_says_what_changed_with_units(tmp_path: Path, tiny_sd3: Path) -> None:
    run(pipeline(tmp_path, tiny_sd3, FILES, [BucketStage()], resolution=0.016))
    steps = pipeline(tmp_path, tiny_sd3, FILES, [BucketStage()], resolution=0.02).plan()
    assert steps[1].node == Node("bucket", "photos")
    assert steps[1].reasons == ["resolution 0.016 -> 0.02 MP"]
    steps = pipeline(tmp_path, tiny_sd3, FILES, [BucketStage()], resolution=128, resolution_type="pixel").plan()
    assert steps[1].reasons == ["resolution 0.016 MP -> 128 px short edge"]
    steps = pipeline(tmp_path, tiny_sd3, FILES, [BucketStage()], resolution=0.016, alignment=32).plan()
    assert steps[1].reasons == ["alignment 16 -> 32"]


def test_what_cannot_change_a_crop_does_not_make_it_again(tmp_path: Path, tiny_sd3: Path) -> None:
    run(pipeline(tmp_path, tiny_sd3, FILES, [BucketStage()]))
    same = {"processes": 2, "workers": 3, "max_refused_share": 0.5, "crop_style": "centre", "alignment": 16}
    assert [step.action for step in pipeline(tmp_path, tiny_sd3, FILES, [BucketStage()], **same).plan()] == [
        "reuse"
    ] * 2


def test_enlarged_pictures_are_counted_and_said(tmp_path: Path, tiny_sd3: Path) -> None:
    recorder = Recorder()
    small = [(f"{number}.png", encoded(gradient(32, 32, shift=number))) for number in range(3)]
    manifest = run(pipeline(tmp_path, tiny_sd3, small, [BucketStage()]), recorder)
    assert manifest.counts == {"images": 3, "enlarged": 3}
    [message] = [event for event in recorder.events if isinstance(event, Message) and "enlarged" in event.text]
    assert message.level == "warning"
