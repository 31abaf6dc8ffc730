"""What the page tells of a data set: how many, which sizes, how the crops look, what was refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from stages.config import DatasetSection
from stages.core.artifact import Manifest, Shard
from stages.core.shard import MappedShard
from stages.core.store import Store
from stages.report import wording
from stages.report.charts import bar
from stages.report.missing import Gaps
from stages.report.pictures import Album, Thumbnail

CROPS = 24  # on a data set's contact sheet
CROP_EDGE = 224
SHARDS_FETCHED = 6  # for a contact sheet: one may weigh hundreds of megabytes
SIDECARS_READ = 32  # lists of captions that are looked into
REASONS, NAMES = 12, 12  # groups of refusals, and names in each, that are spelled out
BUCKETS = 24
SHEETS = 4  # data sets that get a contact sheet of their own; what is shown is a sample anyway


@dataclass(frozen=True)
class Number:
    """A count, with what it means."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class BucketRow:
    size: str
    samples: int
    share: str
    bar: Markup


@dataclass(frozen=True)
class Crop:
    picture: Thumbnail
    key: str
    bucket: str
    caption: str | None


@dataclass(frozen=True)
class RefusedGroup:
    """Refusals for the same reason; `names` is capped, `more` counts the rest."""

    stage: str
    reason: str
    count: int
    names: list[str]
    more: int


@dataclass(frozen=True)
class Captions:
    """Captions by sample key, as far as they were read; `complete` says whether that is all of them."""

    by_key: Mapping[str, str]
    distinct: int
    complete: bool


@dataclass(frozen=True)
class DatasetView:
    """One data set on the page. None where a part could not be made; `not_made` names stages without a result."""

    id: str
    source: str
    geometry: str
    numbers: list[Number]
    counts: list[tuple[str, list[tuple[str, str]]]]
    buckets: list[BucketRow] | None
    buckets_more: int
    crops: list[Crop] | None
    crops_total: int
    refused: list[RefusedGroup] = field(default_factory=list)
    refused_total: int = 0
    refused_groups_more: int = 0
    not_made: list[str] = field(default_factory=list)


def view_dataset(
    dataset: DatasetSection,
    geometry: str,
    found: Mapping[str, Manifest],
    store: Store,
    album: Album,
    gaps: Gaps,
    crops: int = CROPS,
) -> DatasetView:
    """Puts a data set's part of the page together.

    Args:
        dataset: its section of the configuration.
        geometry: how it is cropped, in words.
        found: the manifests that there are, by stage: 'download', 'bucket', 'latents'.
        store: where the crops and captions are.
        album: makes the thumbnails.
        gaps: hears what could not be made.
        crops: pictures on the contact sheet.
    """
    name = f"data set {dataset.id}"
    download, bucket, latents = found.get("download"), found.get("bucket"), found.get("latents")
    chosen = choose_crops(bucket.shards, crops) if bucket else []
    names = [shard.name for shard, _ in chosen]
    captions = None
    if download:
        captions = gaps.attempt(f"{name}: captions", read_captions, store, download.shards, names)
    rows, more = bucket_rows(bucket.shards if bucket else [])
    groups = group_refusals(manifest for manifest in (download, bucket, latents) if manifest is not None)
    return DatasetView(
        id=dataset.id,
        source=describe_source(dataset),
        geometry=geometry,
        numbers=_numbers(download, bucket, latents, captions),
        counts=[
            (stage, [(wording.heading(key), wording.count(value)) for key, value in manifest.counts.items()])
            for stage, manifest in found.items()
            if manifest.counts
        ],
        buckets=rows if bucket else None,
        buckets_more=more,
        crops=contact_sheet(store, chosen, captions, album, gaps, name) if bucket else None,
        crops_total=_samples(bucket),
        refused=groups[:REASONS],
        refused_total=sum(group.count for group in groups),
        refused_groups_more=max(0, len(groups) - REASONS),
        not_made=[stage for stage in ("download", "bucket", "latents") if stage not in found],
    )


def describe_source(dataset: DatasetSection) -> str:
    """Where a data set comes from: 'local · path photos'."""
    source = dataset.source.model_dump(exclude={"type"}, exclude_defaults=True)
    details = ", ".join(f"{key} {value}" for key, value in source.items())
    return f"{dataset.source.type} · {details} · captions from {dataset.caption_strategy}"


def _samples(manifest: Manifest | None) -> int:
    return sum(shard.samples for shard in manifest.shards) if manifest else 0


def _numbers(
    download: Manifest | None, bucket: Manifest | None, latents: Manifest | None, captions: Captions | None
) -> list[Number]:
    numbers = []
    if download:
        read = _samples(download)
        weight = wording.size(sum(shard.bytes for shard in download.shards))
        numbers.append(Number("images", wording.count(read), f"{weight} raw"))
        refused = len(download.refused) + (len(bucket.refused) if bucket else 0)
        share = f"{100 * refused / (read + len(download.refused)):.1f} % of the source" if refused else "none"
        numbers.append(Number("refused", wording.count(refused), share))
    distinct = download.counts.get("distinct_captions") if download else None
    if captions and captions.complete:
        again = len(captions.by_key) - captions.distinct
        note = f"of {wording.plural(len(captions.by_key), 'caption')}" if again else "no duplicates"
        numbers.append(Number("distinct captions", wording.count(captions.distinct), note))
    elif distinct is not None:
        numbers.append(Number("distinct captions", wording.count(distinct)))
    if bucket:
        sizes = len({shard.bucket for shard in bucket.shards})
        numbers.append(Number("crops", wording.count(_samples(bucket)), f"in {wording.plural(sizes, 'size')}"))
    if latents:
        weight = wording.size(sum(shard.bytes for shard in latents.shards))
        numbers.append(Number("latents", wording.count(_samples(latents)), weight))
    return numbers


# -- captions ---------------------------------------------------------------------------------------------------------


def read_captions(store: Store, shards: Sequence[Shard], wanted: Sequence[str]) -> Captions:
    """Reads lists of captions, first those of the raw shards that the wanted crops' shard names begin with.

    Raises:
        StoreError: a list is gone or damaged.
    """
    lists = [shard for shard in shards if "captions" in shard.sidecars]
    near = [shard for shard in lists if any(name.startswith(shard.name.removesuffix(".tar")) for name in wanted)]
    ordered = list({shard.name: shard for shard in [*near, *lists]}.values())[:SIDECARS_READ]
    by_key: dict[str, str] = {}
    for shard in ordered:
        for line in store.read_blob(shard.sidecars["captions"]).splitlines():
            record = json.loads(line)
            by_key[record["key"]] = record["caption"]
    return Captions(by_key, len(set(by_key.values())), len(ordered) == len(shards))


# -- crops ------------------------------------------------------------------------------------------------------------


def choose_crops(shards: Sequence[Shard], wanted: int) -> list[tuple[Shard, int]]:
    """Shards to look into and how many crops to take of each: the commonest sizes first, and of each size a shard
    that is big enough but no bigger than it need be. The same for the same artifact."""
    buckets: dict[tuple[int, int] | None, list[Shard]] = {}
    for shard in shards:
        if shard.samples:
            buckets.setdefault(shard.bucket, []).append(shard)
    common = sorted(buckets.items(), key=lambda item: (-sum(shard.samples for shard in item[1]), str(item[0])))
    chosen: list[Shard] = []
    for _, members in common[:SHARDS_FETCHED]:
        enough = [shard for shard in members if shard.samples >= wanted]
        chosen.append(
            min(enough, key=lambda shard: (shard.bytes, shard.name))
            if enough
            else max(members, key=lambda shard: (shard.samples, shard.name))
        )
    shares = [0] * len(chosen)
    while sum(shares) < wanted:
        open_ones = [index for index, shard in enumerate(chosen) if shares[index] < shard.samples]
        if not open_ones:
            break
        for index in open_ones[: wanted - sum(shares)]:
            shares[index] += 1
    return [(shard, share) for shard, share in zip(chosen, shares, strict=True) if share]


def contact_sheet(
    store: Store, chosen: Sequence[tuple[Shard, int]], captions: Captions | None, album: Album, gaps: Gaps, name: str
) -> list[Crop]:
    """Evenly spaced crops out of the chosen shards."""
    sheet: list[Crop] = []
    for shard, share in chosen:
        pictures = gaps.attempt(f"{name}: crops of {shard.name}", _pictures, store, shard, share, album)
        for key, picture in pictures or []:
            caption = captions.by_key.get(key) if captions else None
            size = f"{shard.bucket[0]} × {shard.bucket[1]}" if shard.bucket else "any size"
            sheet.append(Crop(picture, key, size, caption))
    return sheet


def _pictures(store: Store, shard: Shard, share: int, album: Album) -> list[tuple[str, Thumbnail]]:
    mapped = MappedShard(store.fetch(shard))
    keys = [mapped.keys[int((index + 0.5) * len(mapped) / share)] for index in range(share)]
    found = []
    for key in keys:
        extension = next(name for name in mapped.extensions(key) if name in ("png", "webp", "jpg"))
        picture = album.add(mapped.read(key, extension), CROP_EDGE)
        if picture is not None:
            found.append((key, picture))
    return found


# -- buckets and refusals ---------------------------------------------------------------------------------------------


def bucket_rows(shards: Sequence[Shard]) -> tuple[list[BucketRow], int]:
    """The histogram of crop sizes, commonest first, and how many sizes were left out of it."""
    sizes: dict[tuple[int, int], int] = {}
    for shard in shards:
        if shard.bucket:
            sizes[shard.bucket] = sizes.get(shard.bucket, 0) + shard.samples
    ordered = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    total, most = sum(sizes.values()), max(sizes.values(), default=1)
    rows = [
        BucketRow(
            f"{size[0]} × {size[1]}", samples, f"{100 * samples / max(total, 1):.0f} %", bar(0, samples / most, "main")
        )
        for size, samples in ordered[:BUCKETS]
    ]
    return rows, max(0, len(ordered) - BUCKETS)


def group_refusals(manifests: Iterable[Manifest]) -> list[RefusedGroup]:
    """Refusals by reason, the commonest first. Reasons that differ only in their numbers ('12 px', '9 px') are one."""
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for manifest in manifests:
        for refusal in manifest.refused:
            pattern = re.sub(r"\d+(?:[.,]\d+)*", "…", refusal.reason.replace(refusal.name, "…"))
            groups.setdefault((manifest.stage, pattern), []).append((refusal.name, refusal.reason))
    made = []
    for (stage, pattern), members in groups.items():
        alike = len({reason for _, reason in members}) == 1
        names = [name if alike else f"{name} ({reason})" for name, reason in members[:NAMES]]
        reason = members[0][1] if alike else pattern
        shown = [wording.shortened(text, 200) for text in names]
        made.append(RefusedGroup(stage, wording.shortened(reason, 300), len(members), shown, len(members) - len(shown)))
    return sorted(made, key=lambda group: (-group.count, group.reason))
