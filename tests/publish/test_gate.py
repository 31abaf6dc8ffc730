"""The quality gate: who is published and who is not, and that a refusal leaves the target alone."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from stages.core.events import StageReused
from stages.core.runner import describe
from stages.publish.gate import Losses, decide, read_losses
from tests.publish.conftest import ADAPTER, Bench, make_bench
from tests.servers.hub import HubServer

BEFORE = "ab" * 32


def losses(new: float | None, previous: float | None, **more: Any) -> Losses:
    return Losses(**{"new": new, "previous": previous, "fingerprint": BEFORE, "pictures": 12, **more})


@pytest.mark.parametrize(
    ("margin", "found", "publish", "words"),
    [
        (0.0, losses(0.25, 0.26), True, "3.8 % better than the 0.26 of the adapter before (abababababab)"),
        (0.0, losses(0.26, 0.26), True, "just as the 0.26"),
        (0.0, losses(0.26001, 0.26), False, "0.0038 % worse than the 0.26"),
        (0.02, losses(0.2651, 0.26), True, "2 % worse than the 0.26 of the adapter before (abababababab), on 12 "),
        (0.02, losses(0.2653, 0.26), False, "up to 2 % worse is allowed"),
        (-0.05, losses(0.25, 0.26), False, "it has to be at least 5 % better"),
        (-0.05, losses(0.24, 0.26), True, "it has to be at least 5 % better"),
        (1.0, losses(0.53, 0.26), False, "104 % worse"),
        (0.02, losses(math.nan, 0.26), False, "is no number"),
        (0.02, losses(0.25, math.inf), True, "held-out loss of abababababab is no number"),
        (0.02, losses(None, None), True, "no pictures were held out"),
        (0.02, losses(0.3, None, fingerprint=None), True, "no adapter before it was named"),
        (0.02, losses(0.3, None, reason="all were seen"), True, "without comparison with abababababab: all were seen"),
        (None, losses(9.0, 0.26), True, "no quality gate is set (publish.maximum_regression). The held-out loss is 9"),
        (None, losses(None, None), True, "no quality gate is set (publish.maximum_regression)."),
    ],
)
def test_the_decision_and_its_words(margin: float | None, found: Losses, publish: bool, words: str) -> None:
    decision = decide(margin, found)
    assert decision.publish == publish
    assert words in decision.words
    assert decision.words.startswith("Published" if publish else "Not published")
    assert decision.words.endswith(".")


def gated(bench: Bench, margin: float | None) -> None:
    publish = bench.config.publish.model_copy(update={"maximum_regression": margin})
    bench.config = bench.config.model_copy(update={"publish": publish})


def trained(bench: Bench, new: float, previous: float | None, adapter: bytes) -> None:
    record: dict[str, Any] = {"held_out": [{}] * 3, "rounds": [{"step": 0, "loss": 1.25}, {"step": 40, "loss": new}]}
    if previous is not None:
        record["previous"] = {"fingerprint": BEFORE, "loss": previous, "by_sigma": {}}
    bench.train(adapter=adapter, **{"evaluation.json": json.dumps(record).encode()})


def test_a_refused_adapter_leaves_the_hub_alone(hub: HubServer, hub_bench: Bench) -> None:
    gated(hub_bench, 0.02)
    first = hub_bench.run()
    assert first.info["published"] is True
    assert "no adapter before it was named" in first.info["decision"]
    files, head = hub.files("user/ring-lora"), hub.commits("user/ring-lora")[0].oid
    asked = hub.count("POST", ".*"), hub.count("PUT", ".*")

    trained(hub_bench, 0.30, 0.26, b"worse " * 300)
    manifest = hub_bench.run()
    assert manifest.info["published"] is False
    assert manifest.info["decision"] == (
        "Not published: the held-out loss is 0.3, 15 % worse than the 0.26 of the adapter before (abababababab), on 3 "
        "pictures; up to 2 % worse is allowed."
    )
    assert manifest.info["current"] == {"train": BEFORE}
    assert manifest.files == []
    assert "1 adapter not published" in describe(manifest)
    assert hub.files("user/ring-lora") == files
    assert hub.commits("user/ring-lora")[0].oid == head
    assert (hub.count("POST", ".*"), hub.count("PUT", ".*")) == asked

    # The refusal stands: it is found in the store, whatever the Hub holds.
    assert hub_bench.stage.still_there(hub_bench.setting, manifest) is None
    assert hub_bench.run() == manifest
    assert any(isinstance(event, StageReused) for event in hub_bench.recorder.events)

    gated(hub_bench, 0.2)  # a wider gate is asked anew
    wider = hub_bench.run()
    assert wider.info["published"] is True
    assert wider.info["current"] == {"train": hub_bench.manifests["train", None].fingerprint}
    assert hub.files("user/ring-lora")[ADAPTER] == b"worse " * 300


def test_a_first_refusal_makes_no_repository(hub: HubServer, hub_bench: Bench) -> None:
    gated(hub_bench, 0.0)
    trained(hub_bench, 0.30, 0.26, b"worse " * 300)
    hub_bench.run()
    assert hub.count("POST", "/api/repos/create") == 0
    assert hub.count("POST", "/commit/") == 0


def test_a_folder_is_left_alone_and_a_better_adapter_goes_in(bench: Bench) -> None:
    bench.run()
    out = bench.root / "out"
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in out.rglob("*") if path.is_file()}
    gated(bench, 0.02)
    trained(bench, 0.30, 0.26, b"worse " * 300)
    assert bench.run().info["published"] is False
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in out.rglob("*") if path.is_file()} == before
    trained(bench, 0.25, 0.26, b"better " * 300)
    manifest = bench.run()
    assert manifest.info["published"] is True
    assert (out / ADAPTER).read_bytes() == b"better " * 300
    assert "| the adapter published before (`abababababab`) | 0.26000 |" in (out / "README.md").read_text()


def test_the_gate_decides_nothing_that_is_published(bench: Bench) -> None:
    """Without a gate the spec is what it was before there were gates; the loss is compared and told all the same."""
    assert "maximum_regression" not in bench.job().spec
    trained(bench, 0.30, 0.26, b"worse " * 300)
    manifest = bench.run()
    assert manifest.info["published"] is True
    assert "15 % worse than the 0.26" in manifest.info["decision"]
    gated(bench, 0.5)
    assert bench.job().spec["maximum_regression"] == 0.5


def test_the_card_says_what_it_started_from(tmp_path: Any) -> None:
    train = {"previous": BEFORE, "warm_start": True}
    make_bench(tmp_path, {"target": "folder", "path": str(tmp_path / "out")}, train=train).run()
    assert "| Started from | the adapter of abababababab |" in (tmp_path / "out" / "README.md").read_text()


def test_an_artifact_without_an_evaluation_has_no_losses(bench: Bench) -> None:
    train = bench.manifests["train", None]
    assert read_losses(bench.store, train).new == 0.5
    assert read_losses(bench.store, train.model_copy(update={"files": []})) == Losses()
