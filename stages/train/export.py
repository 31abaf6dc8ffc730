"""The finished adapter as the file that `StableDiffusion3Pipeline.load_lora_weights` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.models.transformer import ADAPTER

if TYPE_CHECKING:  # diffusers is imported late: it takes seconds, and `--help` does not need it
    from diffusers import SD3Transformer2DModel

FILE = "pytorch_lora_weights.safetensors"


def export_adapter(model: SD3Transformer2DModel, folder: Path, notes: dict[str, str]) -> Path:
    """Writes the adapter in diffusers' own format: its keys, and the metadata that its loader takes alpha from.

    The same adapter and notes always give the same bytes.

    Args:
        model: with the adapter.
        folder: where to.
        notes: further metadata entries: how it was trained, from what.

    Returns:
        The file.
    """
    from diffusers import StableDiffusion3Pipeline
    from peft.utils import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        transformer_lora_layers={name: part.detach().cpu().contiguous() for name, part in weights.items()},
        transformer_lora_adapter_metadata=adapter_settings(model),
        weight_name=FILE,
    )
    _settle(folder / FILE, notes)
    return folder / FILE


def adapter_settings(model: SD3Transformer2DModel) -> dict[str, Any]:
    """The adapter's LoraConfig as plain JSON: only what differs from PEFT's defaults, so that an older PEFT, which does
    not know every field of this one, can read it as well."""
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    own = {"base_model_name_or_path", "inference_mode", "peft_version", "auto_mapping"}
    settings = {}
    for name, value in model.peft_config[ADAPTER].to_dict().items():
        plain = sorted(value) if isinstance(value, set | list | tuple) else value
        if name not in own and (name in ("r", "lora_alpha") or plain != defaults.get(name)):
            settings[name] = plain
    return settings


def _settle(path: Path, notes: dict[str, str]) -> None:
    """Adds notes to a safetensors file's metadata and writes its header in one fixed order; the library's own order of
    metadata changes from run to run. Layout: 8 bytes of header length, JSON header, tensors."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = {**header.pop("__metadata__", {}), **notes}
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":"))
    encoded = text.encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])
