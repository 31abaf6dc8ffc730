"""Batches that shrink when the device has no memory for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from stages.core.errors import ConfigError
from stages.models.device import free_memory, is_out_of_memory

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class HalvingBatches:
    """Runs work in batches; one that does not fit is tried again at half the size, which later batches then keep.

    Args:
        size: how many items at once, to begin with.
        device: where the work is done.
        warn: is told when the size changes.
        advice: what to change when not even one item fits; ends the error message.
    """

    def __init__(self, size: int, device: torch.device, warn: Callable[[str], None], advice: str) -> None:
        self.size = size
        self._device = device
        self._warn = warn
        self._advice = advice

    def run(self, count: int, work: Callable[[slice], T]) -> list[T]:
        """Calls `work` with consecutive slices that cover 0..count, and returns what it gave back, in order.

        Raises:
            ConfigError: a single item does not fit.
        """
        results: list[T] = []
        start = 0
        while start < count:
            stop = min(start + self.size, count)
            shortage: str | None = None
            try:
                results.append(work(slice(start, stop)))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                shortage = str(error).split("\n")[0]
            if shortage is None:
                start = stop
                continue
            # Out of the except block: only now are the tensors that the failed attempt's frames held let go.
            free_memory(self._device)
            tried = stop - start
            if tried == 1:
                raise ConfigError(f"{self._device} has no memory for a single one ({shortage}). {self._advice}")
            self.size = tried // 2
            self._warn(f"out of memory on {self._device} with a batch of {tried}: going on with {self.size}")
        return results
