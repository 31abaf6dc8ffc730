"""The one face of every stage, and what a stage is given when it runs.

A stage is a small object: its name, its version (raised by hand when its output for the same input changes), what it
needs, the hardware it wants, the slice of the configuration that decides its output (`spec`), and the work itself.
A `MapStage` works through units (shards, mostly) that are independent of each other: each finished unit is remembered
in the store, so a killed run goes on where it was, and several machines can share one stage.
"""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from stages.core.artifact import CONTENT, KEYS, Blob, Manifest, NamedFile, Output, Shard
from stages.core.errors import PreemptedError
from stages.core.events import Level, Message, Metric, Picture, ProgressTask, Reporter, progress
from stages.core.preemption import StopFlag
from stages.core.store import Store

if TYPE_CHECKING:  # the tree is put together above the rooms; the ground floor only names its type
    from stages.config import Config, DatasetSection


class Need(NamedTuple):
    """An input: another stage's artifact, and the side of it that matters here."""

    stage: str
    facet: str = CONTENT


@dataclass(frozen=True)
class Setting:
    """What is known before a stage runs."""

    config: Config
    store: Store
    dataset: DatasetSection | None = None

    @property
    def the_dataset(self) -> DatasetSection:
        """The data set of a stage that runs once per data set."""
        if self.dataset is None:
            raise TypeError("this stage runs once for all data sets")
        return self.dataset


class Inputs:
    """The manifests that a stage reads, by stage and data set id (None for a stage that runs once for all)."""

    def __init__(self, manifests: Mapping[tuple[str, str | None], Manifest]) -> None:
        self._manifests = dict(manifests)

    def one(self, stage: str) -> Manifest:
        """The only artifact of that stage.

        Raises:
            KeyError: there is none, or more than one.
        """
        found = self.all(stage)
        if len(found) != 1:
            raise KeyError(f"{len(found)} artifacts of {stage}")
        return next(iter(found.values()))

    def all(self, stage: str) -> dict[str | None, Manifest]:
        """The artifacts of that stage by data set id, in the configuration's order."""
        return {dataset: manifest for (name, dataset), manifest in self._manifests.items() if name == stage}

    def __contains__(self, stage: str) -> bool:
        return any(name == stage for name, _ in self._manifests)


@dataclass
class Context:
    """What a stage is given to work with."""

    setting: Setting
    label: str
    spec: dict[str, Any]
    fingerprint: str
    reporter: Reporter
    scratch: Path
    """An empty local folder, deleted afterwards."""
    stop: StopFlag = field(default_factory=StopFlag)
    force: bool = False
    """Make everything again: what an earlier run left half done is not to be gone on from."""

    @property
    def config(self) -> Config:
        return self.setting.config

    @property
    def dataset(self) -> DatasetSection:
        return self.setting.the_dataset

    @property
    def store(self) -> Store:
        return self.setting.store

    def progress(self, task: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[ProgressTask]:
        """`with context.progress('crops', 200, 'image') as bar: bar.advance()`."""
        return progress(self.reporter, self.label, task, total, unit, done)

    def log(self, text: str, level: Level = "info") -> None:
        self.reporter.emit(Message(self.label, level, text))

    def metric(self, step: int, values: dict[str, float]) -> None:
        self.reporter.emit(Metric(self.label, step, values))

    def picture(self, name: str, path: Path, caption: str) -> None:
        self.reporter.emit(Picture(self.label, name, str(path), caption))

    def save_shard(
        self,
        path: Path,
        name: str,
        samples: int,
        bucket: tuple[int, int] | None = None,
        facets: dict[str, str] | None = None,
        sidecars: dict[str, Blob] | None = None,
        keys: Sequence[str] | None = None,
    ) -> Shard:
        """Uploads a finished local tar, deletes it, and names it.

        Args:
            keys: the samples' keys in order, for a sidecar that tells them without the shard (see `Store.keys`).
        """
        beside = dict(sidecars or {})
        if keys is not None:
            beside[KEYS] = self.store.put_bytes("".join(f"{key}\n" for key in keys).encode(), ".txt")
        blob = self.store.put_file(path, ".tar")
        path.unlink()
        return Shard(
            **blob.model_dump(), name=name, samples=samples, bucket=bucket, facets=facets or {}, sidecars=beside
        )

    def save_file(self, name: str, data: bytes | Path) -> NamedFile:
        """Uploads one file of the artifact; its suffix is that of the name."""
        suffix = Path(name).suffix
        blob = self.store.put_file(data, suffix) if isinstance(data, Path) else self.store.put_bytes(data, suffix)
        return NamedFile(**blob.model_dump(), name=name)

    def check_stop(self) -> None:
        """Leaves if the process was asked to; called between units of work, when everything finished is saved.

        Raises:
            PreemptedError: SIGTERM or SIGINT came in.
        """
        if self.stop.requested:
            raise PreemptedError(
                f"{self.label}: asked to stop ({self.stop.reason}); finished work is saved, run again to go on"
            )


class Stage(ABC):
    """The face of a stage."""

    name: str
    version: int
    hardware: Literal["cpu", "gpu"] = "cpu"
    per_dataset: bool = False
    needs: tuple[Need, ...] = ()
    summary: str = ""
    """One line for help texts and docs."""

    @abstractmethod
    def settings(self, setting: Setting) -> dict[str, Any]:
        """The slice of the configuration that decides the output, as plain JSON: known without looking anywhere."""

    def surroundings(self, setting: Setting) -> dict[str, Any]:
        """What else decides the output and has to be looked up: a source's state, a model's identity. Never anything
        that changes with the machine. Keys differ from those of `settings`.

        Raises:
            ConfigError, InputError, TransientError: it cannot be looked up (no such folder, no such repository).
        """
        return {}

    def spec(self, setting: Setting) -> dict[str, Any]:
        """Settings and surroundings: what goes into the fingerprint, beside the inputs' digests."""
        return {**self.settings(setting), **self.surroundings(setting)}

    def foretell(self, spec: dict[str, Any]) -> dict[str, str]:
        """Facet digests that the artifact will have, where its spec tells them already. Lets `plan` look further."""
        return {}

    def check(self, setting: Setting) -> None:
        """Finds wrong settings before anything runs: paths, permissions, tokens. Cheap.

        Raises:
            ConfigError, InputError, StoreError
        """
        return

    def foresee(self, setting: Setting, done: Inputs) -> None:
        """Judges what earlier stages made, as soon as they made it: too few images for a batch is an error before
        any GPU starts. `done` holds every finished stage upstream, near or far.

        Raises:
            InputError
        """
        return

    def explain(self, old: Any, new: Any) -> list[str]:
        """What changed between two specs, in words, one short text for each change."""
        return explain_changes(old, new)

    def still_there(self, setting: Setting, manifest: Manifest) -> str | None:
        """Why a finished artifact must be made again although its manifest exists, or None. For stages whose result
        lies outside the store."""
        return None

    @abstractmethod
    def run(self, context: Context, inputs: Inputs) -> Output:
        """Does the work."""


@dataclass(frozen=True)
class Unit:
    """A piece of a map stage's work. `identity` is all that decides its output, beside the stage and its spec."""

    index: int
    name: str
    identity: Any
    samples: int = 0
    payload: Any = None


class MapStage(Stage):
    """A stage of independent units, each remembered in the store when it is finished."""

    def memo_spec(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The part of the spec that decides a unit's output; the whole by default."""
        return spec

    @abstractmethod
    def units(self, context: Context, inputs: Inputs) -> list[Unit]:
        """All units of the stage, in the order of the manifest; the same list on every machine."""

    @abstractmethod
    def process(self, context: Context, inputs: Inputs, units: Sequence[Unit]) -> Iterator[tuple[Unit, Output]]:
        """Works through some units and yields each when it is finished (everything that it names is uploaded)."""

    def finish(self, context: Context, inputs: Inputs, outputs: list[Output]) -> Output:
        """Puts the outputs of all units together. Reads memos and sidecars only, never shards.

        Raises:
            InputError: what came out is not usable (everything refused).
        """
        return Output.joined(outputs)

    def run(self, context: Context, inputs: Inputs) -> Output:
        raise TypeError(f"{self.name} is a map stage: the runner works through its units")


@contextmanager
def scratch_folder(label: str) -> Iterator[Path]:
    """A temporary folder, deleted on the way out."""
    path = Path(tempfile.mkdtemp(prefix=f"loraline-{label.replace('[', '-').rstrip(']')}-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def explain_changes(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Differences between two JSON values as 'path old -> new'; digests are only said to differ."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            text
            for key in sorted({*old, *new})
            for text in explain_changes(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        ]
    if _is_digest(old) or _is_digest(new):
        return [f"{prefix} changed"]
    return [f"{prefix} {_short(old)} -> {_short(new)}"]


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and all(letter in "0123456789abcdef" for letter in value)


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
