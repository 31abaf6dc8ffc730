"""The `train` stage's step against a bare loop over preloaded tensors, and its memory as the data set grows.

    python -m benchmarks.train [--rounds 5] [--steps 40] [--batch 4] [--json result.json]

- a step: CPU time (all threads of the process) of one optimiser step of the whole stage, with its reading, drawing of
  noise, checks, metrics, TensorBoard and progress, against a loop that only calls model, loss, backward, clipping and
  optimiser on tensors that are ready: the same model, adapter, optimiser and shapes. The two take turns. The model is
  the embedded tiny one, so this is the worst case: whatever a step costs beside the model costs the same with a
  model a thousand times as large.
- memory: the stage in a process of its own, for a data set and for one ten times as large: the most memory of its own
  (anonymous pages) at any step, which should not grow, and the peak resident size. The latter also counts pages of the
  shards, which are files mapped into memory: the system takes them back whenever it needs to.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import safetensors.torch
import torch

from stages.config import Config
from stages.core.artifact import Manifest, Shard
from stages.core.events import Event, Progress
from stages.core.fingerprint import digest_bytes
from stages.core.runner import Job, execute
from stages.core.shard import ShardWriter
from stages.core.stage import Inputs, Setting
from stages.core.store import Store
from stages.models.source import ModelSource
from stages.models.transformer import add_lora, load_transformer
from stages.train.sigmas import TIMESTEPS
from stages.train.stage import TrainStage

MODEL = Path(__file__).parent.parent / "examples" / "demo" / "tiny-sd3"
CLIP_TOKENS, T5_TOKENS = 77, 77
SIZES = ((96, 96), (128, 64))  # buckets, in pixels
PER_SHARD = 100
WARM_UP = 5  # steps that are not counted
TARGET = 1.03


def config_for(folder: Path, steps: int, batch: int) -> Config:
    return Config.model_validate(
        {
            "name": "benchmark",
            "store": {"url": f"file://{folder}/store", "cache_dir": f"{folder}/cache"},
            "model": {"pretrained_model_name_or_path": str(MODEL)},
            "datasets": [{"id": "one", "source": {"type": "local", "path": str(folder)}}],
            "embeds": {"t5_length": T5_TOKENS},
            "train": {
                "steps": steps,
                "train_batch_size": batch,
                "mixed_precision": "no",
                "gradient_checkpointing": False,
                "evaluation": {"share": 0.0},
                "device": "cpu",
            },
            "publish": {"path": f"{folder}/published"},
        }
    )


def write_inputs(config: Config, samples: int) -> Inputs:
    """Random latents and text embeddings in the model's shapes, as earlier stages store them."""
    store, folder = Store(config.store), Path(config.publish.path or "").parent
    model = ModelSource(config.model, store).config("transformer")
    clip_width = model["pooled_projection_dim"]
    shards, lines, captions = [], [], [""]
    path = folder / "shard.tar"
    for number, (width, height) in enumerate(SIZES):
        for start in range(0, samples // len(SIZES), PER_SHARD):
            with ShardWriter(path) as writer:
                for row in range(start, min(start + PER_SHARD, samples // len(SIZES))):
                    key = f"{number}-{row:06d}"
                    latents = torch.randn(model["in_channels"], height // 8, width // 8)
                    writer.write(key, {"safetensors": safetensors.torch.save({"latents": latents}), "json": b"{}"})
                    captions.append(f"caption {key}")
                    digest = digest_bytes(captions[-1].encode())
                    lines.append({"key": key, "caption_sha256": digest, "image_sha256": digest})
            blob = store.put_file(path, ".tar")
            name = f"{width}x{height}-{start:06d}"
            shards.append(Shard(**blob.model_dump(), name=name, samples=writer.samples, bucket=(width, height)))
    with ShardWriter(path) as writer:
        for caption in captions:
            parts = {
                "clip": torch.randn(CLIP_TOKENS, clip_width),
                "t5": torch.randn(T5_TOKENS, model["joint_attention_dim"]),
                "pooled": torch.randn(model["pooled_projection_dim"]),
            }
            data = {"safetensors": safetensors.torch.save(parts), "json": b"{}"}
            writer.write(digest_bytes(caption.encode()), data)
    embeds = Shard(**store.put_file(path, ".tar").model_dump(), name="embeds", samples=writer.samples)
    sidecar = store.put_bytes("".join(json.dumps(line) + "\n" for line in lines).encode(), ".jsonl")
    raw = Shard(
        **store.put_bytes(b"raw", ".tar").model_dump(), name="raw", samples=len(lines), sidecars={"captions": sidecar}
    )
    return Inputs(
        {
            ("download", "one"): _manifest("download", [raw]),
            ("latents", "one"): _manifest("latents", shards),
            ("embeds", None): _manifest("embeds", [embeds]),
        }
    )


def _manifest(stage: str, shards: list[Shard]) -> Manifest:
    return Manifest(stage=stage, fingerprint="0" * 64, stage_version=1, spec={}, inputs={}, shards=shards)


class Clock:
    """Notes the process's CPU time at every training step that is reported, and the most memory of its own."""

    def __init__(self, memory: bool = False) -> None:
        self.times: list[float] = []
        self.own_mb = 0.0
        self._memory = memory

    def emit(self, event: Event) -> None:
        if isinstance(event, Progress) and event.task == "training":
            self.times.append(time.process_time())
            if self._memory:
                self.own_mb = max(self.own_mb, own_memory_mb())

    @property
    def steps(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def own_memory_mb() -> float:
    """Anonymous resident memory of this process, in 10^6 bytes; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon:"))


def run_stage(config: Config, inputs: Inputs, turn: int, clock: Clock) -> list[float]:
    """CPU seconds of each step of the stage."""
    changed = config.model_copy(update={"seed": turn})
    stage, setting = TrainStage(), Setting(changed, Store(changed.store))
    digests = {"download.pairs": "a", "latents.content": "b", "embeds.content": "c"}
    execute(Job(stage, setting, "train", stage.spec(setting), inputs, digests), clock)
    return clock.steps


class BareLoop:
    """What anyone would write, on tensors that are ready."""

    def __init__(self, config: Config) -> None:
        section = config.train
        source = ModelSource(config.model, Store(config.store))
        self.model, _ = load_transformer(
            source, torch.float32, torch.device("cpu"), section.base_model_precision, section.quantize_exclude
        )
        lora = section.lora
        adapter = add_lora(self.model, lora.rank, lora.scaled_alpha, lora.dropout, lora.targets, [], 0)
        self.parameters = list(adapter.values())
        self.optimiser = torch.optim.AdamW(self.parameters, lr=section.learning_rate, foreach=True)
        self.section, shape = section, self.model.config
        self.batches = []
        for width, height in SIZES:
            latents = torch.randn(section.train_batch_size, shape.in_channels, height // 8, width // 8)
            self.batches.append(
                {
                    "latents": latents,
                    "noise": torch.randn_like(latents),
                    "sigmas": torch.rand(len(latents)),
                    "text": torch.randn(len(latents), CLIP_TOKENS + T5_TOKENS, shape.joint_attention_dim),
                    "pooled": torch.randn(len(latents), shape.pooled_projection_dim),
                }
            )

    def run(self, steps: int) -> list[float]:
        """CPU seconds of each step."""
        self.model.train()
        times = []
        for step in range(steps):
            start = time.process_time()
            batch = self.batches[step % len(self.batches)]
            sigmas = batch["sigmas"].view(-1, 1, 1, 1)
            noisy = (1 - sigmas) * batch["latents"] + sigmas * batch["noise"]
            velocity = self.model(noisy, batch["text"], batch["pooled"], TIMESTEPS * batch["sigmas"]).sample
            loss = (velocity - (batch["noise"] - batch["latents"])).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, self.section.max_grad_norm)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            times.append(time.process_time() - start)
        return times


def step_time(folder: Path, rounds: int, steps: int, batch: int) -> dict[str, Any]:
    """The stage and the loop in turn; each turn's mean step, and the median of the turns' ratios."""
    config = config_for(folder, steps + WARM_UP, batch)
    inputs = write_inputs(config, 400)
    bare = BareLoop(config)
    stage_s, bare_s = [], []
    for turn in range(rounds):
        bare_s.append(statistics.median(bare.run(steps + WARM_UP)[WARM_UP:]))
        stage_s.append(statistics.median(run_stage(config, inputs, turn, Clock())[WARM_UP:]))
    ratios = sorted(stage / loop for stage, loop in zip(stage_s, bare_s, strict=True))
    return {
        "batch": batch,
        "bare_ms": round(1000 * statistics.median(bare_s), 3),
        "stage_ms": round(1000 * statistics.median(stage_s), 3),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_lowest": round(ratios[0], 4),
        "ratio_highest": round(ratios[-1], 4),
        "target": TARGET,
    }


def memory(samples: int) -> dict[str, Any]:
    """Peak resident size of a short training on so many samples, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.train", "--peak-of", str(samples)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    record: dict[str, Any] = json.loads(output.splitlines()[-1])
    return record


def peak_of(folder: Path, samples: int) -> dict[str, Any]:
    from stages.train.session import peak_rss_mb

    config = config_for(folder, 20, 4)
    inputs = write_inputs(config, samples)
    clock = Clock(memory=True)
    run_stage(config, inputs, 0, clock)
    return {"samples": samples, "own_mb": round(clock.own_mb, 1), "peak_rss_mb": peak_rss_mb()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of the stage and of the loop")
    parser.add_argument("--steps", type=int, default=40, help="counted steps of each turn")
    parser.add_argument("--batch", type=int, default=4, help="pictures of a batch")
    parser.add_argument("--samples", type=int, default=500, help="pictures of the smaller data set for memory")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        if arguments.peak_of:
            print(json.dumps(peak_of(Path(name), arguments.peak_of)))
            return
        steps = step_time(Path(name), arguments.rounds, arguments.steps, arguments.batch)
    sizes = [memory(arguments.samples), memory(10 * arguments.samples)]
    print(f"{'':24}{'bare loop':>12}{'stage':>12}{'ratio':>9}   target")
    print(
        f"{'step, batch ' + str(steps['batch']):24}{steps['bare_ms']:>9.2f} ms{steps['stage_ms']:>9.2f} ms"
        f"{steps['ratio']:>9.3f}   <= {TARGET} (turns: {steps['ratio_lowest']:.3f} to {steps['ratio_highest']:.3f})"
    )
    for size in sizes:
        name = f"{size['samples']} samples"
        print(f"{name:24}{size['own_mb']:>9.0f} MB of its own, {size['peak_rss_mb']:.0f} MB with mapped files (peak)")
    if arguments.json:
        arguments.json.write_text(json.dumps({"step": steps, "memory": sizes}, indent=1))


if __name__ == "__main__":
    main()
