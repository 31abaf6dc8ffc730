"""The stage `embeds` against its floor: the three text encoders in a loop on token ids that are ready.

Run it with `python -m benchmarks.embeds [--size both] [--items 384] [--rounds 3] [--json result.json]`. At real size
CLIP-L is whole; of CLIP-G and T5-XXL only some layers are there, so the share of the stage is over-, not understated.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

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
CLIP_LENGTH = 77
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
    options = bench.arguments(__doc__ or "", 384, "caption", 8)
    results = {}
    for size in bench.sizes(options):
        with bench.folder() as name:
            results[size] = one_size(size, options, Path(name))
    if not options.peak:
        bench.report("embeds", "caption", options, results)


def one_size(size: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    real = size == "real"
    items, rounds = (
        (options.real_items, min(options.rounds, bench.REAL_ROUNDS)) if real else (options.items, options.rounds)
    )
    model = str(real_model(folder / "model")) if real else options.model
    section = {"batch_size": options.batch_size, "device": options.device, "t5_length": T5_LENGTH, "dtype": "fp32"}
    config = bench.config_in(folder, model, embeds=section)
    upstream = downloaded(config, folder, items)
    if options.peak:
        bench.run_stage(EmbedsStage(), config, upstream)
        print(bench.peak_mb())
        return {}
    result = {"items": items, **measured(options, config, upstream, items, rounds)}
    if not real:
        result["peak_mb"] = bench.peak_of("benchmarks.embeds", options, items)
        result["peak_10x_mb"] = bench.peak_of("benchmarks.embeds", options, 10 * items)
    return result


def real_model(folder: Path) -> Path:
    """All of CLIP-L, 2 of CLIP-G's 32 layers and 1 of T5-XXL's 24, as wide as they are in Stable Diffusion 3."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    folder.mkdir()
    # Vocabularies are the tiny tokenizers': looking up a row costs the same in a short table.
    clip = {"vocab_size": 1024, "max_position_embeddings": CLIP_LENGTH, "bos_token_id": 0, "eos_token_id": 2}
    large = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        **clip,
    )
    giant = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=2,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
        **clip,
    )
    xxl = T5Config(
        vocab_size=1024, d_model=4096, d_kv=64, d_ff=10240, num_layers=1, num_heads=64, feed_forward_proj="gated-gelu"
    )
    encoders = {
        "text_encoder": CLIPTextModelWithProjection(large),
        "text_encoder_2": CLIPTextModelWithProjection(giant),
        "text_encoder_3": T5EncoderModel(xxl),
    }
    bench.reshaped(folder, encoders, ("tokenizer", "tokenizer_2", "tokenizer_3"))
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": CLIP_LENGTH}))
    return folder


def measured(
    options: argparse.Namespace, config: Config, upstream: Manifest, items: int, rounds: int
) -> dict[str, Any]:
    device = pick_device(options.device)
    source = ModelSource(config.model, Store(config.store))
    captions = [caption(index) for index in range(items)]
    # The stage encodes the empty caption, too, in a batch of its own.
    parts = [[""]] + [
        captions[start : start + options.batch_size] for start in range(0, len(captions), options.batch_size)
    ]

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

        return bench.compare(rounds, lambda: bench.run_stage(EmbedsStage(), config, upstream), load, floor)


if __name__ == "__main__":
    main()
