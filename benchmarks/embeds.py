"""The stage `embeds` against its floor: the three text encoders in a loop on token ids that are ready.

Run it with `python -m benchmarks.embeds [--items 384] [--rounds 3] [--json result.json]`.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks import floor as bench
from stages.config import Config
from stages.core.artifact import Manifest, Shard
from stages.core.fingerprint import digest_bytes
from stages.core.shard import ShardWriter
from stages.core.store import Store
from stages.embeds.stage import EmbedsStage
from stages.models.device import pick_device
from stages.models.source import ModelSource
from stages.models.text import clip_encoder, t5_encoder

SHARD_SAMPLES = 192
T5_LENGTH = 256
WORDS = ("red", "blue", "green", "circle", "square", "star", "on", "a", "striped", "ground", "small", "large")


def caption(index: int) -> str:
    """Caption number `index`: distinct, and of different lengths."""
    words = [WORDS[(index * 7 + step * (3 + index % 5)) % len(WORDS)] for step in range(4 + index % 9)]
    return f"{' '.join(words)} {index}"


def downloaded(config: Config, folder: Path, count: int) -> Manifest:
    """What the download stage would have left of `count` captions."""
    store, shards = Store(config.store), []
    for start in range(0, count, SHARD_SAMPLES):
        captions = [caption(index) for index in range(start, min(start + SHARD_SAMPLES, count))]
        path = folder / "shard.tar"
        with ShardWriter(path) as writer:
            for index, text in enumerate(captions, start):
                writer.write(f"picture-{index:07}", {"txt": text.encode()})
        lines = [json.dumps({"caption": text, "caption_sha256": digest_bytes(text.encode())}) for text in captions]
        sidecar = store.put_bytes("".join(f"{line}\n" for line in lines).encode(), ".jsonl")
        blob = store.put_file(path)
        shards.append(
            Shard(**blob.model_dump(), name=f"shard-{start}", samples=len(captions), sidecars={"captions": sidecar})
        )
    return Manifest(
        stage="download", dataset="pictures", fingerprint="0" * 64, stage_version=1, spec={}, inputs={}, shards=shards
    )


def main() -> None:
    options = bench.arguments(__doc__ or "", 384, "caption")
    with bench.folder() as name:
        folder = Path(name)
        section = {
            "batch_size": options.batch_size,
            "device": options.device,
            "t5_length": T5_LENGTH,
            "dtype": "fp32",
        }
        config = bench.config_in(folder, options.model, embeds=section)
        upstream = downloaded(config, folder, options.items)
        if options.peak:
            bench.run_stage(EmbedsStage(), config, upstream)
            print(bench.peak_mb())
            return
        bench.report("embeds", "caption", options, measured(options, config, upstream))


def measured(options: argparse.Namespace, config: Config, upstream: Manifest) -> dict[str, object]:
    device = pick_device(options.device)
    source = ModelSource(config.model, Store(config.store))
    captions = [caption(index) for index in range(options.items)]
    parts = [captions[start : start + options.batch_size] for start in range(0, len(captions), options.batch_size)]

    def load() -> None:
        for name in ("text_encoder", "text_encoder_2"):
            with clip_encoder(source, name, torch.float32, device):
                pass
        with t5_encoder(source, T5_LENGTH, torch.float32, device):
            pass

    with ExitStack() as stack:
        clips = [
            stack.enter_context(clip_encoder(source, name, torch.float32, device))
            for name in ("text_encoder", "text_encoder_2")
        ]
        t5 = stack.enter_context(t5_encoder(source, T5_LENGTH, torch.float32, device))
        ready = [
            (
                encoder.model,
                [
                    encoder.tokenizer(
                        part, padding="max_length", max_length=encoder.length, truncation=True, return_tensors="pt"
                    ).input_ids.to(device)
                    for part in parts
                ],
            )
            for encoder in (*clips, t5)
        ]

        def floor() -> None:
            with torch.inference_mode():
                for model, batches in ready:
                    for ids_BL in batches:
                        model(ids_BL, output_hidden_states=model is not t5.model)[0].cpu()

        result = bench.compare(options.rounds, lambda: bench.run_stage(EmbedsStage(), config, upstream), load, floor)
    result["peak_mb"] = bench.peak_of("benchmarks.embeds", options, options.items)
    result["peak_10x_mb"] = bench.peak_of("benchmarks.embeds", options, 10 * options.items)
    return result


if __name__ == "__main__":
    main()
