"""The page as a reader and as an attacker see it: parsed, not searched for strings."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from stages.core.artifact import Manifest
from stages.report.build import (
    RunRecord,
    build_report,
    records_in_store,
    report_place,
    write_report,
)
from tests.report.conftest import Run, make_run

VOID = {"meta", "img", "br", "link", "input", "hr", "line", "circle", "rect", "path"}
HEAD = "html head meta title style body"
BLOCKS = "header nav main section footer div p ul li dl dt dd figure figcaption details summary pre h1 h2 h3 h4"
TABLES = "table thead tbody tr th td"
INLINE = "span bdi code strong a img br"
DRAWINGS = "svg path circle line rect text"
ALLOWED = set(f"{HEAD} {BLOCKS} {TABLES} {INLINE} {DRAWINGS}".split())


class Page(HTMLParser):
    """A parsed page: its elements, its visible text, and whether every tag is closed where it was opened."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.faults: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        if self._open:
            self.faults.append(f"never closed: {self._open}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        if len(set(names)) != len(names):
            self.faults.append(f"attribute twice in {tag}: {names}")
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "p" and "p" in self._open:
            self.faults.append("a paragraph in a paragraph")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def all(self, tag: str) -> Iterator[dict[str, str]]:
        return (attributes for name, attributes in self.elements if name == tag)


def check_is_safe(page: Page) -> None:
    """What holds for every page, whatever is in it."""
    assert page.faults == []
    assert {tag for tag, _ in page.elements} <= ALLOWED
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            value = attributes.get(name, "")
            if tag == "a" and name == "href":
                assert re.match(r"#|https?://", value), value
            else:
                assert not value or value.startswith("data:image/webp;base64,"), (tag, value[:60])
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    targets = [link["href"][1:] for link in page.all("a") if link["href"].startswith("#")]
    assert set(targets) <= set(identifiers)
    assert not re.search("[\u202a-\u202e\x00-\x08\x0b\x0c\x0e-\x1f]", page.html)


def test_a_finished_run_is_told_with_the_manifests_numbers(finished: Run) -> None:
    page = Page(build_report(finished.pipeline, finished.records))
    check_is_safe(page)
    manifest = {record.label: record.manifest for record in finished.records}
    download, bucket, train = manifest["download[rings]"], manifest["bucket[rings]"], manifest["train"]
    assert download
    assert bucket
    assert train
    text = page.text
    assert "Trained for 300 steps on 50 pictures; the loss on 10 pictures held out fell from 0.62 to 0.2685." in text
    assert "5 stages ran, 1 was found in the store and reused." in text
    assert "Missing from this report" not in text
    distinct = download.counts["distinct_captions"]
    assert f"{distinct} of 60 captions" in text.replace("distinct captions ", "")
    for shard in bucket.shards:
        assert shard.bucket is not None
        assert re.search(rf"{shard.bucket[0]} × {shard.bucket[1]}\s+{shard.samples}\b", text), shard
    for record in finished.records:
        assert record.manifest is not None
        assert record.manifest.fingerprint in text
        assert record.manifest.digest() in text
        assert record.reason in text
    # Two pictures and two rounds between for each of three prompts, and the contact sheet.
    assert len(list(page.all("img"))) == 3 * 4 + 24
    assert [link["href"] for link in page.all("a") if not link["href"].startswith("#")] == [
        "https://hub.example/someone/zorbel-rings"
    ]


def test_pictures_have_alt_texts_tables_have_headers_charts_have_names(finished: Run) -> None:
    page = Page(build_report(finished.pipeline, finished.records))
    assert all(len(picture["alt"]) > 10 for picture in page.all("img"))
    assert all(header.get("scope") in ("row", "col") for header in page.all("th"))
    charts = [drawing for drawing in page.all("svg") if drawing.get("class") == "chart"]
    assert len(charts) == 6
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)


def test_the_policy_allows_this_style_sheet_and_nothing_else(finished: Run) -> None:
    html = build_report(finished.pipeline, finished.records)
    policy = next(meta["content"] for meta in Page(html).all("meta") if "http-equiv" in meta)
    style = html[html.index("<style>") + 7 : html.index("</style>")]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert (
        policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_captions_names_reasons_and_prompts_stay_text(hostile: Run) -> None:
    attack = "<script>alert(1)</script>"
    records = hostile.replaced(
        replace(hostile.record("train"), reason=attack),
        RunRecord(
            "publish", "failed", f"{attack}\"' onload=x https://user:geheim@hub.example/a?X-Amz-Signature=beef", 1.0
        ),
    )
    page = Page(build_report(hostile.pipeline, records, f"publish: {attack}\x00\x1b[31m\ud800"))
    check_is_safe(page)
    assert page.text.count("<script>alert('caption')</script>") > 4
    assert attack in page.text
    assert "<b onclick=x>\"'.png" in page.text
    assert "geheim" not in page.html
    assert "beef" not in page.html
    assert "\\ud800" not in repr(page.html)


def test_an_address_that_is_no_web_address_is_not_a_link(finished: Run) -> None:
    published = finished.record("publish").manifest
    assert published is not None
    info = {"target": "folder", "path": "out/<x>", "url": "javascript:alert(1)"}
    bad = replace(finished.record("publish"), manifest=published.model_copy(update={"info": info}))
    page = Page(build_report(finished.pipeline, finished.replaced(bad)))
    assert all(link["href"].startswith("#") for link in page.all("a"))
    assert "Published to out/<x>" in page.text


def test_a_run_that_failed_midway_says_where_and_why_first(finished: Run) -> None:
    reason = "the device has too little memory: lower train.train_batch_size"
    records = finished.replaced(
        RunRecord("train", "failed", reason, 34.2), RunRecord("publish", "not run", "an earlier stage failed")
    )
    page = Page(build_report(finished.pipeline, records, f"train: {reason}"))
    check_is_safe(page)
    assert "It failed at train. 4 of 6 stages finished" in page.text
    assert page.text.index(reason) < page.text.index("crops")
    assert page.text.count(reason) == 2  # in the alarm and in the timeline, not a third time
    assert "The training has not finished" in page.text
    assert len(list(page.all("img"))) == 24  # the crops are there all the same


def test_nothing_at_all_is_still_a_page(finished: Run) -> None:
    records = [RunRecord(node.label, "not run") for node in finished.pipeline.order]
    page = Page(build_report(finished.pipeline, records, "examples/demo/rings: no such folder"))
    check_is_safe(page)
    assert "examples/demo/rings: no such folder" in page.text
    assert "No result of: download, bucket, latents." in page.text


def test_lost_and_damaged_parts_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path, images=20)
    bucket, train = run.record("bucket[rings]").manifest, run.record("train").manifest
    assert bucket
    assert train
    root = Path(run.pipeline.config.store.url)
    lost, damaged = max(bucket.shards, key=lambda shard: shard.samples), train.file("evaluation.json")
    (root / lost.path).unlink()
    (root / damaged.path).chmod(0o644)
    (root / damaged.path).write_bytes(b"{")
    page = Page(build_report(run.pipeline, run.records))
    check_is_safe(page)
    assert "Missing from this report" in page.text
    assert f"crops of {lost.name}" in page.text
    assert "held-out evaluation" in page.text
    assert "Training loss" in page.text
    assert len(list(page.all("img"))) == 12 + 20 - lost.samples


def test_500_large_crops_and_5000_refusals_stay_small(tmp_path: Path) -> None:
    run = make_run(tmp_path, images=500, big=4, steps=3000)
    download = run.record("download[rings]").manifest
    assert download
    refusal = download.refused[0]
    many = [refusal.model_copy(update={"name": f"x/{index}.jpg", "reason": f"{index} px"}) for index in range(5000)]
    grown = replace(run.record("download[rings]"), manifest=download.model_copy(update={"refused": many}))
    html = build_report(run.pipeline, run.replaced(grown))
    assert len(html.encode()) < 2_000_000
    page = Page(html)
    check_is_safe(page)
    assert "5,000" in page.text
    assert "and 4,988 more" in page.text
    for chart in re.findall(r'<path class="curve[^>]*>', html):
        assert len(chart) < 12_000


def test_the_budget_for_pictures_holds(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.report.pictures.Album.__init__.__defaults__", (20_000,))
    html = build_report(finished.pipeline, finished.records)
    assert sum(len(uri) for uri in re.findall(r'src="(data:[^"]*)"', html)) <= 20_000
    assert re.search(r"\d+ pictures left out", Page(html).text)


def test_the_report_is_in_the_store_and_where_it_is_said_to_be(tmp_path: Path) -> None:
    run = make_run(tmp_path, images=8)
    assert report_place(run.pipeline) is None
    place = write_report(run.pipeline, run.records)
    assert Path(place) == Path(run.pipeline.config.store.url).absolute() / "runs/zorbel-rings/report.html"
    assert report_place(run.pipeline) == place
    copy = tmp_path / "here" / "report.html"
    assert write_report(run.pipeline, run.records, "it failed", copy_to=copy) == str(copy)
    assert copy.read_bytes() == Path(place).read_bytes()
    assert "it failed" in copy.read_text(encoding="utf-8")


def test_records_cross_process_borders(finished: Run) -> None:
    for record in finished.records:
        data = json.loads(json.dumps(record.to_json()))
        assert RunRecord.from_json(data, finished.pipeline.store) == record
    assert RunRecord.from_json({"label": "train", "action": "failed"}, finished.pipeline.store).manifest is None
    with pytest.raises(ValueError, match="action 'flew'"):
        RunRecord("train", "flew")  # type: ignore[arg-type]


def test_a_report_without_a_run_takes_what_was_made_last(tmp_path: Path) -> None:
    run = make_run(tmp_path, images=8)
    manifest: Manifest | None = run.record("bucket[rings]").manifest
    assert manifest
    path = f"runs/{run.pipeline.config.name}/last/bucket[rings].json"
    run.pipeline.store.put_json(path, {"fingerprint": manifest.fingerprint, "version": 1, "spec": {}, "inputs": {}})
    found = {record.label: record for record in records_in_store(run.pipeline)}
    assert found["bucket[rings]"].manifest == manifest
    assert found["train"].action == "not run"
    check_is_safe(Page(build_report(run.pipeline, list(found.values()))))


def test_a_report_without_a_run_says_what_is_not_up_to_date(tmp_path: Path) -> None:
    run = make_run(tmp_path, images=8)
    made: dict[str, Manifest] = {}
    for record in run.records:  # as after a pipeline: each is made from the one before
        assert record.manifest is not None
        inputs = {
            f"{node.label}.{need.facet}": made[node.label].digest(need.facet)
            for need in run.pipeline.stage(record.stage).needs
            for node in run.pipeline.nodes_of(need.stage)
        }
        manifest = record.manifest.model_copy(update={"inputs": inputs})
        made[record.label] = run.pipeline.store.commit(manifest, replace=True)
        run.pipeline.remember(run.pipeline.node(record.label), manifest)
    found = records_in_store(run.pipeline)
    assert not any(record.outdated for record in found)
    assert "up to date Trained for 300 steps" in Page(build_report(run.pipeline, found)).text
    grown = made["download[rings]"].model_copy(
        update={"facets": {**made["download[rings]"].facets, "pixels": "0" * 64}}
    )
    run.pipeline.store.commit(grown, replace=True)
    found = records_in_store(run.pipeline)
    assert [record.label for record in found if record.outdated] == [
        "bucket[rings]",
        "latents[rings]",
        "train",
        "publish",
    ]
    page = Page(build_report(run.pipeline, found))
    assert "Older than its settings or inputs: bucket[rings], latents[rings], train, publish. The next run" in page.text
    assert "found in the store, made from an older download[rings]" in page.text
    assert "not up to date Trained for 300 steps" in page.text
