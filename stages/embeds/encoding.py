"""Captions through three encoders of which only one is in memory at a time.

CLIP-L goes over all captions of a group of units, then CLIP-G, each leaving its results in the scratch folder, one file
a unit; then T5 goes over them, takes those results up again and finishes one shard after the other, written while the
next batch is encoded. Memory holds one encoder, the CLIP results of one unit (0.3 MB a caption for Stable Diffusion 3)
and two batches; the scratch folder holds the CLIP results of one group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from stages.core.errors import InputError
from stages.core.fingerprint import canonical_json
from stages.core.shard import ShardWriter
from stages.core.stage import Context, Unit
from stages.embeds.captions import Captions
from stages.models.device import torch_dtype
from stages.models.halving import HalvingBatches
from stages.models.source import ModelSource
from stages.models.text import ClipName, ClipOutput, T5Output, clip_encoder, t5_encoder

if TYPE_CHECKING:
    import torch

# Loading T5-XXL takes seconds, encoding this many captions takes minutes on a GPU: the share of loading is small, and
# the scratch folder stays below about 5 GB.
GROUP_CAPTIONS = 16384

_CLIPS: tuple[tuple[ClipName, str], ...] = (("text_encoder", "CLIP-L"), ("text_encoder_2", "CLIP-G"))
_ADVICE = "Use embeds.dtype: bf16, or embeds.device: cpu."


@dataclass(frozen=True)
class Finished:
    """A unit whose shard lies in the scratch folder. The counts are captions that lost their end."""

    unit: Unit
    path: Path
    truncated_clip: int
    truncated_t5: int


@dataclass(frozen=True)
class _Batch:
    """Some captions with what all three encoders made of them, on the CPU."""

    names: list[str]
    captions: list[str]
    clip_BLD: torch.Tensor
    pooled_BD: torch.Tensor
    t5: Sequence[T5Output]


def groups(units: Sequence[Unit], most: int = GROUP_CAPTIONS) -> Iterator[list[Unit]]:
    """Consecutive units of at most `most` captions together (but at least one unit)."""
    group: list[Unit] = []
    for unit in units:
        if group and sum(member.samples for member in group) + unit.samples > most:
            yield group
            group = []
        group.append(unit)
    if group:
        yield group


@dataclass
class GroupEncoder:
    """Encodes one group of units.

    Args:
        context: of the stage.
        device: where the encoders work.
    """

    context: Context
    device: torch.device
    _cut: dict[int, list[bool]] = field(default_factory=dict)

    def encode(self, group: Sequence[Unit]) -> Iterator[Finished]:
        """Yields each unit when its shard is complete.

        Raises:
            InputError: an encoder makes no numbers of a caption.
            ConfigError: a single caption does not fit the device's memory.
        """
        for name, label in _CLIPS:
            self._clip(group, name, label)
        yield from self._t5(group)

    def _clip(self, group: Sequence[Unit], name: ClipName, label: str) -> None:
        from safetensors.torch import save_file

        context, section = self.context, self.context.config.embeds
        total = sum(unit.samples for unit in group)
        batches = HalvingBatches(section.batch_size, self.device, self._warn, _ADVICE)
        with (
            context.progress(label, total, "caption") as bar,
            clip_encoder(self._source(), name, torch_dtype(section.dtype), self.device) as encoder,
        ):
            for unit in group:
                context.check_stop()
                cut = self._cut.setdefault(unit.index, [False] * unit.samples)
                of_unit: list[ClipOutput] = []
                for start, captions in self._batches(unit):

                    def work(part: slice, captions: list[str] = captions) -> ClipOutput:
                        output = encoder.encode(captions[part])
                        return ClipOutput(output.states_BLD.cpu(), output.pooled_BD.cpu(), output.cut)

                    parts = batches.run(len(captions), work)
                    of_unit += parts
                    for offset, was_cut in enumerate(was for part in parts for was in part.cut):
                        cut[start + offset] |= was_cut
                    bar.advance(len(captions))
                save_file(
                    {
                        "states": _joined([part.states_BLD for part in of_unit]),
                        "pooled": _joined([part.pooled_BD for part in of_unit]),
                    },
                    self._spill(unit, name),
                )

    def _t5(self, group: Sequence[Unit]) -> Iterator[Finished]:
        context, section = self.context, self.context.config.embeds
        total = sum(unit.samples for unit in group)
        batches = HalvingBatches(section.batch_size, self.device, self._warn, _ADVICE)
        with (
            context.progress("T5", total, "caption") as bar,
            t5_encoder(self._source(), section.t5_length, torch_dtype(section.dtype), self.device) as encoder,
        ):
            for unit in group:
                path = context.scratch / f"{unit.index}.tar"
                cut_by_t5 = 0
                clip_BLD, pooled_BD = self._clips_of(unit)
                names = _captions(unit).names()
                with ShardWriter(path) as writer, ThreadPoolExecutor(1, "write") as pen:
                    writing: Future[None] | None = None
                    for start, captions in self._batches(unit):

                        def work(part: slice, captions: list[str] = captions) -> T5Output:
                            output = encoder.encode(captions[part])
                            return T5Output(output.states_BLD.cpu(), output.tokens, output.cut)

                        parts = batches.run(len(captions), work)
                        cut_by_t5 += sum(was for part in parts for was in part.cut)
                        if writing is not None:  # one batch is written while the next one is encoded, and no more
                            writing.result()
                        stop = start + len(captions)
                        batch = _Batch(names[start:stop], captions, clip_BLD[start:stop], pooled_BD[start:stop], parts)
                        writing = pen.submit(self._write, writer, batch)
                        bar.advance(len(captions))
                    if writing is not None:
                        writing.result()
                yield Finished(unit, path, sum(self._cut.pop(unit.index)), cut_by_t5)

    def _clips_of(self, unit: Unit) -> tuple[torch.Tensor, torch.Tensor]:
        """What the CLIPs left of a unit: their states side by side (B, L, D), and their pooled vectors (B, D)."""
        import torch
        from safetensors.torch import load_file

        spilled = []
        for name, _ in _CLIPS:
            path = self._spill(unit, name)
            spilled.append(load_file(path))
            path.unlink()
        states, pooled = ([tensors[key] for tensors in spilled] for key in ("states", "pooled"))
        return torch.cat(states, dim=-1), torch.cat(pooled, dim=-1)

    def _write(self, writer: ShardWriter, batch: _Batch) -> None:
        """Puts one batch of captions into the shard.

        Raises:
            InputError: an encoder made no numbers of one.
        """
        from safetensors.torch import save

        t5_BLD = _joined([part.states_BLD for part in batch.t5])
        tokens = [count for part in batch.t5 for count in part.tokens]
        whole = {"clip": batch.clip_BLD, "t5": t5_BLD, "pooled": batch.pooled_BD}
        for encoder, tensor in whole.items():
            odd = _not_finite(tensor)
            if odd is not None:
                raise InputError(
                    f"embeds: {encoder} makes no finite numbers of the caption {batch.captions[odd][:80]!r} in "
                    f"{self.context.config.embeds.dtype}. Set embeds.dtype: fp32; if it is fp32 already, the "
                    f"encoder's weights are bad."
                )
        trimmed = self.context.config.embeds.t5_padding == "zero"
        for index, (key, caption) in enumerate(zip(batch.names, batch.captions, strict=True)):
            tensors = {encoder: tensor[index] for encoder, tensor in whole.items()}
            if trimmed:  # states at padding that would be multiplied by zero; t5_tokens says where they begin
                tensors["t5"] = tensors["t5"][: tokens[index]]
            members = {
                "safetensors": save({encoder: tensor.contiguous() for encoder, tensor in tensors.items()}),
                "json": canonical_json({"caption": caption, "t5_tokens": tokens[index]}).encode(),
            }
            writer.write(key, members)

    def _batches(self, unit: Unit) -> Iterator[tuple[int, list[str]]]:
        """(position of the first, captions): cut the same way for every encoder, and whatever else is pending."""
        captions = _captions(unit).read(self.context.store)
        size = self.context.config.embeds.batch_size
        for start in range(0, len(captions), size):
            yield start, captions[start : start + size]

    def _spill(self, unit: Unit, name: str) -> Path:
        return self.context.scratch / f"{unit.index}-{name}.safetensors"

    def _source(self) -> ModelSource:
        return ModelSource(self.context.config.model, self.context.store)

    def _warn(self, text: str) -> None:
        self.context.log(text, "warning")


def _captions(unit: Unit) -> Captions:
    captions: Captions = unit.payload
    return captions


def _not_finite(tensor: torch.Tensor) -> int | None:
    """Position, along the first dimension, of the first part that holds a NaN or an infinity."""
    import torch

    flat = tensor.flatten(1)
    # Either makes the sum one, too, and summing is twenty times as fast as looking at each number. Finite numbers may
    # overflow when they are summed: then each is looked at.
    if torch.isfinite(flat.sum(dim=1)).all():
        return None
    odd = (~torch.isfinite(flat)).any(dim=1).nonzero()
    return int(odd[0]) if len(odd) else None


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat(parts).contiguous()
