"""The Hub as a source, through the real client: one commit, every byte verified, every failure in plain words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.core.errors import ConfigError, InputError, LoralineError, TransientError
from stages.core.events import StageReused
from tests.download.conftest import Bench, image_bytes
from tests.servers.hub import HubServer

REPO = "user/pictures"


def files(count: int = 10, start: int = 0, prefix: str = "") -> dict[str, bytes]:
    found = {}
    for number in range(start, start + count):
        found[f"{prefix}image-{number:03d}.png"] = image_bytes(number)
        found[f"{prefix}image-{number:03d}.txt"] = f"a picture of {number - number % 3}".encode()
    return found


def hub_bench(root: Path, strategy: str = "textfile", **source: Any) -> Bench:
    return Bench(root, {"type": "hub", "repo": REPO, **source}, {"caption_strategy": strategy})


def test_a_data_set_comes_out_as_from_a_folder(hub: HubServer, tmp_path: Path) -> None:
    sha = hub.add_dataset(REPO, {**files(), "README.md": b"# words", "model.bin": b"\x00" * 5000})
    bench = hub_bench(tmp_path)
    told = bench.stage.foretell(bench.spec())
    manifest = bench.run()
    assert manifest.facets == told
    assert manifest.spec["source"]["commit"] == sha
    assert manifest.info["source"]["commit"] == sha
    samples = bench.samples(manifest)
    assert {path: sample["png"] for path, sample in samples.items()} == {
        path: data for path, data in files().items() if path.endswith(".png")
    }
    assert not hub.count("GET", "model.bin|README.md")
    assert hub.leaks == []
    for path, data in files().items():
        target = tmp_path / "photos" / path
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(data)
    assert [shard.sha256 for shard in Bench(tmp_path).run().shards] == [shard.sha256 for shard in manifest.shards]


def test_again_costs_no_download(hub: HubServer, tmp_path: Path) -> None:
    hub.add_dataset(REPO, files())
    bench = hub_bench(tmp_path)
    bench.run()
    hub.requests.clear()
    bench.run()
    assert isinstance(bench.recorder.events[-1], StageReused)
    assert hub.count("*", "/resolve/") == 0
    # Another store: everything is made again, out of the client's cache.
    other = Bench(tmp_path / "other", {"type": "hub", "repo": REPO})
    other.run()
    assert hub.count("*", "/resolve/") == 0


def test_a_new_commit_downloads_only_what_is_new(hub: HubServer, tmp_path: Path) -> None:
    hub.add_dataset(REPO, files())
    bench = hub_bench(tmp_path)
    first = bench.run()
    old = bench.spec()
    hub.add_dataset(REPO, files(1, start=50))
    hub.requests.clear()
    words = bench.stage.explain(old, bench.spec())
    assert words[:2] == ["source: 10 -> 11 images", "source: 4 -> 5 distinct captions"]
    assert words[2].startswith("source: commit ")
    assert words[3:] == ["new: image-050.png"]
    second = bench.run()
    assert second.shards[: len(first.shards)] == first.shards
    fetched = {entry.path.split("/")[-1] for entry in hub.requests if "/resolve/" in entry.path}
    assert fetched == {"image-050.png", "image-050.txt"}


def test_a_pinned_commit_stays(hub: HubServer, tmp_path: Path) -> None:
    sha = hub.add_dataset(REPO, files(4))
    hub.add_dataset(REPO, files(2, start=50))
    assert hub_bench(tmp_path, revision=sha).run().counts["images"] == 4


def test_a_folder_of_the_repository_and_names_as_captions(hub: HubServer, tmp_path: Path) -> None:
    hub.add_dataset(REPO, {**files(2, prefix="train/a b/"), **files(3, start=50, prefix="test/")})
    bench = hub_bench(tmp_path, folder="train", strategy="filename")
    manifest = bench.run()
    assert sorted(bench.samples(manifest)) == ["a b/image-000.png", "a b/image-001.png"]
    assert not hub.count("*", r"\.txt$")
    with pytest.raises(ConfigError, match=r"source\.folder: user/pictures has no 'nothing'"):
        hub_bench(tmp_path, folder="nothing").spec()


@pytest.mark.parametrize(
    ("method", "pattern", "status"),
    [
        ("GET", f"/api/datasets/{REPO}/revision/", 503),
        ("GET", "/tree/", 500),
        ("HEAD", r"/resolve/.*003\.png", 503),
        ("GET", r"/resolve/.*\.txt", 502),
        ("GET", r"/resolve/.*\.txt", 429),
        ("GET", "a large file's digest", 500),
        ("GET", "a large file's digest", 429),
    ],
)
def test_a_busy_hub_is_waited_for(hub: HubServer, tmp_path: Path, method: str, pattern: str, status: int) -> None:
    hub.add_dataset(REPO, files())
    pattern = pattern.replace("a large file's digest", str(hub.entries(REPO)["image-004.png"].sha256))
    fault = hub.fail(method, pattern, status, times=2)
    assert hub_bench(tmp_path).run().counts["images"] == 10
    assert fault.times < 2, "the fault was never met"


def test_a_cut_connection_goes_on(hub: HubServer, tmp_path: Path) -> None:
    hub.add_dataset(REPO, files())
    fault = hub.cut("image-004")
    assert hub_bench(tmp_path).run().counts["images"] == 10
    assert fault.times == 0


@pytest.mark.parametrize("name", ["image-004.png", ".txt"])
def test_wrong_bytes_of_the_right_size_are_fetched_again(hub: HubServer, tmp_path: Path, name: str) -> None:
    hub.add_dataset(REPO, files())
    large = hub.entries(REPO)["image-004.png"].sha256
    fault = hub.corrupt_download(str(large) if name == "image-004.png" else r"\.txt$")
    bench = hub_bench(tmp_path)
    manifest = bench.run()
    assert fault.times == 0, "the fault was never met"
    sample = bench.samples(manifest)["image-004.png"]
    assert sample["png"] == image_bytes(4)
    assert sample["txt"] == b"a picture of 3"


def test_bytes_that_stay_wrong_fail_the_stage_and_are_not_kept(hub: HubServer, tmp_path: Path) -> None:
    hub.add_dataset(REPO, files())
    hub.corrupt_download(str(hub.entries(REPO)["image-004.png"].sha256), times=1000)
    bench = hub_bench(tmp_path)
    with pytest.raises(TransientError, match=r"image-004\.png .*do not match"):
        bench.run()
    hub.faults.clear()
    assert bench.run().counts["images"] == 10
    assert bench.samples(bench.run())["image-004.png"]["png"] == image_bytes(4)


def test_a_damaged_cache_is_made_good(hub: HubServer, tmp_path: Path) -> None:
    hub.add_dataset(REPO, files())
    hub_bench(tmp_path).run()
    blobs = [path for path in Path(os.environ["HF_HOME"]).rglob("blobs/*") if path.stat().st_size > 100]
    assert blobs
    for blob in blobs:
        data = bytearray(blob.read_bytes())
        data[50] ^= 1
        blob.write_bytes(data)
    other = hub_bench(tmp_path / "other")
    assert other.run().counts["images"] == 10


# -- errors in words --------------------------------------------------------------------------------------------------


def refused(bench: Bench) -> LoralineError:
    """The same error from the cheap check and from looking at the source."""
    with pytest.raises(LoralineError) as first:
        bench.stage.check(bench.setting)
    with pytest.raises(LoralineError) as second:
        bench.spec()
    assert str(first.value) == str(second.value)
    return first.value


def test_no_such_repository(hub: HubServer, tmp_path: Path) -> None:
    error = refused(hub_bench(tmp_path))
    assert isinstance(error, ConfigError)
    assert "datasets.photos.source.repo: there is no Hub data set user/pictures" in str(error)
    assert "a private one needs HF_TOKEN" in str(error)


def test_private_repository(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_dataset(REPO, files(3), private=True)
    assert "needs HF_TOKEN" in str(refused(hub_bench(tmp_path)))
    hub.add_user("stranger")
    monkeypatch.setenv("HF_TOKEN", hub.token("read", "stranger"))
    assert "HF_TOKEN may not read it" in str(refused(hub_bench(tmp_path)))
    monkeypatch.setenv("HF_TOKEN", hub.token("read"))
    assert hub_bench(tmp_path).run().counts["images"] == 3


@pytest.mark.parametrize("user", [None, "stranger"])
def test_gated_repository(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str | None) -> None:
    hub.add_dataset(REPO, files(3), gated="manual")
    hub.add_user("stranger")
    if user:
        monkeypatch.setenv("HF_TOKEN", hub.token("read", user))
    for strategy in ("textfile", "filename"):
        error = refused(hub_bench(tmp_path, strategy))
        assert isinstance(error, ConfigError)
        assert "datasets.photos.source.repo: user/pictures is gated: accept its terms at" in str(error)
    if user:
        hub.grant(REPO, user)
        assert hub_bench(tmp_path).run().counts["images"] == 3


def test_no_such_revision(hub: HubServer, tmp_path: Path) -> None:
    hub.add_dataset(REPO, files(3))
    error = refused(hub_bench(tmp_path, revision="v9"))
    assert isinstance(error, ConfigError)
    assert "source.revision: user/pictures has no revision 'v9'" in str(error)


def test_a_token_that_nobody_holds(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_dataset(REPO, files(3))
    monkeypatch.setenv("HF_TOKEN", "hf_nobody_holds_this")
    error = refused(hub_bench(tmp_path))
    assert "datasets.photos.source.repo: the Hub does not accept HF_TOKEN" in str(error)
    assert "hf_nobody_holds_this" not in str(error)


def test_no_images(hub: HubServer, tmp_path: Path) -> None:
    hub.add_dataset(REPO, {"data.parquet": b"PAR1"})
    error = refused(hub_bench(tmp_path))
    assert isinstance(error, InputError)
    assert "datasets.photos.source.repo: the Hub data set user/pictures at" in str(error)
    assert "holds no image" in str(error)
    hub.add_dataset(REPO, {"train/data.parquet": b"PAR1", **files(2)})
    assert "datasets.photos.source.folder: the Hub data set" in str(refused(hub_bench(tmp_path, folder="train")))


def test_nobody_answers(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    error = refused(hub_bench(tmp_path))
    assert isinstance(error, TransientError)
    assert "datasets.photos.source.repo: cannot look up the Hub data set user/pictures at http://127.0.0.1:9/" in str(
        error
    )


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409])
@pytest.mark.parametrize("pattern", ["/api/datasets/", "/tree/", r"/resolve/.*\.txt"])
def test_whatever_the_hub_answers_the_field_is_named(hub: HubServer, tmp_path: Path, pattern: str, status: int) -> None:
    hub.add_dataset(REPO, files(3))
    hub.fail("*", pattern, status, times=1000)
    with pytest.raises(ConfigError, match=r"^datasets\.photos\.source\.repo: .*user/pictures") as caught:
        hub_bench(tmp_path).spec()
    assert "HF_TOKEN may not" not in str(caught.value), "none is set"


def test_a_hub_that_stays_down(hub: HubServer, tmp_path: Path) -> None:
    hub.add_dataset(REPO, files(3))
    hub.fail("GET", "/api/datasets/", 503, times=1000)
    error = refused(hub_bench(tmp_path))
    assert isinstance(error, TransientError)
    assert "after 5 attempts" in str(error)


def test_offline_by_environment_and_endpoint_by_environment(hub: HubServer, tmp_path: Path) -> None:
    """In a process of its own: the client reads these variables when it is imported."""
    hub.add_dataset(REPO, files(3))
    program = (
        "import sys; from pathlib import Path; from tests.download.test_hub import hub_bench\n"
        "try: print(hub_bench(Path(sys.argv[1])).run().counts['images'])\n"
        "except Exception as error: print(type(error).__name__, error)"
    )

    def run(name: str, **more: str) -> str:
        environment = {**os.environ, **hub.environment("read"), **more}
        command = [sys.executable, "-c", program, str(tmp_path / name)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert run("online").strip() == "3"
    assert "ConfigError" in run("offline", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert "HF_HUB_OFFLINE is set" in run("offline", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
