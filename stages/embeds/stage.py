"""The stage `embeds`: every distinct caption of all data sets becomes embeddings, once.

1. `captions.py` lists the distinct captions: the prompts (the empty one, those that validation draws, the negative
   one) in a unit of their own, then those of the data sets, from the lists that download leaves beside its shards.
2. `encoding.py` takes the units that are not done yet through CLIP-L, CLIP-G and T5, one encoder in memory at a time.
3. A finished shard is uploaded while T5 works on the next one, and is remembered when it has arrived.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from stages.core.artifact import Output, Shard
from stages.core.fingerprint import digest_of
from stages.core.stage import Context, Inputs, MapStage, Need, Setting, Unit
from stages.embeds.captions import units_of
from stages.embeds.encoding import Finished, GroupEncoder, groups
from stages.models.device import pick_device, set_threads
from stages.models.source import TOKENIZERS, ModelSource

if TYPE_CHECKING:
    from stages.config import Config

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class EmbedsStage(MapStage):
    """Encodes captions with CLIP-L, CLIP-G and T5."""

    name = "embeds"
    version = 1
    hardware = "gpu"
    needs = (Need("download", "captions"),)
    summary = "encodes every distinct caption with CLIP-L, CLIP-G and T5"

    def settings(self, setting: Setting) -> dict[str, Any]:
        section = setting.config.embeds
        return {
            "t5_length": section.t5_length,
            "t5_padding": section.t5_padding,
            "dtype": section.dtype,
            "prompts": prompts(setting.config),
        }

    def memo_spec(self, spec: dict[str, Any]) -> dict[str, Any]:
        # Which prompts there are decides what the artifact holds, not what becomes of a caption.
        return {key: value for key, value in spec.items() if key != "prompts"}

    def surroundings(self, setting: Setting) -> dict[str, Any]:
        source = ModelSource(setting.config.model, setting.store)
        return {"encoders": {name: source.identity(name) for name in (*ENCODERS, *TOKENIZERS)}}

    def check(self, setting: Setting) -> None:
        device = setting.config.embeds.device
        if device not in ("auto", "cpu"):  # these two are always there: no need to import torch
            pick_device(device, "embeds.device")
        ModelSource(setting.config.model, setting.store).check([*ENCODERS, *TOKENIZERS])

    def units(self, context: Context, inputs: Inputs) -> list[Unit]:
        return units_of(context.store, prompts(context.config), inputs.all("download"))

    def process(self, context: Context, inputs: Inputs, units: Sequence[Unit]) -> Iterator[tuple[Unit, Output]]:
        set_threads()
        device = pick_device(context.config.embeds.device, "embeds.device")
        with ThreadPoolExecutor(1, "upload") as uploader:
            for group in groups(units):
                arriving: tuple[Finished, Future[Shard]] | None = None
                try:
                    for finished in GroupEncoder(context, device).encode(group):
                        if arriving is not None:  # one upload at a time: at most two shards lie in the scratch folder
                            yield _output(*arriving)
                        arriving = (finished, uploader.submit(_save, context, finished))
                except Exception:
                    if arriving is not None:  # a unit that fails does not take the finished one before it along
                        yield _output(*arriving)
                    raise
                if arriving is not None:
                    yield _output(*arriving)

    def finish(self, context: Context, inputs: Inputs, outputs: list[Output]) -> Output:
        section = context.config.embeds
        by_clip = sum(output.info["truncated_clip"] for output in outputs)
        by_t5 = sum(output.info["truncated_t5"] for output in outputs)
        joined = Output.joined(outputs)
        distinct = joined.counts["captions"]
        if by_clip:
            context.log(
                f"{by_clip} of {distinct} captions are longer than CLIP reads; their ends reach the model by T5 alone",
                "warning",
            )
        if by_t5:
            context.log(
                f"{by_t5} of {distinct} captions are longer than embeds.t5_length {section.t5_length}; their ends are "
                f"lost: raise it (at most 512), or shorten them",
                "warning",
            )
        downloads = inputs.all("download").values()
        info = {
            "captions": sum(shard.samples for manifest in downloads for shard in manifest.shards),
            "distinct": distinct,
            "truncated_clip": by_clip,
            "truncated_t5": by_t5,
            "t5_length": section.t5_length,
            "t5_padding": section.t5_padding,
            "dtype": section.dtype,
        }
        return joined.model_copy(update={"info": info})


def prompts(config: Config) -> list[str]:
    """What is encoded beside the captions, each once: the empty caption, what validation draws, what it steers from."""
    return list(dict.fromkeys(["", *config.validation.prompts, config.validation.negative_prompt]))


def _save(context: Context, finished: Finished) -> Shard:
    unit = finished.unit
    # Named by its captions, as its memo is: units are renumbered when captions come and go.
    name = f"captions-{digest_of(unit.identity)[:12]}"
    return context.save_shard(finished.path, name, unit.samples, keys=unit.payload.names())


def _output(finished: Finished, upload: Future[Shard]) -> tuple[Unit, Output]:
    shard = upload.result()
    info = {"truncated_clip": finished.truncated_clip, "truncated_t5": finished.truncated_t5}
    return finished.unit, Output(shards=[shard], counts={"captions": shard.samples}, info=info)
