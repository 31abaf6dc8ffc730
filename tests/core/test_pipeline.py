"""The pipeline's promises, on small stages that count: nothing twice, nothing half, nothing unexplained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from stages.config import Config
from stages.core.artifact import Blob, Manifest, Output
from stages.core.errors import InputError, MissingInputError, PreemptedError
from stages.core.events import Message, Recorder, StageFinished, StageReused
from stages.core.preemption import StopFlag
from stages.core.runner import Slice
from stages.core.shard import ShardWriter, read_shard
from stages.core.stage import Context, Inputs, MapStage, Need, Setting, Stage, Unit
from stages.core.store import Store
from stages.pipeline import Node, Pipeline


class Source(Stage):
    """Letters out of a text file: one shard a line. Foretells its facet from the file alone."""

    name = "download"
    version = 1
    per_dataset = True

    def settings(self, setting: Setting) -> dict[str, Any]:
        return {}

    def surroundings(self, setting: Setting) -> dict[str, Any]:
        return {"text": Path(setting.the_dataset.source.path).read_text()}  # type: ignore[union-attr]

    def foretell(self, spec: dict[str, Any]) -> dict[str, str]:
        return {"letters": spec["text"].upper()}

    def run(self, context: Context, inputs: Inputs) -> Output:
        shards = []
        for number, line in enumerate(context.spec["text"].split()):
            path = context.scratch / f"{number}.tar"
            with ShardWriter(path) as shard:
                shard.write("line", {"txt": line.upper().encode()})
            shards.append(context.save_shard(path, f"{number}", 1))
        return Output(shards=shards, counts={"lines": len(shards)}, facets=self.foretell(context.spec))


class Double(MapStage):
    """Each line twice, unit by unit. `done` counts the units that were really worked on; `mark` is what makes two runs
    of the same fingerprint differ."""

    name = "bucket"
    version = 1
    per_dataset = True
    needs = (Need("download", "letters"),)

    def __init__(self) -> None:
        self.done: list[str] = []
        self.model = "one"
        self.mark = ""
        self.die_after: int | None = None
        self.stop: StopFlag | None = None

    def settings(self, setting: Setting) -> dict[str, Any]:
        return {"resolution": setting.config.bucket.resolution}

    def surroundings(self, setting: Setting) -> dict[str, Any]:
        return {"model": self.model}

    def units(self, context: Context, inputs: Inputs) -> list[Unit]:
        shards = inputs.one("download").shards
        return [Unit(index, shard.name, shard.sha256, 1, shard) for index, shard in enumerate(shards)]

    def process(self, context: Context, inputs: Inputs, units: Sequence[Unit]) -> Iterator[tuple[Unit, Output]]:
        for unit in units:
            if self.die_after is not None and len(self.done) >= self.die_after:
                raise RuntimeError("killed")
            [(key, members)] = read_shard(context.store.fetch(unit.payload))
            path = context.scratch / "out.tar"
            with ShardWriter(path) as shard:
                shard.write(key, {"txt": members["txt"] * 2 + f"{context.spec['resolution']}{self.mark}".encode()})
            self.done.append(members["txt"].decode())
            if self.stop and len(self.done) == 1:
                self.stop.set("SIGTERM")
            yield unit, Output(shards=[context.save_shard(path, unit.name, 1)], counts={"lines": 1})

    def finish(self, context: Context, inputs: Inputs, outputs: list[Output]) -> Output:
        return Output.joined(outputs)


class Total(Stage):
    """All letters of all data sets in one file; wants at least `train.train_batch_size` lines."""

    name = "train"
    version = 1
    needs = (Need("bucket"),)

    def __init__(self) -> None:
        self.runs = 0
        self.forced = False

    def settings(self, setting: Setting) -> dict[str, Any]:
        return {"steps": setting.config.train.steps}

    def foresee(self, setting: Setting, done: Inputs) -> None:
        if "bucket" in done:
            lines = sum(manifest.counts["lines"] for manifest in done.all("bucket").values())
            if lines < setting.config.train.train_batch_size:
                raise InputError(f"{lines} lines do not fill a batch of {setting.config.train.train_batch_size}")

    def run(self, context: Context, inputs: Inputs) -> Output:
        self.runs += 1
        self.forced = context.force
        texts = [
            members["txt"].decode()
            for manifest in inputs.all("bucket").values()
            for shard in manifest.shards
            for _, members in read_shard(context.store.fetch(shard))
        ]
        return Output(files=[context.save_file("total.txt", "\n".join(texts).encode())])


class World:
    """A store, a source file and a pipeline over the three stages; `run` goes through it as a flow would."""

    def __init__(self, folder: Path) -> None:
        self.text = folder / "source.txt"
        self.text.write_text("aa bb cc")
        self.store_url = f"file://{folder}/store"
        self.cache = str(folder / "cache")
        self.double, self.total = Double(), Total()
        self.recorder = Recorder()

    def pipeline(self, **changes: Any) -> Pipeline:
        fields: dict[str, Any] = {
            "name": "world",
            "model": {"pretrained_model_name_or_path": "none"},
            "store": {"url": self.store_url, "cache_dir": self.cache},
            "datasets": [{"id": "letters", "source": {"type": "local", "path": str(self.text)}}],
            "publish": {"path": "none"},
            **changes,
        }
        config = Config.model_validate(fields)
        return Pipeline(config, Store(config.store), (Source(), self.double, self.total))

    def run(self, stop: StopFlag | None = None, **changes: Any) -> dict[str, Manifest]:
        pipeline, manifests = self.pipeline(**changes), {}
        self.recorder = Recorder()
        for node in pipeline.order:
            made = pipeline.run_node(node, manifests, self.recorder, stop=stop)
            assert made is not None
            manifests[node] = made
        return {node.label: manifest for node, manifest in manifests.items()}

    @property
    def reused(self) -> list[str]:
        return [event.stage for event in self.recorder.events if isinstance(event, StageReused)]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def actions(pipeline: Pipeline) -> dict[str, str]:
    return {step.node.label: step.action for step in pipeline.plan()}


def reasons(pipeline: Pipeline, label: str) -> str:
    return "; ".join(next(step.reasons for step in pipeline.plan() if step.node.label == label))


def test_the_second_run_does_nothing_and_says_so(world: World) -> None:
    first = world.run()
    assert world.reused == []
    assert world.run() == first
    assert world.reused == ["download[letters]", "bucket[letters]", "train"]
    assert world.double.done == ["AA", "BB", "CC"]
    assert set(actions(world.pipeline()).values()) == {"reuse"}


def test_a_plan_before_the_first_run(world: World) -> None:
    assert set(actions(world.pipeline()).values()) == {"run"}
    assert reasons(world.pipeline(), "download[letters]") == "first run"


def test_a_changed_setting_redoes_its_stage_and_what_follows(world: World) -> None:
    world.run()
    changed: dict[str, Any] = {"bucket": {"resolution": 2.0}}
    assert actions(world.pipeline(**changed)) == {
        "download[letters]": "reuse",
        "bucket[letters]": "run",
        "train": "run",
    }
    assert "resolution 1.0 -> 2.0" in reasons(world.pipeline(**changed), "bucket[letters]")
    assert "bucket[letters] will be made anew" in reasons(world.pipeline(**changed), "train")
    world.run(**changed)
    assert world.reused == ["download[letters]"]
    assert world.total.runs == 2


def test_going_back_finds_the_old_artifacts(world: World) -> None:
    first = world.run()
    world.run(bucket={"resolution": 2.0})
    assert world.run() == first
    assert len(world.reused) == 3


def test_a_new_line_works_on_the_new_line_alone(world: World) -> None:
    world.run()
    world.double.done.clear()
    world.text.write_text("aa bb cc dd")
    assert actions(world.pipeline())["bucket[letters]"] == "run"
    manifests = world.run()
    assert world.double.done == ["DD"]
    assert manifests["bucket[letters]"].counts == {"lines": 4}


def test_a_change_that_a_stage_does_not_look_at_is_foretold_to_stop_there(world: World) -> None:
    """The facet is in upper case: a change of case redoes the source alone, and the plan knows it beforehand."""
    world.run()
    world.text.write_text("Aa bb cc")
    assert actions(world.pipeline()) == {"download[letters]": "run", "bucket[letters]": "reuse", "train": "reuse"}
    world.run()
    assert world.reused == ["bucket[letters]", "train"]


def test_a_raised_stage_version_redoes_the_stage(world: World) -> None:
    world.run()
    world.total.version = 2
    assert actions(world.pipeline())["train"] == "run"
    assert reasons(world.pipeline(), "train") == "stage version 1 -> 2"


def test_what_was_finished_before_a_crash_is_kept(world: World) -> None:
    world.double.die_after = 2
    with pytest.raises(RuntimeError, match="killed"):
        world.run()
    pipeline = world.pipeline()
    assert pipeline.last(Node("bucket", "letters")) is None
    assert actions(pipeline)["bucket[letters]"] == "run"
    world.double.die_after = None
    after = world.run()
    assert world.double.done == ["AA", "BB", "CC"]

    fresh = World(world.text.parent / "elsewhere_")
    assert after["train"].digest() == _run_in_fresh_store(world, fresh)


def _run_in_fresh_store(world: World, fresh: World) -> str:
    fresh.text = world.text
    return fresh.run()["train"].digest()


@pytest.fixture(autouse=True)
def _room_for_a_second_world(tmp_path: Path) -> None:
    (tmp_path / "elsewhere_").mkdir()


def test_a_polite_stop_keeps_finished_units(world: World) -> None:
    stop = StopFlag()
    world.double.stop = stop
    with pytest.raises(PreemptedError, match="finished work is saved"):
        world.run(stop)
    world.double.stop = None
    world.run()
    assert world.double.done == ["AA", "BB", "CC"]


def test_several_machines_share_a_map_stage(world: World) -> None:
    pipeline = world.pipeline()
    node, source = Node("bucket", "letters"), Node("download", "letters")
    made = pipeline.run_node(source, {}, Recorder())
    assert made is not None
    with pytest.raises(MissingInputError, match="3 of 3 units are not done yet"):
        pipeline.run_node(node, {source: made}, Recorder(), merge_only=True)
    for index in range(2):
        assert pipeline.run_node(node, {source: made}, Recorder(), slice_=Slice(index, 2)) is None
    assert world.double.done == ["AA", "CC", "BB"]
    assert pipeline.last(node) is None
    merged = pipeline.run_node(node, {source: made}, Recorder(), merge_only=True)
    assert merged is not None
    assert len(world.double.done) == 3
    assert [shard.name for shard in merged.shards] == ["0", "1", "2"]


def force(world: World, stage: str, first: dict[str, Manifest]) -> Manifest:
    pipeline = world.pipeline()
    [node] = pipeline.nodes_of(stage)
    manifests = {source: first[source.label] for source in pipeline.upstream(node)}
    again = pipeline.run_node(node, manifests, world.recorder, force=True)
    assert again is not None
    return again


def blobs(manifest: Manifest) -> list[Blob]:
    return [*manifest.shards, *manifest.files]


@pytest.mark.parametrize("stage", ["bucket", "train"])
def test_force_makes_it_again_to_the_same_digest_and_repairs_what_is_damaged(world: World, stage: str) -> None:
    first = world.run()
    store = world.pipeline().store
    label = "bucket[letters]" if stage == "bucket" else stage
    damaged, *others = blobs(first[label])
    store.files.put_bytes(damaged.path, b"?" * damaged.bytes)
    if others:
        store.files.delete(others[0].path)
    again = force(world, stage, first)
    assert again.digest() == first[label].digest()
    for blob in blobs(again):
        assert len(store.read_blob(blob)) == blob.bytes
    assert (len(world.double.done), world.total.runs) == ((6, 1) if stage == "bucket" else (3, 2))


def test_force_takes_what_comes_out_this_time(world: World) -> None:
    first = world.run()
    world.double.mark = "!"
    forced = force(world, "bucket", first)
    assert forced.fingerprint == first["bucket[letters]"].fingerprint
    assert forced.digest() != first["bucket[letters]"].digest()
    world.double.mark = "never asked"
    later = world.run()
    assert later["bucket[letters]"] == forced
    assert later["train"].digest() != first["train"].digest()


def test_a_stage_knows_that_it_is_forced(world: World) -> None:
    first = world.run()
    assert not world.total.forced
    force(world, "train", first)
    assert world.total.forced


@pytest.mark.parametrize("memo", [b"{", b"[1]", b'{"shards": 3}'])
def test_a_memo_that_cannot_be_understood_is_written_again(world: World, memo: bytes) -> None:
    pipeline = world.pipeline()
    node, source = Node("bucket", "letters"), Node("download", "letters")
    made = pipeline.run_node(source, {}, Recorder())
    assert made is not None
    pipeline.run_node(node, {source: made}, Recorder(), slice_=Slice(0, 1))
    name = pipeline.store.files.names("memo/bucket")[0]
    pipeline.store.files.put_bytes(f"memo/bucket/{name}", memo)
    with pytest.raises(MissingInputError, match="1 of 3 units are not done yet"):
        pipeline.run_node(node, {source: made}, Recorder(), merge_only=True)
    pipeline.run_node(node, {source: made}, Recorder(), slice_=Slice(0, 1))
    assert len(world.double.done) == 4
    merged = pipeline.run_node(node, {source: made}, Recorder(), merge_only=True)
    assert merged is not None
    assert merged.counts == {"lines": 3}


def test_what_the_store_cannot_promise_is_said_in_the_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = world.pipeline(store={"url": world.store_url, "cache_dir": world.cache, "allow_unconditional": True})

    def create(path: str, data: bytes) -> bool:
        pipeline.store.files.put_bytes(path, data)
        return True

    monkeypatch.setattr(pipeline.store.files, "create", create)
    pipeline.run_node(Node("download", "letters"), {}, world.recorder)
    said = [event.text for event in world.recorder.events if isinstance(event, Message) and event.level == "warning"]
    assert len(said) == 1
    assert "ignores create-only writes" in said[0]


def test_too_little_data_is_found_before_the_stage_that_needs_it(world: World) -> None:
    with pytest.raises(InputError, match="3 lines do not fill a batch of 9"):
        world.run(train={"train_batch_size": 9})
    assert world.total.runs == 0
    with pytest.raises(InputError, match="do not fill"):
        world.run(train={"train_batch_size": 9})


def test_a_stage_alone_finds_its_inputs_or_says_what_is_missing(world: World) -> None:
    train = Node("train")
    with pytest.raises(MissingInputError, match=r"train needs bucket\[letters\].*run `loraline stage bucket` first"):
        world.pipeline().find_inputs(train)
    made = world.run()
    assert world.pipeline().find_inputs(train)[Node("bucket", "letters")] == made["bucket[letters]"]
    with pytest.raises(MissingInputError, match=r"other settings \(resolution 1.0 -> 2.0\)"):
        world.pipeline(bucket={"resolution": 2.0}).find_inputs(train)
    world.double.model = "another"
    with pytest.raises(MissingInputError, match=r"another model \(model one -> another\): run `loraline stage bucket`"):
        world.pipeline().find_inputs(train)
    world.double.model, world.double.version = "one", 2
    with pytest.raises(MissingInputError, match=r"version 1 of the stage, which is now 2: run `loraline stage bucket`"):
        world.pipeline().find_inputs(train)
    world.double.version = 1
    world.text.write_text("aa bb cc dd")
    pipeline = world.pipeline()
    pipeline.run_node(Node("download", "letters"), {}, Recorder())
    with pytest.raises(MissingInputError, match=r"made last from an older download\[letters\]"):
        pipeline.find_inputs(train)


def test_given_inputs_are_taken_as_they_are(world: World) -> None:
    old = world.run()["bucket[letters]"]
    world.run(bucket={"resolution": 2.0})
    found = world.pipeline().find_inputs(Node("train"), {"bucket[letters]": old.fingerprint})
    assert list(found.values()) == [old]
    with pytest.raises(MissingInputError, match="has no"):
        world.pipeline().find_inputs(Node("train"), {"bucket[letters]": "0" * 64})


def test_the_source_of_the_download_may_be_out_of_reach_of_a_stage_that_runs_alone(world: World) -> None:
    made = world.run()
    world.text.unlink()
    assert world.pipeline().find_inputs(Node("train"))[Node("bucket", "letters")] == made["bucket[letters]"]


@pytest.mark.parametrize("record", [b"{", b"{}", b"[1]"])
def test_a_damaged_memory_is_only_forgotten(world: World, record: bytes) -> None:
    world.run()
    pipeline = world.pipeline()
    pipeline.store.files.put_bytes("runs/world/last/train.json", record)
    pipeline.store.files.put_bytes("runs/world/published.json", record)
    assert actions(pipeline)["train"] == "reuse"
    world.total.version = 2
    assert reasons(pipeline, "train") == "first run"
    assert pipeline.last(Node("train")) is None
    assert pipeline.published() is None


def test_two_data_sets_meet_in_training(world: World, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("xx")
    datasets = [
        {"id": name, "source": {"type": "local", "path": str(path)}}
        for name, path in (("letters", world.text), ("more", other))
    ]
    made = world.run(datasets=datasets)
    assert set(made) == {"download[letters]", "download[more]", "bucket[letters]", "bucket[more]", "train"}
    text = Path(world.pipeline().store.fetch(made["train"].file("total.txt"))).read_text()
    assert text == "AAAA1.0\nBBBB1.0\nCCCC1.0\nXXXX1.0"


def test_manifests_say_what_made_them(world: World) -> None:
    manifest = world.run()["train"]
    assert manifest.versions["python"]
    assert manifest.created_at
    assert manifest.inputs.keys() == {"bucket[letters].content"}
    assert json.loads(manifest.model_dump_json())["spec"] == {"steps": 1000}
    assert any(isinstance(event, StageFinished) for event in world.recorder.events)
