"""kill -9 in the middle, then again: the same result, and what was finished is not done again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.download.conftest import Bench, image_bytes
from tests.download.test_hub import REPO, files, hub_bench
from tests.servers.hub import HubServer

pytestmark = pytest.mark.kill

DIES_AFTER_SIX = """
import os, sys
from pathlib import Path
from stages.core.runner import execute
from stages.download import checking
from tests.download.conftest import Bench

class Dies:
    def emit(self, event):
        if getattr(event, "done", 0) >= 6:
            os.kill(os.getpid(), 9)

if __name__ == "__main__":
    checking.ALONE_BELOW_BYTES = 0
    execute(Bench(Path(sys.argv[1]), processes=int(sys.argv[2])).job(), Dies())
"""
RUNS = """
import sys
from pathlib import Path
from tests.download.test_hub import hub_bench

if __name__ == "__main__":
    hub_bench(Path(sys.argv[1])).run()
"""


def program(folder: Path, text: str) -> list[str]:
    path = folder / "program.py"
    path.write_text(text)
    return [sys.executable, str(path)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_folder(bench: Bench, tmp_path: Path, workers: int) -> None:
    shutil.copytree(bench.photos, tmp_path / "whole" / "photos")
    whole = Bench(tmp_path / "whole").run()
    command = [*program(tmp_path, DIES_AFTER_SIX), str(tmp_path), str(workers)]
    killed = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert bench.job().lookup() is None
    finished = bench.finished_units(tmp_path)
    assert finished == ["raw-00000"]
    blob = next(path for path in (tmp_path / "store" / "blobs").rglob("*.tar"))
    before = blob.stat().st_mtime_ns
    again = bench.run()
    assert blob.stat().st_mtime_ns == before
    assert any("1 of 3 shards were finished before" in getattr(event, "text", "") for event in bench.recorder.events)
    assert again.digest() == whole.digest()


def test_a_source_that_grew_since(bench: Bench, tmp_path: Path) -> None:
    """The killed run's shards keep still for the next one, though that has another fingerprint."""
    subprocess.run([*program(tmp_path, DIES_AFTER_SIX), str(tmp_path), "1"], env=environment(), capture_output=True)
    (bench.photos / "aaa.png").write_bytes(image_bytes(99))
    (bench.photos / "aaa.txt").write_text("new")
    assert bench.finished_units(tmp_path) == ["raw-00000"]
    assert [shard.samples for shard in bench.run().shards] == [4, 4, 2, 1]


def test_the_hub(hub: HubServer, tmp_path: Path) -> None:
    hub.add_dataset(REPO, files())
    entries = hub.entries(REPO)
    hold = hub.hold("GET", str(entries["image-006.png"].sha256))
    process = subprocess.Popen(
        [*program(tmp_path, RUNS), str(tmp_path)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert hold.reached.wait(60)
        bench = hub_bench(tmp_path)
    finally:
        process.kill()
        process.wait()
        hold.release.set()
    assert bench.finished_units(tmp_path) == ["raw-00000"]
    hub.requests.clear()
    manifest = bench.run()
    assert manifest.counts["images"] == 10
    first = [str(entries[f"image-00{number}.png"].sha256) for number in range(4)]
    assert not hub.count("GET", "|".join(first)), "images of a finished shard were asked for again"
    fresh = Bench(tmp_path / "fresh", {"type": "hub", "repo": REPO})
    assert fresh.run().digest() == manifest.digest()
