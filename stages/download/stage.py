"""download: a source becomes raw shards of original bytes, captions and provenance; what is no use is listed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.artifact import Blob, Output, Refusal, Shard
from stages.core.errors import InputError, TransientError
from stages.core.fingerprint import digest_bytes, digest_of
from stages.core.shard import ShardWriter
from stages.core.stage import Context, Inputs, MapStage, Setting, Unit, explain_changes
from stages.download.changes import Listings, counts_of_changes
from stages.download.checking import ImageChecker
from stages.download.config import HubSource
from stages.download.hub import HubRepository
from stages.download.images import Inspection
from stages.download.listing import NO_CAPTION, Listing, Sample, list_source
from stages.download.local import LocalFolder
from stages.download.partition import PlannedShard, from_record, partition, to_record

if TYPE_CHECKING:
    from stages.config import DatasetSection

SHOWN = 5


def open_source(dataset: DatasetSection, setting: Setting, commit: str | None = None) -> LocalFolder | HubRepository:
    """The source of a data set; `commit` pins it to a state that was resolved before."""
    field, section = f"datasets.{dataset.id}.source", dataset.source
    if isinstance(section, HubSource):
        return HubRepository(section, field, dataset.caption_strategy, commit)
    return LocalFolder(section, field, dataset.caption_strategy, setting.store.digests)


class DownloadStage(MapStage):
    """Images and captions out of a source, into raw shards that keep still while the source grows."""

    name = "download"
    version = 1
    hardware = "cpu"
    per_dataset = True
    needs = ()
    summary = "copies captioned images into raw shards and refuses what cannot be used"

    def __init__(self) -> None:
        self._listings = Listings()  # for explanations alone

    # -- before a run -------------------------------------------------------------------------------------------------

    def settings(self, setting: Setting) -> dict[str, Any]:
        dataset, section = setting.the_dataset, setting.config.download
        return {
            # Not the revision: what it stands for is looked up, so that 'main' and the commit behind it are the same.
            "from": dataset.source.model_dump(mode="json", exclude={"revision"}),
            "caption_strategy": dataset.caption_strategy,
            "minimum_edge": section.minimum_edge,
            "maximum_megapixels": section.maximum_megapixels,
            "shard_mb": section.shard_mb,
            "shard_samples": section.shard_samples,
        }

    def surroundings(self, setting: Setting) -> dict[str, Any]:
        """The source's state: counts, and digests of its images, its captions and which belongs to which."""
        dataset = setting.the_dataset
        listing = list_source(open_source(dataset, setting), dataset.caption_strategy)
        _judge(setting, listing.images, listing.refused)
        state = {"kind": "hub" if listing.commit else "local", **listing.state()}
        self._listings.note(setting.store, state, listing)
        return {"source": state}

    def foretell(self, spec: dict[str, Any]) -> dict[str, str]:
        """All three facets follow from the listing. Which images are accepted follows from their bytes and from the
        limits, so both are in `pixels`."""
        state = spec["source"]
        return {
            "pixels": digest_of([state["pixels"], spec["minimum_edge"], spec["maximum_megapixels"]]),
            "captions": state["captions"],
            "pairs": state["pairs"],
        }

    def check(self, setting: Setting) -> None:
        source = open_source(setting.the_dataset, setting)
        source.check()
        if not source.has_images():
            list_source(source, "filename")  # says so in words

    def foresee(self, setting: Setting, done: Inputs) -> None:
        if setting.dataset is None:
            return
        manifest = done.all(self.name).get(setting.dataset.id)
        if manifest is not None:  # made under a more generous limit, perhaps
            _judge(setting, manifest.counts["images"] + manifest.counts["refused"], manifest.refused)

    def explain(self, old: Any, new: Any) -> list[str]:
        was, now = dict(old or {}), dict(new or {})
        before, state = was.pop("source", None), now.pop("source", None)
        texts = counts_of_changes(before, state)
        if texts:
            texts += self._listings.names(self.name, self.version, old, state)
        return texts + explain_changes(was, now)

    # -- the units ----------------------------------------------------------------------------------------------------

    def memo_spec(self, spec: dict[str, Any]) -> dict[str, Any]:
        # The source's state and the captions are in each unit's identity; its size limits only shape the partition.
        return {key: spec[key] for key in ("minimum_edge", "maximum_megapixels")}

    def units(self, context: Context, inputs: Inputs) -> list[Unit]:
        del inputs  # it has none
        listing = self._listing(context)
        samples = {sample.key: sample for sample in listing.samples}
        units = []
        for index, shard in enumerate(self._plan(context, listing)):
            members = [samples[key] for key in shard.keys]
            identity = {
                "name": shard.name,
                "samples": [[member.key, member.image.identity, member.caption_sha256] for member in members],
            }
            units.append(Unit(index, shard.name, identity, len(members), members))
        return units

    def _listing(self, context: Context) -> Listing:
        """The source again, as it was when the fingerprint was made."""
        dataset, expected = context.dataset, context.spec["source"]
        source = open_source(dataset, context.setting, commit=expected.get("commit"))
        listing = list_source(source, dataset.caption_strategy)
        state = {"kind": expected["kind"], **listing.state()}
        if state != expected:
            changes = "; ".join(counts_of_changes(expected, state))
            raise TransientError(
                f"{context.label}: {source.where} changed while it was looked at ({changes}); run again"
            )
        if listing.dropped_lines:
            context.log(
                f"{listing.dropped_lines} further lines of caption files are left out: the first line is the caption",
                "warning",
            )
        return listing

    def _plan(self, context: Context, listing: Listing) -> list[PlannedShard]:
        """The partition of this artifact: written down once, so that every machine that works on it has the same one;
        made from the newest earlier partition of the same source, so that shards keep still."""
        store, section = context.store, context.config.download
        place = context.spec["from"]
        place_digest = digest_of([context.dataset.id, place, section.shard_mb, section.shard_samples])
        latest, mine = f"memo/{self.name}/source-{place_digest}.json", self._plan_path(context)
        planned = from_record(store.get_json(mine))
        if {key for shard in planned for key in shard.keys} != {sample.key for sample in listing.samples}:
            earlier = from_record(store.get_json(latest))
            shard_bytes = int(section.shard_mb * 1e6)
            planned = partition(listing.samples, earlier, shard_bytes, section.shard_samples)
            refused = [refusal.model_dump() for refusal in listing.refused]
            if not store.create_json(mine, {**to_record(planned), "refused": refused}):
                planned = from_record(store.get_json(mine)) or planned  # another machine was faster
        if store.get_json(latest) != to_record(planned):
            store.put_json(latest, to_record(planned))
        return planned

    def _plan_path(self, context: Context) -> str:
        return f"memo/{self.name}/plan-{context.fingerprint}.json"

    # -- the work -----------------------------------------------------------------------------------------------------

    def process(self, context: Context, inputs: Inputs, units: Sequence[Unit]) -> Iterator[tuple[Unit, Output]]:
        del inputs
        section, total = context.config.download, sum(unit.samples for unit in units)
        source = open_source(context.dataset, context.setting, commit=context.spec["source"].get("commit"))
        pixels = int(section.maximum_megapixels * 1e6)
        size = sum(member.image.bytes for unit in units for member in unit.payload)
        with (
            context.progress("images", total, "image") as bar,
            ImageChecker(section.processes, section.minimum_edge, pixels, size) as checker,
        ):
            for unit in units:
                members: list[Sample] = unit.payload
                checked = checker.check(source.fetch([member.image for member in members]))
                shard = _RawShard(context, unit.name)
                for member, (path, inspection) in zip(members, checked, strict=True):
                    context.check_stop()
                    shard.add(member, path, inspection)
                    bar.advance(1, unit.name)
                yield unit, shard.finish()

    def finish(self, context: Context, inputs: Inputs, outputs: list[Output]) -> Output:
        del inputs
        joined = Output.joined(outputs)
        # What the listing refused was written down with the partition: nothing is looked at again.
        plan = context.store.get_json(self._plan_path(context)) or {}
        listed = [Refusal.model_validate(refusal) for refusal in plan.get("refused", [])]
        refused = sorted([*joined.refused, *listed], key=lambda refusal: refusal.name)
        images = joined.counts.get("images", 0)
        _judge(context.setting, images + len(refused), refused)
        state = context.spec["source"]
        return Output(
            shards=joined.shards,
            counts={"images": images, "refused": len(refused), "distinct_captions": state["distinct_captions"]},
            refused=refused,
            facets=self.foretell(context.spec),
            info={"source": {**context.spec["from"], **({"commit": state["commit"]} if "commit" in state else {})}},
        )


@dataclass
class _Line:
    """A line of a shard's list of captions."""

    key: str
    caption: str
    caption_sha256: str
    image_sha256: str


class _RawShard:
    """Writes one raw shard, sample by sample."""

    def __init__(self, context: Context, name: str) -> None:
        self._context = context
        self._name = name
        self._writer = ShardWriter(context.scratch / f"{name}.tar")
        self._lines: list[_Line] = []
        self._pixels: list[list[str]] = []
        self._refused: list[Refusal] = []

    def add(self, sample: Sample, path: Path, inspection: Inspection) -> None:
        """Appends a sample, or notes why it is refused.

        Raises:
            TransientError: the file is not the one that was listed.
        """
        identity = sample.image.identity
        if inspection.sha256 and len(identity) == 64 and inspection.sha256 != identity:
            raise _changed(self._context, path)
        # A refused image keeps its line: the list of captions is that of the listing, whatever its images turn out to
        # be, so an image that is repaired finds its caption encoded.
        self._lines.append(_Line(sample.key, sample.caption, sample.caption_sha256, inspection.sha256))
        if inspection.refused is not None:
            self._refused.append(Refusal(name=sample.image.path, reason=inspection.refused))
            return
        data = path.read_bytes()
        if digest_bytes(data) != inspection.sha256:
            raise _changed(self._context, path)
        provenance = {
            "path": sample.image.path,
            "sha256": inspection.sha256,
            "bytes": inspection.bytes,
            "width": inspection.width,
            "height": inspection.height,
            "format": inspection.format,
            "mode": inspection.mode,
            "exif_orientation": inspection.exif_orientation,
            "caption_sha256": sample.caption_sha256,
        }
        self._writer.write(
            sample.key,
            {
                inspection.extension: data,
                "txt": sample.caption.encode(),
                "json": json.dumps(provenance, sort_keys=True, ensure_ascii=False).encode(),
            },
        )
        self._pixels.append([sample.key, inspection.sha256])

    def finish(self) -> Output:
        """Uploads what was written."""
        self._writer.close()
        lines = "".join(json.dumps(vars(line), sort_keys=True, ensure_ascii=False) + "\n" for line in self._lines)
        captions: Blob = self._context.store.put_bytes(lines.encode(), ".jsonl")
        shard: Shard = self._context.save_shard(
            self._writer.path,
            self._name,
            self._writer.samples,
            facets={"pixels": digest_of(self._pixels)},
            sidecars={"captions": captions},
        )
        counts = {"images": self._writer.samples, "refused": len(self._refused)}
        return Output(shards=[shard], counts=counts, refused=self._refused)


def _changed(context: Context, path: Path) -> TransientError:
    return TransientError(f"{context.label}: {path} changed while it was read; run again")


def _judge(setting: Setting, images: int, refused: Sequence[Refusal]) -> None:
    """Raises:
    InputError: everything is refused, or more than the configured share.
    """
    limit = setting.config.download.max_refused_share
    if not refused or (len(refused) < images and len(refused) <= limit * images):
        return
    shown = "".join(f"\n  {refusal.name}: {refusal.reason}" for refusal in refused[:SHOWN])
    more = f"\n  ... and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
    name = setting.the_dataset.id
    who, field = f"download[{name}]", f"datasets.{name}"
    if all(refusal.reason.startswith(NO_CAPTION) for refusal in refused):
        more += (
            f"\nWrite the captions into these files, or set {field}.caption_strategy: filename to take the images' "
            f"names for captions."
        )
    if len(refused) == images:
        raise InputError(f"{who}: all {images} images of {field}.source are refused:{shown}{more}")
    raise InputError(
        f"{who}: {len(refused)} of {images} images of {field}.source are refused, more than "
        f"download.max_refused_share ({limit:.0%}) allows:{shown}{more}"
    )
