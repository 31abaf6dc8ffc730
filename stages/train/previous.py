"""The adapter that is published now: what a retraining may start from, and what its result is measured against.

It is named by the fingerprint of its train artifact (`train.previous`). Its weights are worn by the same base, on the
same held-out pictures with the same noise, so that the two losses compare. What it was trained on must not be among
those pictures: see `stages.train.heldout`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import nn

from stages.core.artifact import Manifest
from stages.core.errors import ConfigError, InputError
from stages.core.store import Store
from stages.models.transformer import ADAPTER, add_lora
from stages.train.config import LoraSection, TrainSection
from stages.train.export import FILE

if TYPE_CHECKING:  # diffusers is imported late: it takes seconds, and `--help` does not need it
    from diffusers import SD3Transformer2DModel

NAME = "previous"
"""Its name within the model, beside the adapter in training."""
_PREFIX = "transformer."


@dataclass(frozen=True)
class Previous:
    """A train artifact that a new one follows."""

    manifest: Manifest
    lora: LoraSection

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def border(self) -> str:
        """The place (see `heldout.place_of`) up to which it was trained on no picture; '' where it held none out."""
        return str(self.manifest.info.get("held_out_border") or "")

    def differences(self, lora: LoraSection) -> list[str]:
        """In what its adapter has another shape, or another effect of the same weights, than one of those settings."""
        pairs: list[tuple[str, Any, Any]] = [
            ("rank", self.lora.rank, lora.rank),
            ("alpha", f"{self.lora.scaled_alpha:g}", f"{lora.scaled_alpha:g}"),
            ("targets", ", ".join(sorted(set(self.lora.targets))), ", ".join(sorted(set(lora.targets)))),
            ("exclude_blocks", sorted(set(self.lora.exclude_blocks)), sorted(set(lora.exclude_blocks))),
        ]
        return [f"{name} {old} where train.lora has {new}" for name, old, new in pairs if old != new]


def find_previous(store: Store, section: TrainSection) -> Previous | None:
    """The artifact that `train.previous` names; None where it names none.

    Raises:
        ConfigError: the store does not have it, or it is no training's.
    """
    if section.previous is None:
        return None
    short = section.previous[:12]
    manifest = store.manifest("train", section.previous)
    if manifest is None:
        raise ConfigError(
            f"train.previous: {store.url} has no train artifact {short}. Give the fingerprint of one that is there, or "
            f"leave it out once: what is published then has nothing before it to be measured against"
        )
    try:
        lora = LoraSection.model_validate(manifest.spec["train"]["lora"])
        manifest.file(FILE)
    except (KeyError, TypeError, ValidationError) as error:
        raise ConfigError(f"train.previous: the train artifact {short} holds no adapter that can be read") from error
    return Previous(manifest, lora)


def check_previous(store: Store, section: TrainSection, base_config: str) -> None:
    """Makes sure that the base can wear the previous adapter, and that training can start from it where it is to.

    Args:
        base_config: digest of the transformer's configuration.

    Raises:
        ConfigError: says what differs.
    """
    previous = find_previous(store, section)
    if previous is None:
        return
    short = previous.fingerprint[:12]
    trained_on = previous.manifest.spec.get("model", {}).get("transformer", {}).get("config")
    if trained_on != base_config:
        raise ConfigError(
            f"train.previous: the adapter of {short} was trained on a model of another architecture, so it cannot be "
            f"measured on this one. Leave train.previous out once to begin anew with this model"
        )
    differences = previous.differences(section.lora)
    if section.warm_start and differences:
        raise ConfigError(
            f"train.warm_start: the adapter of train.previous ({short}) has {'; '.join(differences)}. Give "
            f"train.lora what it has, or set train.warm_start: false"
        )


def load_weights(store: Store, previous: Previous, adapter: Mapping[str, nn.Parameter], name: str) -> None:
    """Puts its weights into an adapter of the same shape, in place.

    Args:
        adapter: parameters by name, as `add_lora` gives them.
        name: the adapter's name within the model.

    Raises:
        InputError: the file holds other weights than its artifact says.
    """
    tensors = safetensors.torch.load_file(store.fetch(previous.manifest.file(FILE)))
    wanted = {_PREFIX + path.replace(f".{name}.", "."): part for path, part in adapter.items()}
    shapes = {path: part.shape for path, part in wanted.items()}
    if {path: value.shape for path, value in tensors.items()} != shapes:
        raise InputError(
            f"train.previous: the weights in the artifact {previous.fingerprint[:12]} are not those of an adapter of "
            f"rank {previous.lora.rank} on this base; leave train.previous out"
        )
    with torch.no_grad():
        for path, part in wanted.items():
            part.copy_(tensors[path])


@contextmanager
def worn(model: SD3Transformer2DModel, store: Store, previous: Previous) -> Iterator[None]:
    """The model with the previous adapter instead of the one in training, whatever its rank and layers; afterwards the
    one in training is back, untouched."""
    lora = previous.lora
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is what is wanted here
        parts = add_lora(model, lora.rank, lora.scaled_alpha, 0.0, lora.targets, lora.exclude_blocks, 0, NAME)
    try:
        load_weights(store, previous, parts, NAME)
        model.eval()
        yield
    finally:
        # In this order: PEFT warns when the active adapter is deleted.
        model.set_adapter(ADAPTER)
        model.delete_adapters(NAME)
