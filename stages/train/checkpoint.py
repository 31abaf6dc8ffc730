"""Checkpoints: the adapter, the optimiser, the history so far. Nothing else has a state.

    runs/train-<fingerprint>/checkpoints/<step>/state.safetensors    adapter and optimiser, in fp32
    runs/train-<fingerprint>/checkpoints/<step>/checkpoint.json      written last: without it there is no checkpoint

The record names the digest of the tensors, so that a damaged checkpoint is noticed and the one before is taken. The
files belong to one run alone, so that old ones can be deleted: unlike artifacts they are not shared by content.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from stages.core.errors import StoreError
from stages.core.store import Store

SCHEMA = 1


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it was read: `step` optimiser steps are done."""

    step: int
    history: dict[str, Any]
    tensors: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        store: where they are.
        run: 'train-<fingerprint>'.
        keep: how many are kept.
        scratch: a local folder for files on their way.
    """

    def __init__(self, store: Store, run: str, keep: int, scratch: Path) -> None:
        self._files, self._store, self._keep, self._scratch = store.files, store, keep, scratch
        self._folder = f"runs/{run}/checkpoints"

    def save(self, step: int, adapter: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, history: Any) -> None:
        """Writes a checkpoint, whole or not at all, and drops the oldest beyond those to keep."""
        tensors = {f"adapter.{name}": part.detach().cpu().contiguous() for name, part in adapter.items()}
        for name, part in adapter.items():
            for field, value in optimiser.state.get(part, {}).items():
                tensors[f"optimiser.{field}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
        local = self._scratch / f"checkpoint-{step}.safetensors"
        safetensors.torch.save_file(tensors, local)
        with local.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._files.put_file(local, self._path(step, "state.safetensors"))
        local.unlink()
        record = {"schema": SCHEMA, "step": step, "sha256": digest, "history": history}
        self._store.put_json(self._path(step, "checkpoint.json"), record)
        whole = [old for old in self.steps() if old < step and self._files.size(self._path(old, "checkpoint.json"))]
        for old in whole[self._keep - 1 :]:
            # The record goes first: a checkpoint that is only half deleted is none.
            self._files.delete(self._path(old, "checkpoint.json"))
            self._files.delete(self._path(old, "state.safetensors"))

    def steps(self) -> list[int]:
        """Steps of the checkpoints, newest first, whether whole or not (a deleted one may leave its empty folder)."""
        return sorted((int(name) for name in self._files.names(self._folder) if name.isdigit()), reverse=True)

    def clear(self) -> None:
        """Deletes all of them: training is to begin anew."""
        for step in self.steps():
            self._files.delete(self._path(step, "checkpoint.json"))
            self._files.delete(self._path(step, "state.safetensors"))

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest whole checkpoint, if there is one, and what is to be said about damaged ones."""
        warnings: list[str] = []
        for step in self.steps():
            record = self._store.get_json(self._path(step, "checkpoint.json"))
            if record is None:
                continue  # cut off while it was written, or while it was deleted
            saved = self._read(step, record)
            if saved is not None:
                return saved, warnings
            warnings.append(f"the checkpoint of step {step} is damaged; the one before it is taken")
        return None, warnings

    def _read(self, step: int, record: Any) -> Saved | None:
        local = self._scratch / f"checkpoint-{step}.safetensors"
        sha = hashlib.sha256()
        try:
            with local.open("wb") as file:
                for chunk in self._files.chunks(self._path(step, "state.safetensors")):
                    sha.update(chunk)
                    file.write(chunk)
            if record["schema"] != SCHEMA or record["step"] != step or sha.hexdigest() != record["sha256"]:
                return None
            return Saved(step, record["history"], safetensors.torch.load_file(local))
        except (FileNotFoundError, SafetensorError, KeyError, TypeError):
            return None
        finally:
            local.unlink(missing_ok=True)

    def _path(self, step: int, name: str) -> str:
        return f"{self._folder}/{step:08d}/{name}"


def restore(saved: Saved, adapter: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
    """Puts a checkpoint's numbers into an adapter and a fresh optimiser.

    Raises:
        StoreError: it is of another adapter, which its place in the store should rule out.
    """
    names = {name.removeprefix("adapter.") for name in saved.tensors if name.startswith("adapter.")}
    if names != set(adapter):
        raise StoreError(f"the checkpoint of step {saved.step} is of another adapter: delete it and train again")
    with torch.no_grad():
        for name, part in adapter.items():
            part.copy_(saved.tensors[f"adapter.{name}"])
    order = [part for group in optimiser.param_groups for part in group["params"]]
    places = {id(part): place for place, part in enumerate(order)}
    state: dict[int, dict[str, Tensor]] = {}
    for full, value in saved.tensors.items():
        if full.startswith("optimiser."):
            _, field, name = full.split(".", 2)
            state.setdefault(places[id(adapter[name])], {})[field] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
