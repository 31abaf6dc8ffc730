"""What is published: the files of a Hub model repository, put together locally, whatever the target is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stages.core.artifact import Manifest
from stages.core.errors import InputError
from stages.core.fingerprint import digest_file
from stages.core.stage import Context, Inputs
from stages.publish.card import CardFacts, Pair, render_card
from stages.publish.gate import read_losses

ADAPTER = "pytorch_lora_weights.safetensors"
RECORD = "loraline.json"
CARD = "README.md"
EXTRA_FILES = ("evaluation.json", "train.jsonl")
PICTURES = "images"
RECORD_SCHEMA = 1
_PICTURE = re.compile(r"validation/(\d+)-(\d+)\.png")
# What a record may claim as its own and have deleted when it is replaced; anything else in a target is foreign.
_OURS = re.compile(
    rf"{re.escape(PICTURES)}/(before|after)-\d+\.png|" + "|".join(map(re.escape, (ADAPTER, CARD, *EXTRA_FILES)))
)


@dataclass(frozen=True)
class Item:
    """A file of the package: its path in the target, and where its bytes lie here."""

    path: str
    local: Path
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Package:
    """All files to publish; the record, which lists the others, is last."""

    items: list[Item]

    def digests(self) -> dict[str, dict[str, Any]]:
        return {item.path: {"sha256": item.sha256, "bytes": item.bytes} for item in self.items}

    def item(self, path: str) -> Item:
        return next(item for item in self.items if item.path == path)


def build_package(context: Context, inputs: Inputs, base_on_hub: bool) -> Package:
    """Fetches what training made, and writes the card and the record.

    Raises:
        InputError: training left no adapter.
        CorruptBlobError, StoreError: its files cannot be read.
    """
    manifests = dict(_labelled(inputs))
    train = inputs.one("train")
    names = {file.name for file in train.files}
    if ADAPTER not in names:
        raise InputError(f"{context.label}: the train artifact {train.fingerprint[:12]} holds no {ADAPTER}")
    store = context.store
    items = [_item(ADAPTER, store.fetch(train.file(ADAPTER)))]
    for name in EXTRA_FILES:
        if name in names:
            items.append(_item(name, store.fetch(train.file(name))))
        else:
            context.log(f"the train artifact holds no {name}; it is published without", "warning")
    pairs = []
    for index, (before, after) in sorted(_before_after(names).items()):
        sides = {}
        for side, source in (("before", before), ("after", after)):
            if source is not None:
                sides[side] = f"{PICTURES}/{side}-{index}.png"
                items.append(_item(sides[side], store.fetch(train.file(source))))
        prompts = context.config.validation.prompts
        prompt = prompts[index] if index < len(prompts) else ""
        pairs.append(Pair(prompt, sides.get("before"), sides.get("after")))
    if context.config.validation.prompts and not pairs:
        context.log("the train artifact holds no validation pictures; the card has no gallery", "warning")
    facts = CardFacts(
        config=context.config,
        base_on_hub=base_on_hub,
        adapter_name=ADAPTER,
        pairs=pairs,
        rounds=_rounds(context, train),
        losses=read_losses(context.store, train),
        downloads={str(dataset): manifest for dataset, manifest in inputs.all("download").items()},
        train=train,
        record_name=RECORD,
    )
    items.append(_written(context.scratch / "card.md", CARD, render_card(facts).encode()))
    items.sort(key=lambda item: item.path)
    record = {
        "schema": RECORD_SCHEMA,
        "name": context.config.name,
        "adapter": ADAPTER,
        "files": Package(items).digests(),
        "artifacts": {label: _provenance(manifest) for label, manifest in sorted(manifests.items())},
    }
    text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    return Package([*items, _written(context.scratch / "record.json", RECORD, text.encode())])


def left_over(record: Any, package: Package) -> list[str]:
    """Paths that an earlier record calls its own and that this package does not have: to be deleted with it.

    A record comes from the target, where anybody may have written it: only paths of the package's own layout count.
    """
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict):
        return []
    current = {item.path for item in package.items}
    return sorted(path for path in files if isinstance(path, str) and path not in current and _OURS.fullmatch(path))


def without_local_paths(value: Any) -> Any:
    """The same JSON with absolute paths cut down to their last part: a published file says nothing of this machine."""
    if isinstance(value, dict):
        return {key: without_local_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_local_paths(item) for item in value]
    if isinstance(value, str) and re.match(r"[/~]|file:|[A-Za-z]:[\\/]", value):
        return f".../{PurePosixPath(value.replace(chr(92), '/')).name}"
    return value


def _labelled(inputs: Inputs) -> Iterable[tuple[str, Manifest]]:
    # The data set is the one that the artifact is read for: data sets of the same source and settings share one.
    for stage in ("download", "bucket", "latents", "embeds", "train"):
        for dataset, manifest in inputs.all(stage).items():
            yield f"{stage}[{dataset}]" if dataset else stage, manifest


def _provenance(manifest: Manifest) -> dict[str, Any]:
    """What made an artifact. No times: the same adapter published again is the same record."""
    return {
        "fingerprint": manifest.fingerprint,
        "digest": manifest.digest(),
        "inputs": manifest.inputs,
        "settings": without_local_paths(manifest.spec),
        "counts": manifest.counts,
        "stage_version": manifest.stage_version,
        "versions": manifest.versions,
        "code_revision": manifest.code_revision,
    }


def _before_after(names: Iterable[str]) -> dict[int, tuple[str | None, str | None]]:
    """For each prompt's index, the picture of step 0 and the one of the last step."""
    steps: dict[int, dict[int, str]] = {}
    for name in names:
        found = _PICTURE.fullmatch(name)
        if found:
            steps.setdefault(int(found.group(2)), {})[int(found.group(1))] = name
    pairs: dict[int, tuple[str | None, str | None]] = {}
    for index, by_step in steps.items():
        last = max(by_step)
        pairs[index] = (by_step.get(0), by_step[last] if last > 0 else None)
    return pairs


def _rounds(context: Context, train: Manifest) -> list[tuple[int, float]]:
    """(step, held-out loss) in order; evaluation.json is a list of rounds, or holds one under a name."""
    if not any(file.name == "evaluation.json" for file in train.files):
        return []
    record = json.loads(context.store.read_blob(train.file("evaluation.json")))
    candidates = list(record.values()) if isinstance(record, Mapping) else [record]
    for value in candidates:
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            found = [(int(entry["step"]), float(entry["loss"])) for entry in value if {"step", "loss"} <= entry.keys()]
            if found:
                return sorted(found)
    if any(candidates):
        context.log("evaluation.json holds no rounds with 'step' and 'loss'; the card has no held-out loss", "warning")
    return []


def _item(path: str, local: Path) -> Item:
    return Item(path, local, digest_file(local), local.stat().st_size)


def _written(local: Path, path: str, data: bytes) -> Item:
    local.write_bytes(data)
    return _item(path, local)
