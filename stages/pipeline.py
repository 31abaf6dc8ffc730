"""The pipeline of a configuration: its nodes, what each will do and why, and how a node finds its inputs.

Pure scheduling of nothing: who runs the nodes (the command line, a flow) calls `Pipeline.run_node` in `order`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from stages.config import Config
from stages.core.artifact import CONTENT, Manifest
from stages.core.errors import ConfigError, MissingInputError
from stages.core.events import Reporter
from stages.core.fingerprint import fingerprint
from stages.core.preemption import StopFlag
from stages.core.runner import Job, Slice, describe, execute
from stages.core.stage import Inputs, MapStage, Setting, Stage, explain_changes
from stages.core.store import Store
from stages.registry import STAGES


@dataclass(frozen=True)
class Node:
    """A stage, for one data set or for all."""

    stage: str
    dataset: str | None = None

    @property
    def label(self) -> str:
        return f"{self.stage}[{self.dataset}]" if self.dataset else self.stage

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True)
class Step:
    """What the plan says of a node. `fingerprint` is None while it depends on what an earlier node will make."""

    node: Node
    action: Literal["reuse", "run"]
    reasons: list[str]
    fingerprint: str | None


class Last(BaseModel):
    """What was made (or found) last at a node under a configuration's name."""

    fingerprint: str
    version: int
    spec: dict[str, Any]
    inputs: dict[str, str]


class Published(BaseModel):
    """Which adapter was published last under a configuration's name: fingerprints of two artifacts."""

    publish: str
    train: str


@dataclass
class Pipeline:
    """A configuration's stages over a store.

    Args:
        config: the run.
        store: opened from `config.store` where not given.
        stages: the registry's, where a test does not bring its own.
    """

    config: Config
    store: Store
    stages: Sequence[Stage] = STAGES
    _surroundings: dict[Node, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, config: Config) -> Pipeline:
        return cls(config, Store(config.store))

    # -- the graph ----------------------------------------------------------------------------------------------------

    @property
    def order(self) -> list[Node]:
        """All nodes, each after the nodes that it reads from."""
        return [node for stage in self.stages for node in self.nodes_of(stage.name)]

    def nodes_of(self, stage_name: str) -> list[Node]:
        if self.stage(stage_name).per_dataset:
            return [Node(stage_name, dataset.id) for dataset in self.config.datasets]
        return [Node(stage_name)]

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def node(self, label: str) -> Node:
        """The node of that label.

        Raises:
            ConfigError: this configuration has none.
        """
        for node in self.order:
            if node.label == label:
                return node
        raise ConfigError(f"{label}: no such stage; there are {', '.join(node.label for node in self.order)}")

    def setting(self, node: Node) -> Setting:
        return Setting(self.config, self.store, self.config.dataset(node.dataset) if node.dataset else None)

    def workers(self, node: Node) -> int:
        """How many machines share a map stage: its section's `workers`; 1 for every other stage."""
        section = getattr(self.config, node.stage, None)
        return int(getattr(section, "workers", 1)) if isinstance(self.stage(node.stage), MapStage) else 1

    def upstream(self, node: Node) -> list[Node]:
        """The nodes that a node reads from, in the order of its needs."""
        return list(dict.fromkeys(source for source, _ in self._edges(node)))

    def _edges(self, node: Node) -> list[tuple[Node, str]]:
        edges = []
        for need in self.stage(node.stage).needs:
            for source in self.nodes_of(need.stage):
                if node.dataset is None or source.dataset in (None, node.dataset):
                    edges.append((source, need.facet))
        return edges

    def ancestors(self, node: Node) -> list[Node]:
        """Every node that this one depends on, near or far."""
        reached: set[Node] = set()
        for other in reversed(self.order):
            if other == node or other in reached:
                reached.update(self.upstream(other))
        return [other for other in self.order if other in reached]

    def nearest(self, node: Node) -> list[Node]:
        """The nodes upstream that are not upstream of one another as well: all others are reached through these."""
        sources = self.ancestors(node)
        farther = {far for source in sources for far in self.ancestors(source)}
        return [source for source in sources if source not in farther]

    def downstream(self, node: Node) -> list[Node]:
        """Every node that depends on this one, near or far."""
        reached = {node}
        for other in self.order:
            if reached.intersection(self.upstream(other)):
                reached.add(other)
        return [other for other in self.order if other in reached and other != node]

    # -- before a run -------------------------------------------------------------------------------------------------

    def check(self, nodes: Sequence[Node] | None = None) -> None:
        """Finds what is wrong with the settings of some nodes (all, by default) before anything heavy starts.

        Raises:
            LoralineError: the first thing that is wrong.
        """
        self.store.probe()
        for node in nodes if nodes is not None else self.order:
            self.stage(node.stage).check(self.setting(node))

    def spec(self, node: Node) -> dict[str, Any]:
        """Settings and surroundings of a node; what had to be looked up is looked up once."""
        stage, setting = self.stage(node.stage), self.setting(node)
        if node not in self._surroundings:
            self._surroundings[node] = stage.surroundings(setting)
        return {**stage.settings(setting), **self._surroundings[node]}

    def job(self, node: Node, manifests: Mapping[Node, Manifest]) -> Job:
        """A node with its inputs resolved; `manifests` holds at least those of its upstream."""
        digests = {f"{source.label}.{facet}": manifests[source].digest(facet) for source, facet in self._edges(node)}
        inputs = Inputs({(source.stage, source.dataset): manifests[source] for source in self.upstream(node)})
        return Job(self.stage(node.stage), self.setting(node), node.label, self.spec(node), inputs, digests)

    def plan(self) -> list[Step]:
        """What a run would do, node by node, and why. Reads sources and the store; changes nothing."""
        steps: list[Step] = []
        facets: dict[Node, dict[str, str]] = {}  # what is known of each node's output
        for node in self.order:
            stage, spec = self.stage(node.stage), self.spec(node)
            edges = self._edges(node)
            unknown = [source for source, facet in edges if facet not in facets[source]]
            if unknown:
                names = ", ".join(dict.fromkeys(source.label for source in unknown))
                reasons = [*self._changes(node, spec, None), f"{names} will be made anew"]
                steps.append(Step(node, "run", reasons, None))
                facets[node] = stage.foretell(spec)
                continue
            digests = {f"{source.label}.{facet}": facets[source][facet] for source, facet in edges}
            name = fingerprint(stage.name, stage.version, spec, digests)
            manifest = self.store.manifest(stage.name, name)
            gone = stage.still_there(self.setting(node), manifest) if manifest is not None else None
            if manifest is not None and gone is None:
                steps.append(Step(node, "reuse", [f"unchanged: {describe(manifest)}"], name))
                facets[node] = {CONTENT: manifest.digest(), **manifest.facets}
                continue
            reasons = [gone] if gone else self._changes(node, spec, digests) or ["was not finished"]
            steps.append(Step(node, "run", reasons, name))
            facets[node] = stage.foretell(spec)
        return steps

    def changes(self, node: Node, job: Job) -> list[str]:
        """Why a node is not in the store: what is different from the last time, in words."""
        manifest = self.store.manifest(node.stage, job.fingerprint)
        gone = job.stage.still_there(job.setting, manifest) if manifest is not None else None
        if gone is not None:
            return [gone]
        return self._changes(node, job.spec, job.digests)

    def _changes(self, node: Node, spec: dict[str, Any], digests: dict[str, str] | None) -> list[str]:
        """What is different from the last time that this node was done under this configuration's name."""
        stage = self.stage(node.stage)
        last = self.store.get_record(self._last_path(node), Last)
        if last is None:
            return ["first run"] if digests is not None else []
        reasons = []
        if last.version != stage.version:
            reasons.append(f"stage version {last.version} -> {stage.version}")
        reasons += stage.explain(last.spec, spec)
        if digests is not None:
            changed = explain_changes(last.inputs, digests)
            reasons += [text for text in changed if not text.endswith(" -> none")]
        return reasons

    def judge(self, steps: Sequence[Step]) -> None:
        """Lets every stage judge the artifacts that a plan reuses, before anything runs.

        Raises:
            InputError: what is there will not do for a stage: too few images for its batch, say.
        """
        done = {
            (step.node.stage, step.node.dataset): manifest
            for step in steps
            if step.action == "reuse" and step.fingerprint is not None
            if (manifest := self.store.manifest(step.node.stage, step.fingerprint)) is not None
        }
        for node in self.order:
            self.stage(node.stage).foresee(self.setting(node), Inputs(done))

    # -- a run --------------------------------------------------------------------------------------------------------

    def run_node(
        self,
        node: Node,
        manifests: Mapping[Node, Manifest],
        reporter: Reporter,
        slice_: Slice | None = None,
        merge_only: bool = False,
        force: bool = False,
        stop: StopFlag | None = None,
    ) -> Manifest | None:
        """Runs one node unless its artifact exists; `manifests` holds at least those of its upstream.

        Before any work, and again with the new manifest, everything downstream may judge what is there so far, so that
        a data set that is too small is an error now and not hours later.

        Returns:
            Its manifest; None after a slice.
        """
        job = self.job(node, manifests)
        self.foresee(node, manifests)
        if force or (not merge_only and job.lookup() is None):
            self.check([node])
        reasons = [] if force else self.changes(node, job)
        reason = "asked to (--force)" if force else "; ".join(reasons) or "was not finished"
        manifest = execute(job, reporter, reason, slice_, merge_only, force, stop)
        if manifest is not None:
            self.remember(node, manifest)
            self.foresee(node, {**manifests, node: manifest})
        return manifest

    def foresee(self, node: Node, manifests: Mapping[Node, Manifest]) -> None:
        """Lets a node and everything downstream of it judge what is there so far.

        Raises:
            InputError: what is there will not do for one of them.
        """
        done = Inputs({(source.stage, source.dataset): manifest for source, manifest in manifests.items()})
        for later in [node, *self.downstream(node)]:
            self.stage(later.stage).foresee(self.setting(later), done)

    # -- finding inputs for a stage that runs alone -------------------------------------------------------------------

    def find_inputs(self, node: Node, given: Mapping[str, str] | None = None) -> dict[Node, Manifest]:
        """The manifests that a node reads, out of the store alone.

        Args:
            node: the node that is to run.
            given: fingerprints by label ('bucket[photos]'), as an orchestrator passes them; for what is not given,
                what this configuration's name made last is taken, if it was made with these settings and from the
                newest inputs.

        Raises:
            MissingInputError: says which stage is to be run first, and why.
        """
        manifests: dict[Node, Manifest] = {}
        for source in self.upstream(node):
            self._find(source, given or {}, manifests, needed_by=node)
        return manifests

    def last(self, node: Node) -> Manifest | None:
        """What this configuration's name made last at a node, whatever the settings were."""
        record = self.store.get_record(self._last_path(node), Last)
        return self.store.manifest(node.stage, record.fingerprint) if record else None

    def _find(self, node: Node, given: Mapping[str, str], found: dict[Node, Manifest], needed_by: Node) -> Manifest:
        if node in found:
            return found[node]
        advice = f"run `loraline stage {node.stage}` first"
        if node.label in given:
            manifest = self.store.manifest(node.stage, given[node.label])
            if manifest is None:
                raise MissingInputError(
                    f"{needed_by}: {self.store.url} has no {node.label} artifact {given[node.label][:12]}"
                )
            found[node] = manifest
            return manifest
        manifest = self.last(node)
        if manifest is None:
            raise MissingInputError(f"{needed_by} needs {node.label}, which is not in {self.store.url}: {advice}")
        changes = self._outdated(node, manifest)
        if changes:
            raise MissingInputError(f"{needed_by} needs {node.label}, made last with {changes}: {advice}")
        for source, facet in self._edges(node):
            newest = self._find(source, given, found, needed_by=node)
            if manifest.inputs.get(f"{source.label}.{facet}") != newest.digest(facet):
                raise MissingInputError(
                    f"{needed_by} needs {node.label}, made last from an older {source.label}: {advice}"
                )
        found[node] = manifest
        return manifest

    def _outdated(self, node: Node, manifest: Manifest) -> str | None:
        """How an artifact differs, in words, from what the node would make of the same inputs now."""
        stage = self.stage(node.stage)
        if manifest.stage_version != stage.version:
            return f"version {manifest.stage_version} of the stage, which is now {stage.version}"
        settings = stage.settings(self.setting(node))
        made_with = {key: manifest.spec.get(key) for key in settings}
        if made_with != settings:
            return f"other settings ({'; '.join(stage.explain(made_with, settings))})"
        # The source of a stage without needs is looked at by that stage alone: here it may be out of reach.
        if stage.needs and manifest.spec != (spec := self.spec(node)):
            return f"another model ({'; '.join(stage.explain(manifest.spec, spec))})"
        return None

    def published(self) -> str | None:
        """Fingerprint of the train artifact whose adapter was published last under this configuration's name. What a
        quality gate refused is not it."""
        record = self.store.get_record(self._published_path, Published)
        return record.train if record else None

    @property
    def _published_path(self) -> str:
        return f"runs/{self.config.name}/published.json"

    def _last_path(self, node: Node) -> str:
        return f"runs/{self.config.name}/last/{node.label}.json"

    def remember(self, node: Node, manifest: Manifest) -> None:
        """Notes what was made (or found) last under this configuration's name: for explanations, and for stages that
        run alone."""
        record = Last(
            fingerprint=manifest.fingerprint,
            version=manifest.stage_version,
            spec=manifest.spec,
            inputs=manifest.inputs,
        )
        self._point(self._last_path(node), record)
        if manifest.info.get("published"):
            pointer = Published(publish=manifest.fingerprint, train=manifest.info["train"])
            self._point(self._published_path, pointer)

    def _point(self, path: str, record: BaseModel) -> None:
        if self.store.get_json(path) != record.model_dump():
            self.store.put_json(path, record.model_dump())
