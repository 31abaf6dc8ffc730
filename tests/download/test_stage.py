"""The download stage on folders: what comes out, what is refused, what is told before, and what keeps still."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import webdataset

from stages.core.errors import ConfigError, InputError, PreemptedError, TransientError
from stages.core.events import Message, Recorder, StageReused
from stages.core.fingerprint import digest_bytes, digest_of
from stages.core.preemption import StopFlag
from stages.core.runner import Slice, execute
from stages.core.stage import Inputs
from tests.download.conftest import Bench, fill, image_bytes


def test_original_bytes_captions_and_provenance(bench: Bench) -> None:
    (bench.photos / "image-003.txt").write_text("  a ring\x00 of fire \n second line\n")
    manifest = bench.run()
    assert manifest.counts["images"] == 10
    assert manifest.refused == []
    samples = bench.samples(manifest)
    assert set(samples) == {f"image-{number:03d}.png" for number in range(10)}
    for number in range(10):
        sample = samples[f"image-{number:03d}.png"]
        data = image_bytes(number)
        assert sample["png"] == data
        assert sample["key"].decode().startswith(f"image-{number:03d}-")
        assert json.loads(sample["json"]) == {
            "path": f"image-{number:03d}.png",
            "sha256": digest_bytes(data),
            "bytes": len(data),
            "width": 40,
            "height": 30,
            "format": "PNG",
            "mode": "RGB",
            "exif_orientation": 1,
            "caption_sha256": digest_bytes(sample["txt"]),
        }
    assert samples["image-003.png"]["txt"] == b"a ring of fire"
    assert any("further lines" in event.text for event in bench.recorder.events if isinstance(event, Message))


def test_plain_webdataset_reads_the_shards(bench: Bench) -> None:
    manifest = bench.run()
    urls = [str(bench.store.fetch(shard)) for shard in manifest.shards]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(found) == 10
    assert [sample["png"] for sample in found] == [image_bytes(number) for number in range(10)]


def test_shards_and_sidecars(bench: Bench) -> None:
    manifest = bench.run()
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [
        ("raw-00000", 4),
        ("raw-00001", 4),
        ("raw-00002", 2),
    ]
    keys = [sample["key"].decode() for sample in bench.samples(manifest).values()]
    lines = bench.captions(manifest)
    assert [line["key"] for line in lines] == keys
    for line in lines:
        assert set(line) == {"key", "caption", "caption_sha256", "image_sha256"}
        assert line["caption_sha256"] == digest_bytes(line["caption"].encode())
    first = [[line["key"], line["image_sha256"]] for line in lines[:4]]
    assert manifest.shards[0].facets["pixels"] == digest_of(first)


def test_facets_are_foretold(bench: Bench) -> None:
    (bench.photos / "broken.png").write_bytes(b"x")
    (bench.photos / "broken.txt").write_text("only here")
    told = bench.stage.foretell(bench.spec())
    manifest = bench.run()
    assert set(told) == {"pixels", "captions", "pairs"}
    assert manifest.facets == told
    assert "only here" in {line["caption"] for line in bench.captions(manifest)}, "captions are those of the listing"


def test_twice_is_once_and_a_fresh_store_gives_the_same(bench: Bench, tmp_path: Path) -> None:
    first = bench.run()
    assert bench.run().digest() == first.digest()
    assert isinstance(bench.recorder.events[-1], StageReused)
    shutil.copytree(bench.photos, tmp_path / "elsewhere" / "photos")
    other = Bench(tmp_path / "elsewhere")
    assert other.run().digest() == first.digest()


# -- what each change touches -----------------------------------------------------------------------------------------


def change(bench: Bench, scratch: Path) -> tuple[list[str], list[str]]:
    """Finished units of the new state before the run, and the explanation of the change."""
    before = bench.store.get_json("last-spec")
    return bench.finished_units(scratch), bench.stage.explain(before, bench.spec())


@pytest.fixture
def done(bench: Bench) -> Bench:
    bench.first = bench.run()  # type: ignore[attr-defined]
    bench.store.put_json("last-spec", bench.spec())
    return bench


def test_one_more_image_makes_one_more_shard(done: Bench, tmp_path: Path) -> None:
    first = done.first  # type: ignore[attr-defined]
    (done.photos / "aaa.png").write_bytes(image_bytes(77))
    (done.photos / "aaa.txt").write_text("new words")
    kept, words = change(done, tmp_path)
    assert kept == ["raw-00000", "raw-00001", "raw-00002"]
    assert words == ["source: 10 -> 11 images", "source: 4 -> 5 distinct captions", "new: aaa.png"]
    second = done.run()
    assert second.shards[:3] == first.shards
    assert second.shards[3].samples == 1
    assert all(second.facets[name] != first.facets[name] for name in ("pixels", "captions", "pairs"))


def test_a_removed_image_rewrites_only_its_shard(done: Bench, tmp_path: Path) -> None:
    first = done.first  # type: ignore[attr-defined]
    (done.photos / "image-005.png").unlink()
    kept, words = change(done, tmp_path)
    assert kept == ["raw-00000", "raw-00002"]
    assert words == ["source: 10 -> 9 images", "gone: image-005"]
    second = done.run()
    assert [shard.samples for shard in second.shards] == [4, 3, 2]
    assert (second.shards[0], second.shards[2]) == (first.shards[0], first.shards[2])
    assert second.facets["captions"] == first.facets["captions"]


def test_a_changed_caption_leaves_pixels_alone(done: Bench, tmp_path: Path) -> None:
    first = done.first  # type: ignore[attr-defined]
    (done.photos / "image-005.txt").write_text("better words")
    kept, words = change(done, tmp_path)
    assert kept == ["raw-00000", "raw-00002"]
    assert words == ["source: 4 -> 5 distinct captions", "other caption: image-005.png"]
    second = done.run()
    assert second.shards[1].sha256 != first.shards[1].sha256
    assert [shard.facets for shard in second.shards] == [shard.facets for shard in first.shards]
    assert second.facets["pixels"] == first.facets["pixels"]
    assert second.facets["captions"] != first.facets["captions"]


def test_a_changed_image_leaves_captions_alone(done: Bench, tmp_path: Path) -> None:
    first = done.first  # type: ignore[attr-defined]
    (done.photos / "image-005.png").write_bytes(image_bytes(78))
    kept, words = change(done, tmp_path)
    assert kept == ["raw-00000", "raw-00002"]
    assert words == ["source: some of its 10 images changed", "changed: image-005.png"]
    second = done.run()
    assert second.facets["captions"] == first.facets["captions"]
    assert second.facets["pairs"] == first.facets["pairs"]
    assert second.facets["pixels"] != first.facets["pixels"]


def test_of_many_changed_files_the_first_few_are_named(done: Bench) -> None:
    old = done.spec()
    fill(done.photos, 7, start=20)
    (done.photos / "image-001.txt").unlink()
    assert done.stage.explain(old, done.spec()) == [
        "source: 10 -> 16 images",
        "source: 4 -> 7 distinct captions",
        "source: 0 -> 1 images without a usable caption",
        "new: image-020.png, image-021.png, image-022.png and 4 more",
        "no usable caption now: image-001.png",
    ]


def test_names_of_changes_are_never_worth_an_error(done: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    old, counts = done.spec(), ["source: 10 -> 9 images"]
    (done.photos / "image-005.png").unlink()
    assert Bench(done.root).stage.explain(old, done.spec()) == counts, "a process that has not listed the source"
    for shard in done.first.shards:  # type: ignore[attr-defined]
        Path(done.store.fetch(shard.sidecars["captions"])).unlink()
    assert done.stage.explain(old, done.spec()) == counts
    monkeypatch.setattr("stages.download.changes.MOST_LISTS", 0)
    assert done.stage.explain(old, done.spec()) == counts


def test_a_repaired_image_leaves_captions_alone(bench: Bench) -> None:
    (bench.photos / "z.png").write_bytes(b"broken")
    (bench.photos / "z.txt").write_text("only here")
    first = bench.run()
    (bench.photos / "z.png").write_bytes(image_bytes(79))
    second = bench.run()
    assert (first.counts["images"], second.counts["images"]) == (10, 11)
    assert second.facets["captions"] == first.facets["captions"]
    assert {line["caption"] for line in bench.captions(first)} == {line["caption"] for line in bench.captions(second)}


def test_a_shard_of_which_everything_is_refused(done: Bench) -> None:
    (done.photos / "zzz.png").write_bytes(b"broken")
    (done.photos / "zzz.txt").write_text("only here")
    manifest = done.run()
    assert [shard.samples for shard in manifest.shards] == [4, 4, 2, 0]
    assert "only here" in {line["caption"] for line in done.captions(manifest)}
    urls = [str(done.store.fetch(shard)) for shard in manifest.shards]
    assert len(list(webdataset.WebDataset(urls, shardshuffle=False))) == 10


def test_white_space_and_touched_files_change_nothing(done: Bench) -> None:
    (done.photos / "image-005.txt").write_text("  a picture of 3 \n\n")
    os.utime(done.photos / "image-004.png", (1, 1))
    done.run()
    assert isinstance(done.recorder.events[-1], StageReused)


def test_limits_and_strategy_are_explained(done: Bench, tmp_path: Path) -> None:
    old = done.spec()
    stricter = Bench(done.root, minimum_edge=31, max_refused_share=1)
    assert done.stage.explain(old, stricter.spec()) == ["minimum_edge 16 -> 31"]
    assert done.stage.foretell(old)["pixels"] != done.stage.foretell(stricter.spec())["pixels"]
    by_name = Bench(done.root, dataset={"caption_strategy": "filename"})
    assert "caption_strategy textfile -> filename" in done.stage.explain(old, by_name.spec())
    assert by_name.run().facets["pixels"] == done.first.facets["pixels"]  # type: ignore[attr-defined]
    settings = done.stage.settings(done.setting)
    assert done.stage.explain({**settings, "minimum_edge": 1}, settings) == ["minimum_edge 1 -> 16"]


# -- what is refused --------------------------------------------------------------------------------------------------


def test_refused_files_are_listed_with_reasons(bench: Bench) -> None:
    bench.config = Bench(bench.root, max_refused_share=0.9).config
    bench = Bench(bench.root, max_refused_share=0.9)
    photos = bench.photos
    for name, data, caption in (
        ("cut.png", image_bytes(50, (300, 300))[:5000], "words"),
        ("page.jpg", b"<html>", "words"),
        ("tiny.png", image_bytes(51, (8, 8)), "words"),
        ("blank.png", image_bytes(52), " \n "),
        ("latin.png", image_bytes(53), "caf\xe9".encode("latin-1")),
        ("alone.png", image_bytes(54), None),
    ):
        (photos / name).write_bytes(data)
        if caption is not None:
            text = caption.encode() if isinstance(caption, str) else caption
            (photos / name).with_suffix(".txt").write_bytes(text)
    (photos / "link.png").symlink_to(photos / "nowhere.png")
    os.mkfifo(photos / "pipe.png")
    (photos / "notes.md").write_text("not listed at all")
    manifest = bench.run()
    reasons = {refusal.name: refusal.reason for refusal in manifest.refused}
    assert list(reasons) == sorted(reasons)
    expected = {
        "alone.png": "no caption: alone.txt is not there",
        "blank.png": "empty caption",
        "cut.png": "cannot be decoded",
        "latin.png": "not UTF-8",
        "link.png": "broken link",
        "page.jpg": "not an image",
        "pipe.png": "not a regular file",
        "tiny.png": "too small: 8x8",
    }
    assert set(reasons) == set(expected)
    assert all(words in reasons[name] for name, words in expected.items())
    assert manifest.counts["images"] == 10
    assert manifest.counts["refused"] == 8


def test_links_hidden_files_and_subfolders(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    fill(bench.photos / "sub" / "deeper", 2)
    fill(bench.photos / ".hidden", 2)
    fill(tmp_path / "outside", 2, start=20)
    (bench.photos / "linked").symlink_to(tmp_path / "outside", target_is_directory=True)
    (bench.photos / "sub" / "loop").symlink_to(bench.photos, target_is_directory=True)
    (bench.photos / "._image-000.png").write_bytes(b"resource fork")
    manifest = bench.run()
    assert sorted(bench.samples(manifest)) == [
        "linked/image-020.png",
        "linked/image-021.png",
        "sub/deeper/image-000.png",
        "sub/deeper/image-001.png",
    ]


def test_a_name_that_is_not_utf8_is_refused(bench: Bench) -> None:
    name = os.fsencode(bench.photos) + b"/caf\xe9"
    for suffix, data in ((b".png", image_bytes(60)), (b".txt", b"words")):
        with open(name + suffix, "wb") as file:  # noqa: PTH123 (a path of bytes)
            file.write(data)
    manifest = bench.run()
    assert [refusal.reason for refusal in manifest.refused] == ["the file's name is not UTF-8; rename it"]
    assert manifest.refused[0].name == "caf\\udce9.png"


def test_filename_captions(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dataset={"caption_strategy": "filename"})
    bench.photos.mkdir()
    (bench.photos / "a_red_ring.png").write_bytes(image_bytes(1))
    (bench.photos / "a_red_ring.txt").write_text("not this")
    assert [line["caption"] for line in bench.captions(bench.run())] == ["a red ring"]


def test_extension_follows_the_content(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    fill(bench.photos, 1)
    (bench.photos / "image-000.png").rename(bench.photos / "image-000.JPG")
    (sample,) = bench.samples(bench.run()).values()
    assert sample["png"] == image_bytes(0)


@pytest.mark.parametrize("broken", [2, 12])
def test_too_many_refused_fails_with_names(bench: Bench, broken: int) -> None:
    for number in range(broken):
        (bench.photos / f"x{number:02d}.png").write_bytes(b"broken")
        (bench.photos / f"x{number:02d}.txt").write_text("words")
    words = rf"{broken} of {10 + broken} images of datasets\.photos\.source are refused.*max_refused_share"
    with pytest.raises(InputError, match=words) as caught:
        bench.run()
    assert "caption_strategy" not in str(caught.value)
    assert "x00.png: not an image" in str(caught.value)
    assert str(caught.value).count("x0") <= 5
    assert bench.job().lookup() is None
    generous = Bench(bench.root, max_refused_share=0.6)
    assert generous.run().counts["images"] == 10
    with pytest.raises(InputError, match="max_refused_share"):  # the artifact exists, and the limit is tightened again
        bench.stage.foresee(bench.setting, Inputs({("download", "photos"): generous.run()}))


def test_missing_captions_fail_before_any_image_is_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in bench.photos.glob("*.txt"):
        path.unlink()
    monkeypatch.setattr("stages.download.images.inspect", lambda *a: pytest.fail("looked into an image"))
    words = (
        r"all 10 images of datasets\.photos\.source are refused(.|\n)*set datasets\.photos\.caption_strategy: filename"
    )
    with pytest.raises(InputError, match=words):
        bench.spec()


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for act in (lambda: bench.stage.check(bench.setting), bench.spec):
        with pytest.raises(ConfigError, match=r"datasets\.photos\.source\.path: there is no folder"):
            act()
    bench.photos.mkdir()
    (bench.photos / "readme.txt").write_text("no images")
    for act in (lambda: bench.stage.check(bench.setting), bench.spec):
        with pytest.raises(InputError, match=r"^datasets\.photos\.source\.path: the folder .* holds no image"):
            act()
    bench.photos.joinpath("readme.txt").unlink()
    bench.photos.rmdir()
    bench.photos.write_text("a file")
    with pytest.raises(ConfigError, match="is a file"):
        bench.stage.check(bench.setting)


# -- while it runs ----------------------------------------------------------------------------------------------------


def test_a_source_that_changes_meanwhile_is_noticed(bench: Bench) -> None:
    job = bench.job()
    (bench.photos / "image-001.txt").write_text("changed")
    with pytest.raises(TransientError, match="changed while it was looked at"):
        execute(job, bench.recorder)
    assert job.lookup() is None


def test_asked_to_stop_keeps_finished_shards(bench: Bench, tmp_path: Path) -> None:
    flag = StopFlag()
    seen = []

    class Listener:
        def emit(self, event: object) -> None:
            if type(event).__name__ == "Progress":
                seen.append(event)
                if getattr(event, "done", 0) >= 6:
                    flag.set("SIGTERM")

    bench.recorder = Listener()  # type: ignore[assignment]
    with pytest.raises(PreemptedError):
        execute(bench.job(), bench.recorder, stop=flag)
    finished = bench.finished_units(tmp_path)
    assert finished[:1] == ["raw-00000"]
    assert len(finished) < 3
    assert bench.run().digest() == Bench(bench.root).run().digest()


def test_slices_and_merge_equal_one_run(bench: Bench, tmp_path: Path) -> None:
    (bench.photos / "alone.png").write_bytes(image_bytes(90))
    job = bench.job()
    for index in (2, 0, 1):
        assert execute(job, Recorder(), slice_=Slice(index, 3)) is None
    merged = execute(job, Recorder(), merge_only=True)
    shutil.copytree(bench.photos, tmp_path / "elsewhere" / "photos")
    whole = Bench(tmp_path / "elsewhere").run()
    assert merged is not None
    assert merged.digest() == whole.digest()
    assert merged.refused == whole.refused
