"""The `download` stage against a plain loop that reads and copies the same files, and its memory as the data set grows.

    python -m benchmarks.download [--images 300] [--rounds 3] [--json result.json]

- speed: images a second of the whole stage (listing, hashing, a full decode of each image to find broken ones, tars,
  verified upload) beside a loop that only decodes each image and copies it: what any checked copy has to do.
- memory: peak resident size of a fresh process, for a data set and for one ten times as large. `publish` has no such
  table: it uploads a few files whose size does not grow with the data set.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.floor import peak_mb
from stages.core.events import Silent
from stages.pipeline import Pipeline
from tests.pictures import small_config

EDGE = 512


def draw(folder: Path, count: int) -> Path:
    """JPEGs of 512 px with texture, so that decoding them costs what photographs cost."""
    folder.mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
        coarse.resize((EDGE, EDGE), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=90)
        (folder / f"{number:06d}.txt").write_text(f"picture number {number}", encoding="utf-8")
    return folder


def stage_seconds(folder: Path, images: Path) -> float:
    config = small_config(folder, images, download={"shard_samples": 100, "processes": 1})
    pipeline = Pipeline.open(config)
    started = time.perf_counter()
    pipeline.run_node(pipeline.nodes_of("download")[0], {}, Silent(), force=True)
    return time.perf_counter() - started


def loop_seconds(folder: Path, images: Path) -> float:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    started = time.perf_counter()
    for path in sorted(images.glob("*.jpg")):
        with Image.open(path) as picture:
            picture.load()
        shutil.copyfile(path, folder / path.name)
        shutil.copyfile(path.with_suffix(".txt"), folder / path.with_suffix(".txt").name)
    return time.perf_counter() - started


def peak_of(count: int) -> float:
    """Peak memory in 10^6 bytes of a process that downloads so many images."""
    command = [sys.executable, "-m", "benchmarks.download", "--peak-of", str(count)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(answer.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loraline-bench-") as name:
        folder = Path(name)
        if arguments.peak_of:
            stage_seconds(folder, draw(folder / "images", arguments.peak_of))
            print(peak_mb())
            return
        images = draw(folder / "images", arguments.images)
        stage_seconds(folder / "warm", images)
        stage, loop = [], []
        for number in range(arguments.rounds):
            loop.append(loop_seconds(folder / "copy", images))
            stage.append(stage_seconds(folder / f"round-{number}", images))
    small = max(20, arguments.images // 10)
    result: dict[str, Any] = {
        "images": arguments.images,
        "stage_images_per_s": arguments.images / min(stage),
        "loop_images_per_s": arguments.images / min(loop),
        "ratio": min(stage) / min(loop),
        "peak_mb": {small: peak_of(small), 10 * small: peak_of(10 * small)},
    }
    print(f"download, {arguments.images} JPEGs of {EDGE} px, one process")
    print(f"  loop: decode and copy       {result['loop_images_per_s']:8.0f} images/s")
    print(
        f"  the stage                   {result['stage_images_per_s']:8.0f} images/s, {result['ratio']:.2f} x its time"
    )
    for count, peak in result["peak_mb"].items():
        print(f"  peak memory, {count:6,} images {peak:8.0f} MB")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
