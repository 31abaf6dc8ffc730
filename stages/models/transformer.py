"""Loading SD3's transformer onto a device, quantised on the way, and giving it a LoRA adapter.

The weights are read from their safetensors files tensor by tensor, one transformer block after the other, and each
block is quantised before the next is read: the peak is the quantised model and one block, never the whole in bf16.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stages.core.errors import ConfigError, InputError
from stages.models.quantise import UNQUANTISED, LayerRow, quantise_linears, tensor_bytes
from stages.models.source import ModelSource

if TYPE_CHECKING:  # diffusers takes seconds to import: the functions here import it late, so that `--help` does not
    from diffusers import SD3Transformer2DModel

ADAPTER = "default"
"""The adapter's name within the model: the one that diffusers' own helpers look for."""


@dataclass(frozen=True)
class LoadReport:
    """What was loaded and how it is held."""

    layers: list[LayerRow]
    other_parameters: int
    other_bytes: int

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.layers) + self.other_parameters

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.layers) + self.other_bytes

    def grouped(self) -> list[dict[str, Any]]:
        """The layers as a table for people: blocks of one kind in one row, what is no linear layer in the last."""
        groups: dict[tuple[str, str], list[LayerRow]] = {}
        for row in self.layers:
            groups.setdefault((re.sub(r"\.\d+\.", ".*.", row.name, count=1), row.level), []).append(row)
        table: list[dict[str, Any]] = [
            {
                "layers": name,
                "count": len(rows),
                "parameters": sum(row.parameters for row in rows),
                "level": level,
                "bytes": sum(row.bytes for row in rows),
            }
            for (name, level), rows in groups.items()
        ]
        other = {"layers": "norms, embeddings, convolutions", "count": 1, "level": UNQUANTISED}
        return [*table, {**other, "parameters": self.other_parameters, "bytes": self.other_bytes}]

    def summary(self) -> str:
        """'2,028.3 M parameters in 2,120.4 MB: int8-quanto 1,990.1 M, ...; 675.0 M of them are AdaLN modulation'."""
        levels: dict[str, int] = {}
        for row in self.layers:
            levels[row.level] = levels.get(row.level, 0) + row.parameters
        levels[UNQUANTISED] = levels.get(UNQUANTISED, 0) + self.other_parameters
        parts = ", ".join(f"{level} {_millions(count)}" for level, count in sorted(levels.items()) if count)
        modulation = sum(row.parameters for row in self.layers if is_modulation(row.name))
        return (
            f"{_millions(self.parameters)} parameters in {self.bytes / 1e6:,.1f} MB: {parts}; "
            f"{_millions(modulation)} of them are AdaLN modulation"
        )


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def is_modulation(name: str) -> bool:
    """Whether a linear layer makes AdaLN's scales and shifts: from the timestep and the pooled text, never a token."""
    return name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear"))


def empty_transformer(config: dict[str, Any]) -> SD3Transformer2DModel:
    """The model without weights (on the meta device): for names and shapes, in a moment and in no memory."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        model: SD3Transformer2DModel = SD3Transformer2DModel.from_config(config)
    return model


def load_transformer(
    source: ModelSource, dtype: torch.dtype, device: torch.device, level: str, exclude: Iterable[str] = ()
) -> tuple[SD3Transformer2DModel, LoadReport]:
    """SD3's transformer on a device, frozen, in eval mode.

    Args:
        source: where the base model is.
        dtype: the type of activations, and of weights that are not quantised.
        device: where it is to be; each block is quantised there.
        level: a precision level's name (`quantise.LEVELS`), or 'no_change'.
        exclude: patterns (fnmatch) of full layer names that stay unquantised.

    Raises:
        InputError: the files lack a weight or hold one of another shape.
        ConfigError: a pattern of `exclude` matches no linear layer.
    """
    folder = source.folder(["transformer"])
    model = empty_transformer(source.config("transformer"))
    patterns = list(exclude)
    names = linear_names(model)
    _check_patterns(names, patterns)
    layers: list[LayerRow] = []
    with ExitStack() as stack:
        weights = _Weights([folder / path for path in source.weights("transformer")], stack)
        for prefix in _parts(model):
            weights.fill(model.get_submodule(prefix), prefix, dtype, device)
            inside = [name for name in names if name == prefix or name.startswith(f"{prefix}.")]
            layers += quantise_linears(model, inside, level, patterns)
    model.requires_grad_(False)
    model.eval()
    linear = {id(part) for module in model.modules() if isinstance(module, nn.Linear) for part in module.parameters()}
    rest = [part for part in model.parameters() if id(part) not in linear]
    others = sum(tensor_bytes(part) for part in rest) + sum(tensor_bytes(buffer) for buffer in model.buffers())
    return model, LoadReport(layers, sum(part.numel() for part in rest), others)


def linear_names(model: nn.Module) -> list[str]:
    """Full names of a model's linear layers."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _parts(model: nn.Module) -> list[str]:
    """Names that cover the whole model in pieces: what is read and quantised at once. Each block is one piece."""
    parts: list[str] = []
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            parts += [f"{name}.{index}" for index in range(len(child))]
        else:
            parts.append(name)
    return parts


def check_patterns(config: dict[str, Any], patterns: Iterable[str]) -> None:
    """Makes sure that every pattern of layers to leave unquantised matches one.

    Raises:
        ConfigError: one does not; the message names the nearest layers.
    """
    _check_patterns(linear_names(empty_transformer(config)), patterns)


def _check_patterns(names: list[str], patterns: Iterable[str]) -> None:
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"train.quantize_exclude: {pattern!r} matches no linear layer{_near(names, pattern)}")


class _Weights:
    """A model's tensors in its safetensors files, read one at a time."""

    def __init__(self, paths: list[Path], stack: ExitStack) -> None:
        from safetensors import SafetensorError, safe_open

        self._files: dict[str, Any] = {}
        self.where = paths[0].parent
        for path in paths:
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except SafetensorError as error:
                raise InputError(f"{path}: damaged weights ({error}); download the model again") from error
            self._files.update(dict.fromkeys(file.keys(), file))

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype, device: torch.device) -> None:
        """Puts the parameters and buffers of a module (on the meta device so far) onto the device."""
        for name, empty in [*module.named_parameters(), *module.named_buffers()]:
            full = f"{prefix}.{name}"
            if full not in self._files:
                raise InputError(
                    f"{self.where}: the weights lack {full}; these files do not belong to this config.json"
                )
            value: Tensor = self._files[full].get_tensor(full)
            if value.shape != empty.shape:
                raise InputError(
                    f"{self.where}: {full} has the shape {tuple(value.shape)} and should have {tuple(empty.shape)}; "
                    f"these files do not belong to this config.json"
                )
            # `clone` where nothing is converted: the tensor must not keep the whole file mapped.
            moved = value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
            moved = moved.clone() if moved.data_ptr() == value.data_ptr() else moved
            owner, _, last = name.rpartition(".")
            holder = module.get_submodule(owner)
            if isinstance(empty, nn.Parameter):
                setattr(holder, last, nn.Parameter(moved, requires_grad=False))
            else:
                holder.register_buffer(last, moved)


# -- the adapter ------------------------------------------------------------------------------------------------------


def lora_layers(config: dict[str, Any], targets: Iterable[str], exclude_blocks: Iterable[int]) -> list[str]:
    """Full names of the linear layers that get an adapter: those that end in one of the targets (whole name parts), but
    for those in excluded blocks.

    Raises:
        ConfigError: a target matches no linear layer, a block does not exist, or nothing is left.
    """
    model = empty_transformer(config)
    names = linear_names(model)
    matched: set[str] = set()
    for target in targets:
        found = [name for name in names if name == target or name.endswith(f".{target}")]
        if not found:
            raise ConfigError(f"train.lora.targets: {target!r} matches no linear layer{_near(names, target)}")
        matched.update(found)
    blocks = int(model.config.num_layers)
    excluded = list(exclude_blocks)
    for index in excluded:
        if not 0 <= index < blocks:
            raise ConfigError(f"train.lora.exclude_blocks: there is no block {index}; this model has 0 to {blocks - 1}")
    left = [name for name in names if name in matched and block_of(name) not in excluded]
    if not left:
        raise ConfigError("train.lora.exclude_blocks: no block is left that could get an adapter")
    return left


def block_of(name: str) -> int | None:
    """The index of the transformer block that a layer is in; None outside of the blocks."""
    found = re.match(r"transformer_blocks\.(\d+)\.", name)
    return int(found[1]) if found else None


def _near(names: list[str], wanted: str) -> str:
    """'; near it are attn.to_q, attn.to_k': layer names without their block, nearest first."""
    short = list(dict.fromkeys(re.sub(r"^transformer_blocks\.\d+\.", "", name) for name in names))
    ends = {
        name: max(_likeness(wanted, ".".join(name.split(".")[start:])) for start in range(name.count(".") + 1))
        for name in short
    }
    best = sorted(short, key=lambda name: -ends[name])[:5]
    return f"; near it are {', '.join(best)}"


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def add_lora(
    model: SD3Transformer2DModel,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Iterable[str],
    exclude_blocks: Iterable[int],
    seed: int,
    name: str = ADAPTER,
) -> dict[str, nn.Parameter]:
    """Adds a fresh adapter in fp32: A drawn from the seed (Kaiming uniform), B zero, so that it does nothing yet. It is
    the active one afterwards; another that was there keeps its weights and is at rest.

    Args:
        model: quantised already: the adapter wraps its layers.
        rank, alpha, dropout: the adapter's output is scaled by alpha / rank.
        targets, exclude_blocks: as for `lora_layers`.
        name: the adapter's name within the model.

    Returns:
        Its trainable parameters by name, in the model's order.
    """
    from peft import LoraConfig

    lora_layers(dict(model.config), targets, exclude_blocks)
    blocks = "|".join(str(index) for index in sorted(exclude_blocks))
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=dropout,
        target_modules=sorted(targets),
        exclude_modules=rf"transformer_blocks\.({blocks})\..*" if blocks else None,
        init_lora_weights=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The draw is made on the CPU's generator and moved, so that it is the same on every device.
        model.add_adapter(config, name)
    adapter = {path: part for path, part in model.named_parameters() if part.requires_grad}
    for part in adapter.values():
        part.data = part.data.float()
    return adapter
