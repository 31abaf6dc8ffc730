"""The small drawings and the arithmetic under them."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest

from stages.core.artifact import Manifest, Refusal, Shard
from stages.report import wording
from stages.report.build import RunRecord
from stages.report.charts import Line, bar, labels, line_chart, smoothed, thinned, ticks, usual_range
from stages.report.datasets import bucket_rows, choose_crops, group_refusals
from stages.report.timeline import rows
from stages.report.training import sigma_density
from stages.train.config import SigmaSection


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.26, 0.62), (1, 300), (-3, 5e-4), (1e-5, 1e-4), (0, 1e9)])
def test_ticks_are_round_and_span_the_range(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert found[0] <= low + 1e-9 * abs(high)
    assert found[-1] >= high - 1e-9 * abs(high)
    assert 3 <= len(found) <= 8
    step = found[1] - found[0]
    assert f"{step:.3e}"[:3] in ("1.0", "2.0", "2.5", "5.0")


def test_a_line_is_drawn_where_its_numbers_are() -> None:
    svg = line_chart("t<", [Line("a", [(0, 0.0), (10, 1.0), (20, math.nan)])], "x", "y")
    (path,) = re.findall(r'class="curve main" d="([^"]*)"', svg)
    start, end = ([float(part) for part in point.split()] for point in path[1:].split("L"))
    assert start[0] < end[0]
    assert start[1] > end[1]  # up is smaller in SVG
    assert 'aria-label="t&lt;"' in svg


def test_nothing_finite_is_an_error_one_point_and_a_flat_line_are_not() -> None:
    with pytest.raises(ValueError, match="no finite value"):
        line_chart("loss", [Line("a", [(1, math.inf)])], "x", "y")
    assert "circle" in line_chart("loss", [Line("a", [(1, 0.3)])], "x", "y")
    assert "nan" not in line_chart("loss", [Line("a", [(1, 0.0), (2, 0.0)])], "x", "y")


def test_thinning_keeps_extremes_and_ends() -> None:
    points = [(float(x), math.sin(x / 50)) for x in range(10_000)]
    points[1234] = (1234.0, 9.0)
    few = thinned(points, 400)
    assert len(few) <= 410
    assert (1234.0, 9.0) in few
    assert few[0] == points[0]
    assert few[-1] == points[-1]
    assert few == sorted(few)


def test_smoothing_of_a_constant_is_that_constant_from_the_first_point_on() -> None:
    assert [y for _, y in smoothed([(x, 0.7) for x in range(200)])] == pytest.approx([0.7] * 200)
    noisy = [(x, 1.0 + (-1) ** x) for x in range(400)]
    assert abs(smoothed(noisy)[-1][1] - 1.0) < 0.1


def test_one_spike_does_not_flatten_the_axis() -> None:
    assert usual_range([*[0.1] * 300, 50.0]) == (0.1, 0.1)
    assert usual_range([0.1 + 0.001 * x for x in range(300)]) is None


def test_bars_stay_inside_and_can_be_seen() -> None:
    assert 'x="0" width="6"' in bar(0, 0, "ran")
    assert 'x="994" width="6"' in bar(1.0, 0.0, "ran")
    assert 'x="0" width="1000"' in bar(0.5, 2, "ran")


@pytest.mark.parametrize("sampling", ["logit_normal", "uniform", "mode", "beta"])
def test_a_density_has_the_area_one(sampling: str) -> None:
    points = sigma_density(SigmaSection.model_validate({"sampling": sampling}), 2000)
    area = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(points))
    assert area == pytest.approx(1.0, abs=0.01)


def test_a_contact_sheet_is_drawn_from_few_shards_and_every_common_size() -> None:
    shards = [
        Shard(
            sha256=f"{index:064x}", bytes=1000 + index, name=str(index), samples=40, bucket=(64 * (1 + index % 9), 64)
        )
        for index in range(900)
    ]
    chosen = choose_crops(shards, 24)
    assert len(chosen) == 6
    assert sum(share for _, share in chosen) == 24
    assert len({shard.bucket for shard, _ in chosen}) == 6
    assert choose_crops(shards, 24) == chosen
    assert choose_crops(shards, 0) == []
    assert [share for _, share in choose_crops([shards[0].model_copy(update={"samples": 2})], 24)] == [2]
    assert sum(row.samples for row in bucket_rows(shards)[0]) == 900 * 40


def test_refusals_that_differ_in_numbers_are_one_group() -> None:
    refused = [Refusal(name=f"{index}.png", reason=f"{index}.png is {index} px, below 16 px") for index in range(30)]
    refused.append(Refusal(name="a", reason="no caption"))
    manifest = Manifest(stage="download", fingerprint="f" * 64, stage_version=1, spec={}, inputs={}, refused=refused)
    large, small = group_refusals([manifest])
    assert (large.count, large.more, len(large.names)) == (30, 18, 12)
    assert (small.reason, small.names) == ("no caption", ["a"])


def test_bars_stand_where_the_stages_started_when_that_is_known() -> None:
    records = [
        RunRecord("a", "ran", seconds=10, started_at=100.0),
        RunRecord("b", "ran", seconds=30, started_at=110.0),
        RunRecord("c", "reused"),
    ]
    drawn = [row.bar for row in rows(records)]
    assert 'x="0" width="250"' in str(drawn[0])
    assert 'x="250" width="750"' in str(drawn[1])
    assert drawn[2] is None
    unknown = rows([RunRecord("a", "ran", seconds=10), RunRecord("b", "failed", seconds=5)])
    assert 'x="0" width="500"' in str(unknown[1].bar)


def test_numbers_are_said_as_people_read_them() -> None:
    assert [wording.number(value) for value in (0, 1e-4, 2.5e-5, 0.28174, 300, 1204, 12.345)] == [
        "0", "1e-4", "2.5e-5", "0.2817", "300", "1,204", "12.35",
    ]  # fmt: skip
    assert [wording.duration(value) for value in (0.04, 9.96, 59.6, 141, 8040)] == [
        "0.0 s", "10.0 s", "1 min 00 s", "2 min 21 s", "2 h 14 min",
    ]  # fmt: skip
    assert wording.size(999) == "999 B"
    assert wording.size(4_200_000) == "4.2 MB"
    assert wording.percent(-0.567) == "−57 %"


def test_secrets_in_addresses_are_left_out() -> None:
    text = wording.without_secrets("GET https://me:pw@host.example/a/b.tar?Signature=1&x=2 failed with hf_abcdefgh1234")
    assert text == "GET https://host.example/a/b.tar?... failed with hf_..."


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 2.5, 5.0], ["0", "2.5", "5"]),
        ([1.06212, 1.06214, 1.06216], ["1.06212", "1.06214", "1.06216"]),
        ([100000.0, 100000.25, 100000.5], ["100000", "100000.25", "100000.5"]),
    ],
)
def test_labels_of_an_axis_are_told_apart(values: list[float], expected: list[str]) -> None:
    assert labels(values) == expected
