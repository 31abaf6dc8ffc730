"""The `bucket` stage: raw shards in, cropped shards out, one for each bucket size that a raw shard holds.

Captions are not looked at: a caption that changes leaves every crop as it is.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from stages.bucket.alignment import model_alignment
from stages.bucket.config import BucketSection
from stages.bucket.geometry import Rules, Size, Unit, size_in_words
from stages.bucket.workers import Refused, Task, available_cores, crop_all
from stages.core import stage
from stages.core.artifact import Manifest, Output, Refusal, Shard
from stages.core.errors import CorruptBlobError, InputError, TransientError
from stages.core.fingerprint import canonical_json
from stages.core.shard import ShardWriter
from stages.core.stage import Context, Inputs, MapStage, Need, Setting, explain_changes
from stages.models.source import ModelSource

SIZES = ("resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size")
NOT_PIXELS = ("txt", "json")


class BucketStage(MapStage):
    """Crops every picture to an aspect bucket."""

    name = "bucket"
    version = 1
    per_dataset = True
    needs = (Need("download", "pixels"),)
    summary = "decodes, turns upright, scales and crops every image to an aspect bucket"

    def settings(self, setting: Setting) -> dict[str, Any]:
        fields = section_of(setting).model_dump(exclude={"processes", "workers", "max_refused_share"})
        if fields["crop_style"] == "centre":
            fields["crop_style"] = "center"
        if fields["alignment"] is None:
            del fields["alignment"]  # looked up in `surroundings`
        return fields

    def surroundings(self, setting: Setting) -> dict[str, Any]:
        if section_of(setting).alignment is not None:
            return {}
        model = ModelSource(setting.config.model, setting.store)
        return {"alignment": model_alignment(model.config("vae"), model.config("transformer"))}

    def explain(self, old: Any, new: Any) -> list[str]:
        return explain(old, new)

    def foresee(self, setting: Setting, done: Inputs) -> None:
        """Judges an artifact that is reused as strictly as a new one: the share is no part of the fingerprint."""
        if setting.dataset is None:
            return
        manifest = done.all(self.name).get(setting.dataset.id)
        if manifest is not None:
            judge_refusals(section_of(setting), setting.dataset.id, images_in(manifest), manifest.refused)

    def units(self, context: Context, inputs: Inputs) -> list[stage.Unit]:
        return [
            stage.Unit(index, shard.name, shard.facets["pixels"], shard.samples, shard)
            for index, shard in enumerate(inputs.one("download").shards)
        ]

    def process(
        self, context: Context, inputs: Inputs, units: Sequence[stage.Unit]
    ) -> Iterator[tuple[stage.Unit, Output]]:
        total = sum(unit.samples for unit in units)
        workers = min(section_of(context.setting).processes or available_cores(), max(total, 1))
        by_index = {unit.index: unit for unit in units}
        tasks = (task for unit in units for task in read_tasks(context, unit))
        with context.progress("crops", total, "image") as bar:
            results = crop_all(tasks, Rules(**context.spec), workers)
            try:
                for index, group in groupby(results, key=lambda result: result[0].unit):
                    writer = UnitWriter(context, by_index[index])
                    for task, crop in group:
                        writer.add(task, crop)
                        bar.advance(1, task.name)
                        context.check_stop()
                    yield by_index[index], writer.close()
            except TransientError:
                context.check_stop()  # a signal to the whole process group ends the workers too: that is no failure
                raise
            finally:
                results.close()  # type: ignore[attr-defined]  # a generator: ends the worker processes

    def finish(self, context: Context, inputs: Inputs, outputs: list[Output]) -> Output:
        joined = Output.joined(outputs)
        images = sum(shard.samples for shard in joined.shards)
        judge_refusals(section_of(context.setting), context.dataset.id, images, joined.refused)
        histogram: dict[str, int] = {}
        for width, height, samples in sorted((*(shard.bucket or (0, 0)), shard.samples) for shard in joined.shards):
            name = f"{width}x{height}"
            histogram[name] = histogram.get(name, 0) + samples
        enlarged = joined.counts.get("enlarged", 0)
        if enlarged:
            context.log(
                f"{enlarged} of {images} pictures are smaller than their crop and were enlarged: "
                f"bucket.minimum_image_size leaves such pictures out",
                "warning" if enlarged > images / 2 else "info",
            )
        info = {"buckets": histogram, "alignment": context.spec["alignment"]}
        return joined.model_copy(update={"info": info})


def section_of(setting: Setting) -> BucketSection:
    """The `bucket` section as it holds for the setting's data set."""
    return setting.the_dataset.bucket.applied_to(setting.config.bucket)


def images_in(manifest: Manifest) -> int:
    return sum(shard.samples for shard in manifest.shards)


def judge_refusals(section: BucketSection, dataset: str, images: int, refused: Sequence[Refusal]) -> None:
    """Fails when too much was left out.

    Raises:
        InputError: nothing is left, or more than `max_refused_share` was refused.
    """
    total = images + len(refused)
    examples = "; ".join(f"{refusal.name}: {refusal.reason}" for refusal in refused[:3])
    if total and not images:
        raise InputError(f"data set {dataset}: all {total} images were refused ({examples})")
    if len(refused) > section.max_refused_share * total:
        raise InputError(
            f"data set {dataset}: {len(refused)} of {total} images were refused, more than bucket.max_refused_share "
            f"{section.max_refused_share:g} allows ({examples}). Mend or remove them, or raise the share."
        )


def explain(old: Any, new: Any) -> list[str]:
    """What changed between two specs, with units: 'resolution 0.016 -> 0.02 MP'."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return explain_changes(old, new)
    before, after = old.get("resolution_type"), new.get("resolution_type")
    texts = []
    for field in SIZES:
        was, now = old.get(field), new.get(field)
        # The same number in another unit is another size; nothing is the same in all of them.
        if was == now and (before == after or not now):
            continue
        texts.append(f"{field} {_sizes(was, before, now, after)}")
    rest = {*SIZES, "resolution_type"}
    return texts + explain_changes(
        {key: value for key, value in old.items() if key not in rest},
        {key: value for key, value in new.items() if key not in rest},
    )


def _sizes(was: float | None, before: Unit | None, now: float | None, after: Unit | None) -> str:
    if before == after and was is not None and now is not None and after is not None:
        return f"{was:.10g} -> {now:.10g} {size_in_words(now, after).partition(' ')[2]}"
    return f"{_size(was, before)} -> {_size(now, after)}"


def _size(size: float | None, unit: Unit | None) -> str:
    return "none" if size is None or unit is None else size_in_words(size, unit)


def read_tasks(context: Context, unit: stage.Unit) -> Iterator[Task]:
    """The pictures of one raw shard, in its order. Reads the tar's headers and the provenance, no pixels.

    Raises:
        StoreError: the shard cannot be had, or its samples are not what its manifest says.
    """
    shard: Shard = unit.payload
    path = context.store.fetch(shard)
    found = 0
    with tarfile.open(path, "r:") as tar:
        for key, members in groupby(tar, key=lambda member: member.name.partition(".")[0]):
            by_extension = {member.name.partition(".")[2]: member for member in members}
            pixels = [member for extension, member in by_extension.items() if extension not in NOT_PIXELS]
            provenance = tar.extractfile(by_extension["json"]) if "json" in by_extension else None
            if len(pixels) != 1 or provenance is None:
                raise CorruptBlobError(f"{unit.name}: sample {key} has no image or no provenance: download it again")
            record = json.load(provenance)
            yield Task(unit.index, key, record["path"], path, pixels[0].offset_data, pixels[0].size, record["sha256"])
            found += 1
    if found != shard.samples:
        raise CorruptBlobError(f"{unit.name}: {found} samples, its manifest says {shard.samples}: download it again")


class UnitWriter:
    """Writes the crops of one raw shard to one tar for each bucket size, in the raw shard's order."""

    def __init__(self, context: Context, unit: stage.Unit) -> None:
        self.context, self.unit = context, unit
        self.writers: dict[Size, ShardWriter] = {}
        self.refused: list[Refusal] = []
        self.enlarged = 0

    def add(self, task: Task, result: Any) -> None:
        """Appends one crop, or one refusal."""
        if isinstance(result, Refused):
            self.refused.append(Refusal(name=task.name, reason=result.reason))
            return
        size = result.placement.bucket
        if size not in self.writers:
            self.writers[size] = ShardWriter(self._path(size))
        record = {"key": task.key, **result.record}
        self.writers[size].write(task.key, {"png": result.png, "json": canonical_json(record).encode()})
        self.enlarged += result.placement.enlarged

    def close(self) -> Output:
        """Uploads the shards, smallest bucket first."""
        shards = []
        for size, writer in sorted(self.writers.items()):
            writer.close()
            name = f"{self.unit.name}-{size[0]}x{size[1]}"
            shards.append(self.context.save_shard(self._path(size), name, writer.samples, bucket=size))
        counts = {"images": sum(shard.samples for shard in shards)}
        if self.enlarged:
            counts["enlarged"] = self.enlarged
        return Output(shards=shards, counts=counts, refused=self.refused)

    def _path(self, size: Size) -> Path:
        return self.context.scratch / f"{self.unit.index}-{size[0]}x{size[1]}.tar"
