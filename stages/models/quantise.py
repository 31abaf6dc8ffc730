"""Precision levels of a frozen base: one registry, and the linear layer that computes with quantised weights.

optimum-quanto's quantisers choose the scales and make the integers. How they are used is written here, in plain
PyTorch, for three reasons:

- quanto unpacks 4- and 2-bit weights by a C++ or CUDA extension that it compiles into its own package folder at first
  use: a machine without a compiler cannot, and a process killed meanwhile leaves a lock file behind that every later
  one waits for, for ever. Unpacking by shifts and masks needs neither.
- quanto keeps every layer's input for the backward pass although a frozen weight needs none: as much memory again as
  the activations. The function below saves nothing at all.
- quanto picks other kernels on other devices (TinyGemm, Marlin, AWQ), some of them slow in training, all of them with
  other rounding. One way of computing gives one answer.

A quantised weight W is held as integers q with a scale s (8 bits: one for each output row), or a scale and a shift m
(4 and 2 bits: one each for a group of 128 inputs, fewer where 128 does not divide the layer): W = s q, or W = s q - m.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

UNQUANTISED = "no_change"


@dataclass(frozen=True)
class Level:
    """A way to hold frozen linear weights.

    `quantised` turns a linear layer into one that computes the same from fewer bytes; the old one may be emptied. It
    runs on the layer's own device, one layer at a time. For torchao or bitsandbytes: such a function, and an entry.
    """

    name: str
    bits: int
    quantised: Callable[[nn.Linear], nn.Module]
    available: Callable[[], str | None] = lambda: None
    """Why the level cannot be used here, or None."""


def _quanto(name: str, qtype: str, bits: int) -> Level:
    return Level(name, bits, lambda linear: FrozenQuantoLinear(linear, qtype))


LEVELS: dict[str, Level] = {
    level.name: level
    for level in (
        _quanto("int8-quanto", "qint8", 8),
        _quanto("fp8-quanto", "qfloat8", 8),
        _quanto("int4-quanto", "qint4", 4),
        _quanto("int2-quanto", "qint2", 2),
    )
}


class FrozenQuantoLinear(nn.Linear):
    """A linear layer whose weight is quantised for good and takes no gradient.

    It is an `nn.Linear` to everything that looks (PEFT does), `weight` is quanto's own tensor class, a parameter that
    needs no gradient, of shape (out, in) and of the type that it is computed in.

    Args:
        linear: whose weight to take, on the device and in the type to compute in. Its weight is given up.
        qtype: quanto's name of the integer type.
    """

    def __init__(self, linear: nn.Linear, qtype: str) -> None:
        nn.Module.__init__(self)  # Linear's own would allocate a full weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        with torch.no_grad():
            weight = _quantise_weight(linear.weight.detach(), qtype)
        # A Parameter of an integer tensor asks for gradients unless told not to, and backward would build them.
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.qtype = qtype

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Linear's own name for it)
        # Under autocast, norms answer in fp32; as nn.Linear would be, this is computed in the weight's type.
        product: Tensor = _FrozenProduct.apply(input.to(self.weight.dtype), self.weight, self.bias)
        return product

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.qtype}"


class _FrozenProduct(torch.autograd.Function):
    """y = x W^T + b for a constant W and b: dy/dx needs W alone, so nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # no copy: the packed weight that the layer holds anyway
        return F.linear(x, dequantised(weight), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0]
        weight = dequantised(ctx.weight)
        return gradient.to(weight.dtype) @ weight, None, None


def _quantise_weight(weight: Tensor, qtype: str) -> Tensor:
    """A weight (out, in) as quanto's tensor, with quanto's own choice of groups, scales and shifts."""
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qtypes
    from optimum.quanto.tensor import quantize_weight

    kind = qtypes[qtype]
    if kind.bits == 8:
        scale, shift, group = AbsmaxOptimizer()(weight, qtype=kind, axis=0), None, None
        # quanto holds a single row by one scale without an axis, of no dimension.
        scale = scale if weight.shape[0] > 1 else scale.reshape(())
    else:
        group = group_size(weight.shape[1])
        scale, shift = MaxOptimizer()(weight, qtype=kind, axis=0, group_size=group)
    quantised: Tensor = quantize_weight(
        weight, qtype=kind, axis=0, scale=scale, shift=shift, group_size=group, optimized=False
    )
    return quantised


def group_size(inputs: int) -> int | None:
    """Inputs that share a scale in a 4- or 2-bit weight: 128, else 96, 64 or 32, whichever divides the layer first;
    None (a scale for each output row) where none does or the layer has no more than 128 inputs. quanto's rule."""
    return next((size for size in (128, 96, 64, 32) if inputs > 128 and inputs % size == 0), None)


def dequantised(weight: Tensor) -> Tensor:
    """A weight that a level holds, as a plain (out, in) tensor in the type that it is computed in."""
    parts: Any = weight
    if not hasattr(parts, "_scale"):
        return weight
    scale: Tensor = parts._scale
    if not hasattr(parts, "_shift"):
        return (parts._data.to(scale.dtype) * scale).reshape(weight.shape)
    levels = _unpacked(parts._data)
    shift: Tensor = parts._shift
    if shift.dtype.is_floating_point:
        return (levels.to(scale.dtype) * scale).sub_(shift).reshape(weight.shape)
    return ((levels.to(torch.int8) - shift.to(torch.int8)) * scale).reshape(weight.shape)


def _unpacked(packed: Any) -> Tensor:
    """The small integers of a packed tensor, as uint8 (rows, ...): each byte holds one value of k rows, m rows apart,
    where m is the number of packed rows."""
    bits = packed.bits
    mask = (1 << bits) - 1
    return torch.cat([(packed._data >> shift) & mask for shift in range(0, 8, bits)])[: packed.shape[0]]


@dataclass(frozen=True)
class LayerRow:
    """How one linear layer (or the rest of the model) is held. `bytes` counts weights, scales, shifts and biases."""

    name: str
    parameters: int
    level: str
    bytes: int


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor really holds: of a quantised one, all of its parts."""
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()
    return sum(tensor_bytes(getattr(tensor, name)) for name in names)


def quantise_linears(model: nn.Module, names: Iterable[str], level: str, exclude: Iterable[str]) -> list[LayerRow]:
    """Quantises linear layers of a model in place, one at a time.

    Args:
        model: the whole model.
        names: full names of the linear layers to look at; their weights are on the device, in the type to compute in.
        level: a name of the registry, or 'no_change'.
        exclude: patterns (fnmatch) of full layer names to leave as they are.

    Returns:
        How each of them is held now.
    """
    patterns = list(exclude)
    rows = []
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"{name} is no linear layer")
        chosen = UNQUANTISED if any(fnmatchcase(name, pattern) for pattern in patterns) else level
        count = sum(parameter.numel() for parameter in layer.parameters())
        held: nn.Module = layer
        if chosen != UNQUANTISED:
            held = LEVELS[chosen].quantised(layer)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, held)
        rows.append(LayerRow(name, count, chosen, sum(tensor_bytes(part) for part in held.parameters())))
    return rows
