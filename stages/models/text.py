"""The three text encoders, one at a time, as `StableDiffusion3Pipeline.encode_prompt` uses them.

CLIP-L and CLIP-G give the states before their last layer and a pooled vector, T5 its last states. No attention mask
is given to any of them, because Stable Diffusion 3 was trained so. Legend: B captions, L tokens, D width of a state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from stages.core.errors import ConfigError
from stages.models.device import free_memory

if TYPE_CHECKING:  # torch and transformers are imported late everywhere here, so that `--help` stays fast
    import torch

    from stages.models.source import ModelSource

ClipName = Literal["text_encoder", "text_encoder_2"]
TOKENIZER_OF = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
_TOKENIZER_CLASSES = {"CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast"}


class ClipOutput(NamedTuple):
    """What a CLIP encoder makes of B captions; `cut[i]` says that caption i was too long and lost its end."""

    states_BLD: torch.Tensor
    pooled_BD: torch.Tensor
    cut: list[bool]


class T5Output(NamedTuple):
    """What T5 makes of B captions, padding included; `tokens[i]` of caption i's L states are no padding."""

    states_BLD: torch.Tensor
    tokens: list[int]
    cut: list[bool]


@dataclass(frozen=True)
class ClipEncoder:
    """One of the two CLIP text encoders with its tokenizer."""

    model: Any
    tokenizer: Any
    length: int

    def encode(self, captions: list[str]) -> ClipOutput:
        import torch

        tokens = _tokenize(self.tokenizer, captions, self.length)
        with torch.inference_mode():
            output = self.model(tokens.ids_BL.to(self.model.device), output_hidden_states=True)
        return ClipOutput(output.hidden_states[-2], output.text_embeds, tokens.cut)


@dataclass(frozen=True)
class T5Encoder:
    """The T5 encoder with its tokenizer; captions are padded or cut to `length` tokens."""

    model: Any
    tokenizer: Any
    length: int

    def encode(self, captions: list[str]) -> T5Output:
        import torch

        tokens = _tokenize(self.tokenizer, captions, self.length)
        with torch.inference_mode():
            states_BLD = self.model(tokens.ids_BL.to(self.model.device)).last_hidden_state
        return T5Output(states_BLD, tokens.counts, tokens.cut)


@contextmanager
def clip_encoder(
    source: ModelSource, name: ClipName, dtype: torch.dtype, device: torch.device
) -> Iterator[ClipEncoder]:
    """Loads CLIP-L ('text_encoder') or CLIP-G ('text_encoder_2'), and drops it on the way out.

    Raises:
        ConfigError, TransientError: it cannot be had (see `ModelSource.folder`).
    """
    from transformers import CLIPTextModelWithProjection

    # The pipeline pads both to what the first tokenizer says, so this one does too.
    length = int(load_tokenizer(source, "tokenizer").model_max_length)
    encoder = ClipEncoder(
        _load(CLIPTextModelWithProjection, source, name, dtype, device),
        load_tokenizer(source, TOKENIZER_OF[name]),
        length,
    )
    try:
        yield encoder
    finally:
        encoder.model.to("meta")  # whoever still holds the encoder holds no weights
        free_memory(device)


@contextmanager
def t5_encoder(source: ModelSource, length: int, dtype: torch.dtype, device: torch.device) -> Iterator[T5Encoder]:
    """Loads T5 ('text_encoder_3'), and drops it on the way out. Errors as `clip_encoder`."""
    from transformers import T5EncoderModel

    encoder = T5Encoder(
        _load(T5EncoderModel, source, "text_encoder_3", dtype, device), load_tokenizer(source, "tokenizer_3"), length
    )
    try:
        yield encoder
    finally:
        encoder.model.to("meta")
        free_memory(device)


def load_tokenizer(source: ModelSource, name: str) -> Any:
    """A tokenizer, of the class that the model's index names for it.

    Raises:
        ConfigError: the index names something else than a CLIP or T5 tokenizer.
    """
    import transformers

    kind = source.class_name(name)
    if kind not in _TOKENIZER_CLASSES:
        raise ConfigError(
            f"model.pretrained_model_name_or_path: the {name} of {source.name} is a {kind}; Stable Diffusion 3 has "
            f"CLIP and T5 tokenizers"
        )
    return getattr(transformers, kind).from_pretrained(source.folder([name]), subfolder=name, local_files_only=True)


def _load(kind: Any, source: ModelSource, name: str, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would draw over the stage's own
    model = kind.from_pretrained(
        source.folder([name]),
        subfolder=name,
        dtype=dtype,
        use_safetensors=True,
        variant=source.variant(name),
        local_files_only=True,
    )
    return model.requires_grad_(False).eval().to(device)


class _Tokens(NamedTuple):
    ids_BL: torch.Tensor
    counts: list[int]
    cut: list[bool]


def _tokenize(tokenizer: Any, captions: list[str], length: int) -> _Tokens:
    """Token ids of captions, each padded or cut to `length`; how many of them are real; which captions were cut."""
    padded = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    counts = padded.attention_mask.sum(dim=1).tolist()
    cut = [False] * len(captions)
    full = [index for index, count in enumerate(counts) if count == length]
    if full:  # only these can have been cut: how long are they really?
        # verbose=False: the tokenizer would warn of every long caption; the stage counts them and warns once.
        whole = tokenizer([captions[index] for index in full], truncation=False, verbose=False).input_ids
        for index, ids in zip(full, whole, strict=True):
            cut[index] = len(ids) > length
    return _Tokens(padded.input_ids, counts, cut)
