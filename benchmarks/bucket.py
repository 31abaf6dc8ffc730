"""The `bucket` stage against a plain Pillow loop that does the same, and its memory as the data set grows.

    python -m benchmarks.bucket [--rounds 5] [--images 40] [--json result.json]

- one picture: CPU time of the stage's own function (`make_crop`) and of the loop, picture by picture in turn, for
  photo-like JPEGs of 2 and 12 megapixels and a 1024x1024 crop. The loop decodes, transposes, converts to RGB, scales
  with Lanczos, crops and writes a PNG, at level 1 and at Pillow's default 6.
- the stage: the whole of it (worker process, tars, store, verified uploads) in CPU time, against the same loop.
- memory: peak resident size of the stage's process and of its largest worker, for a data set and for one ten times
  as large. Each is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VIPS_CONCURRENCY"] = "1"

from PIL import Image, ImageOps

from benchmarks.decode import jpeg
from stages.bucket.geometry import Rules
from stages.bucket.pixels import make_crop
from stages.bucket.stage import BucketStage
from stages.config import Config
from stages.core.artifact import Manifest
from stages.core.events import Silent
from stages.core.fingerprint import canonical_json, digest_bytes
from stages.core.runner import Job, execute
from stages.core.shard import ShardWriter
from stages.core.stage import Context, Inputs, Setting
from stages.core.store import Store

EDGE = 1024
SIZES = {"2 MP": (1720, 1152), "12 MP": (4000, 3000)}
PER_SHARD = 20
RULES = Rules(
    resolution=EDGE,
    resolution_type="pixel_area",
    crop=True,
    crop_aspect="square",
    crop_style="center",
    minimum_image_size=0,
    maximum_image_size=None,
    target_downsample_size=None,
    maximum_aspect=4,
    alignment=64,
)


def pillow_loop(data: bytes, level: int) -> bytes:
    """What anyone would write."""
    image = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
    scale = EDGE / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - EDGE) // 2, (height - EDGE) // 2
    buffer = BytesIO()
    image.crop((left, top, left + EDGE, top + EDGE)).save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def one_picture(rounds: int) -> list[dict[str, Any]]:
    """CPU time for a picture, in turn."""
    rows = []
    for label, size in SIZES.items():
        pictures = [jpeg(*size, seed=seed) for seed in range(2)]
        runs: dict[str, Callable[[bytes], Any]] = {
            "stage": lambda data: make_crop(data, RULES, "0" * 64).png,
            "pillow, png 1": lambda data: pillow_loop(data, 1),
            "pillow, png 6": lambda data: pillow_loop(data, 6),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        sizes = {name: sum(len(run(data)) for data in pictures) for name, run in runs.items()}
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.process_time()
                for data in pictures:
                    run(data)
                seconds[name].append((time.process_time() - start) / len(pictures))
        for name, values in seconds.items():
            ratios = [value / stage for value, stage in zip(values, seconds["stage"], strict=True)]
            rows.append(
                {
                    "pictures": label,
                    "way": name,
                    "images_per_s_per_core": round(1 / statistics.median(values), 1),
                    "stage_is_faster_by": round(statistics.median(ratios), 2),
                    "megabytes": round(sizes[name] / len(pictures) / 1e6, 2),
                }
            )
    return rows


def setting_in(folder: Path, workers: int) -> Setting:
    config = Config.model_validate(
        {
            "name": "benchmark",
            "store": {"url": f"file://{folder}/store", "cache_dir": f"{folder}/cache"},
            "model": {"pretrained_model_name_or_path": "not looked at"},
            "datasets": [{"id": "photos", "source": {"type": "local", "path": str(folder)}}],
            "bucket": {"resolution": EDGE, "resolution_type": "pixel_area", "alignment": 64, "processes": workers},
            "publish": {"target": "folder", "path": str(folder)},
        }
    )
    return Setting(config, Store(config.store), config.datasets[0])


def cpu_seconds() -> float:
    """Of this process and of all its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_kilobytes() -> int:
    """Peak resident size of this program. (`ru_maxrss` starts with that of the process that started it.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def run_stage(folder: Path, workers: int) -> dict[str, Any]:
    """The whole stage once, in this process, over the raw shards that `raw_shards` left in the folder."""
    setting = setting_in(folder, workers)
    source = Manifest.model_validate_json((folder / "raw.json").read_bytes())
    stage = BucketStage()
    inputs = Inputs({("download", "photos"): source})
    job = Job(stage, setting, "bucket[photos]", stage.spec(setting), inputs, {"pixels": source.digest()})
    start, cpu = time.perf_counter(), cpu_seconds()
    manifest = execute(job, Silent())
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    images = sum(shard.samples for shard in source.shards)
    if manifest is None or manifest.counts["images"] != images:
        raise SystemExit(f"the stage made {manifest.counts if manifest else 'nothing'} of {images} images")
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "images": images,
        "seconds": round(seconds, 2),
        "images_per_s": round(images / seconds, 1),
        "images_per_cpu_s": round(images / cpu, 1),
        "stage_process_mb": round(peak_kilobytes() / 1024),
        "largest_worker_mb": round(children.ru_maxrss / 1024),
    }


def raw_shards(folder: Path, images: int, label: str) -> None:
    """Raw shards as the download leaves them: a few pictures again and again, under names of their own."""
    context = Context(setting_in(folder, 1), "download", {}, "", Silent(), folder)
    pictures = [jpeg(*SIZES[label], seed=seed) for seed in range(4)]
    shards = []
    for start in range(0, images, PER_SHARD):
        path = folder / "raw.tar"
        with ShardWriter(path) as shard:
            for number in range(start, min(start + PER_SHARD, images)):
                data = pictures[number % len(pictures)]
                provenance = {"path": f"{number}.jpg", "sha256": digest_bytes(data)}
                shard.write(f"{number:06d}", {"jpg": data, "json": canonical_json(provenance).encode()})
        facets = {"pixels": digest_bytes(f"{start} {images}".encode())}
        shards.append(context.save_shard(path, f"{start // PER_SHARD:05d}", shard.samples, facets=facets))
    manifest = Manifest(stage="download", fingerprint="", stage_version=1, spec={}, inputs={}, shards=shards)
    (folder / "raw.json").write_text(manifest.model_dump_json())


def measured(images: int, label: str, workers: int) -> dict[str, Any]:
    """`run_stage` in a fresh process, whose memory nothing else has touched."""
    with tempfile.TemporaryDirectory() as folder:
        raw_shards(Path(folder), images, label)
        command = [sys.executable, "-m", "benchmarks.bucket", "--one", folder, str(workers)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(output)
    return result


def whole_stage(images: int) -> dict[str, Any]:
    """The whole stage on one worker, with the loop before and after it in the same run; CPU time of all processes."""
    pictures = [jpeg(*SIZES["2 MP"], seed=seed) for seed in range(4)]

    def loop() -> float:
        start = time.process_time()
        for number in range(images):
            pillow_loop(pictures[number % len(pictures)], 1)
        return (time.process_time() - start) / images

    before, stage, after = loop(), measured(images, "2 MP", 1), loop()
    per_s = 2 / (before + after)
    return {
        "pictures": "2 MP",
        "stage_images_per_cpu_s": stage["images_per_cpu_s"],
        "pillow_images_per_cpu_s": round(per_s, 1),
        "stage_is_faster_by": round(stage["images_per_cpu_s"] / per_s, 2),
    }


def memory(images: int) -> dict[str, Any]:
    small, large = measured(images, "2 MP", 2), measured(images * 10, "2 MP", 2)
    growth = {name: round(large[name] / small[name], 3) for name in ("stage_process_mb", "largest_worker_mb")}
    return {"small": small, "ten_times": large, "growth": growth}


def table(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    print("  " + "  ".join(key.ljust(width) for key, width in widths.items()))
    for row in rows:
        print("  " + "  ".join(str(row[key]).ljust(width) for key, width in widths.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description="the bucket stage against a plain Pillow loop, and its memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=40, help="data set for the memory; ten times this is the other")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_stage(Path(arguments.one[0]), int(arguments.one[1]))))
        return
    result: dict[str, Any] = {"one_picture": one_picture(arguments.rounds)}
    table("one picture", result["one_picture"])
    result["whole_stage"] = whole_stage(2 * arguments.images)
    table("the whole stage, one worker", [result["whole_stage"]])
    result["memory"] = memory(arguments.images)
    table("memory, two workers", [result["memory"]["small"], result["memory"]["ten_times"]])
    print(f"  growth: {result['memory']['growth']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
