"""Running one stage: its fingerprint, its memos, its manifest. What is done is never done again."""

from __future__ import annotations

import platform
import subprocess
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from os import environ
from pathlib import Path
from typing import Any

from stages.core.artifact import Manifest, Output
from stages.core.errors import ConfigError, MissingInputError
from stages.core.events import Reporter, StageFinished, StageReused, StageStarted
from stages.core.fingerprint import digest_of, fingerprint
from stages.core.preemption import StopFlag
from stages.core.stage import Context, Inputs, MapStage, Setting, Stage, Unit, scratch_folder
from stages.core.store import Store

LIBRARIES = (
    "loraline",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "optimum-quanto",
    "accelerate",
    "webdataset",
    "pillow",
    "huggingface-hub",
)


@dataclass(frozen=True)
class Slice:
    """Every `count`-th unit of a map stage, from `index` on: the share of one of several machines."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"slice {self.index}/{self.count}: the first number is 0 to {self.count - 1}")

    @classmethod
    def parse(cls, text: str) -> Slice:
        """'0/4' as a slice.

        Raises:
            ConfigError: it is no slice.
        """
        index, _, count = text.partition("/")
        try:
            return cls(int(index), int(count))
        except ValueError as error:
            raise ConfigError(f"slice {text}: write it as I/N, such as 0/4 ({error})") from None

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class Job:
    """A stage with its inputs resolved: ready to be looked up or run."""

    stage: Stage
    setting: Setting
    label: str
    spec: dict[str, Any]
    inputs: Inputs
    digests: dict[str, str]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.stage.name, self.stage.version, self.spec, self.digests)

    def lookup(self) -> Manifest | None:
        """The artifact, where it exists already and its result is still where it should be."""
        manifest = self.setting.store.manifest(self.stage.name, self.fingerprint)
        if manifest is not None and self.stage.still_there(self.setting, manifest) is None:
            return manifest
        return None


def execute(
    job: Job,
    reporter: Reporter,
    reason: str = "not in the store yet",
    slice_: Slice | None = None,
    merge_only: bool = False,
    force: bool = False,
    stop: StopFlag | None = None,
) -> Manifest | None:
    """Runs a stage unless its artifact exists, and commits its manifest.

    Args:
        job: what to run.
        reporter: who is told.
        reason: why it runs, for people.
        slice_: for a map stage, only this share of the units; no manifest is written.
        merge_only: for a map stage, only put the units' memos together and write the manifest.
        force: make everything again, whatever the store says: damaged blobs are repaired, and what comes out stands
            in place of what stood there. With `merge_only`, only the manifest is made again.
        stop: looked at between units of work.

    Returns:
        The manifest; None after a slice.
    Raises:
        MissingInputError: `merge_only`, and some units are not done yet.
    """
    found = None if force else job.lookup()
    if found is not None:
        reporter.emit(StageReused(job.label, describe(found), found.fingerprint))
        return found
    store = job.setting.store
    warning = store.probe()
    started = time.monotonic()
    reporter.emit(StageStarted(job.label, reason))
    with scratch_folder(job.label) as scratch, store.repairing() if force else nullcontext():
        context = Context(
            job.setting, job.label, job.spec, job.fingerprint, reporter, scratch, stop if stop else StopFlag(), force
        )
        if warning:
            context.log(warning, "warning")
        if isinstance(job.stage, MapStage):
            outputs = _run_units(job, job.stage, context, slice_, merge_only, force)
            if slice_ is not None:
                seconds = time.monotonic() - started
                reporter.emit(StageFinished(job.label, seconds, f"slice {slice_}: {len(outputs)} units"))
                return None
            output = job.stage.finish(context, job.inputs, outputs)
        else:
            output = job.stage.run(context, job.inputs)
    manifest = store.commit(_manifest(job, output, time.monotonic() - started), replace=force)
    seconds = time.monotonic() - started
    reporter.emit(StageFinished(job.label, seconds, describe(manifest), manifest.counts, manifest.fingerprint))
    return manifest


def memo_path(stage: MapStage, spec: dict[str, Any], unit: Unit) -> str:
    """Where what was made of a unit is remembered."""
    key = digest_of(
        {"stage": stage.name, "version": stage.version, "spec": stage.memo_spec(spec), "unit": unit.identity}
    )
    return f"memo/{stage.name}/{key}.json"


def _run_units(
    job: Job, stage: MapStage, context: Context, slice_: Slice | None, merge_only: bool, force: bool
) -> list[Output]:
    store = job.setting.store
    units = stage.units(context, job.inputs)
    mine = [unit for unit in units if slice_ is None or unit.index % slice_.count == slice_.index]
    paths = {unit.index: memo_path(stage, job.spec, unit) for unit in mine}
    done: dict[int, Output] = {}
    if merge_only or not force:
        for unit in mine:
            memo = store.get_record(paths[unit.index], Output)
            if memo is not None:
                done[unit.index] = memo
    pending = [unit for unit in mine if unit.index not in done]
    if merge_only and pending:
        names = ", ".join(unit.name for unit in pending[:5]) + (", ..." if len(pending) > 5 else "")
        raise MissingInputError(
            f"{job.label}: {len(pending)} of {len(mine)} units are not done yet ({names}): run their slices first"
        )
    if done and pending:
        context.log(f"{len(done)} of {len(mine)} shards were finished before and are kept")
    if pending:
        context.check_stop()
        for unit, output in stage.process(context, job.inputs, pending):
            done[unit.index] = _note(store, paths[unit.index], output, force)
            context.check_stop()
    return [done[unit.index] for unit in mine]


def _note(store: Store, path: str, output: Output, force: bool) -> Output:
    """Writes down what was made of a unit. Where another machine finished it first, what that one wrote counts."""
    record = output.model_dump(mode="json")
    if not force:
        if store.create_json(path, record):
            return output
        first = store.get_record(path, Output)
        if first is not None:
            return first
    store.put_json(path, record)
    return output


def _manifest(job: Job, output: Output, seconds: float) -> Manifest:
    return Manifest(
        stage=job.stage.name,
        dataset=job.setting.dataset.id if job.setting.dataset else None,
        fingerprint=job.fingerprint,
        stage_version=job.stage.version,
        spec=job.spec,
        inputs=job.digests,
        shards=output.shards,
        files=output.files,
        counts=output.counts,
        refused=output.refused,
        facets=output.facets,
        info=output.info,
        versions=library_versions(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        duration_s=round(seconds, 3),
        code_revision=code_revision(),
    )


def describe(manifest: Manifest) -> str:
    """An artifact in a few words: '200 images in 3 shards (4.2 MB)'."""
    parts = [f"{count:,} {name.replace('_', ' ')}" for name, count in manifest.counts.items() if count]
    size = sum(blob.bytes for blob in [*manifest.shards, *manifest.files])
    where = f"{len(manifest.shards)} shards" if manifest.shards else f"{len(manifest.files)} files"
    return f"{', '.join(parts) or 'done'} · {where}, {size / 1e6:.1f} MB · {manifest.fingerprint[:12]}"


@cache
def library_versions() -> dict[str, str]:
    """Versions of what can change the numbers."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@cache
def code_revision() -> str | None:
    """The revision of loraline's own code: LORALINE_REVISION (set in images), else the git commit it runs from."""
    if environ.get("LORALINE_REVISION"):
        return environ["LORALINE_REVISION"]
    folder = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--", "."],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed else commit
