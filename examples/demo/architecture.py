"""The demo model's parts and sizes: a Stable Diffusion 3 pipeline, small enough for a laptop.

Every part is the class that a real SD3.5 repository names, with fewer and narrower layers, and `save` writes the same
folder layout. Nothing that reads the model can tell it from a big one, except by its numbers.

Shape letters: B batch, L text tokens, D features, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from drawing import ADJECTIVES, CONSONANTS, NOUNS, VOWELS, made_up_word, random_picture, training_caption
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from train_autoencoder import start_as_average
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LATENT_CHANNELS = 16
VAE_CHANNELS = (16, 24, 48, 64)
TEXT_TOKENS = 16  # of each CLIP encoder, and of T5
CLIP_WIDTHS = (64, 64)
T5_WIDTH = 160
HEADS, HEAD_WIDTH, BLOCKS = 4, 32, 6
SHIFT = 3.0
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass
class Parts:
    """The nine parts of a pipeline, in training precision (float32)."""

    vae: AutoencoderKL
    transformer: SD3Transformer2DModel
    text_encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel]
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer, T5Tokenizer]
    scheduler: FlowMatchEulerDiscreteScheduler

    def text_modules(self) -> nn.ModuleList:
        """Return the three text encoders as one module."""
        return nn.ModuleList(self.text_encoders)


def caption_corpus(seed: int = 0, count: int = 6000) -> list[str]:
    """Return captions and made-up words for training the tokenizers."""
    rng = np.random.default_rng(seed)
    captions = [training_caption(random_picture(rng, 64, 64), rng) for _ in range(count)]
    captions += [f"a {made_up_word(rng)} {word}" for word in (*ADJECTIVES, *NOUNS) * 20]
    return captions


def byte_pair_merges(corpus: list[str], count: int) -> list[tuple[str, str]]:
    """Return the `count` most useful merges of byte-level BPE with CLIP's end-of-word mark, the best first.

    Ties go to the pair that sorts first, so that the same corpus always gives the same vocabulary (the usual trainers
    leave ties to the order of a hash table).
    """
    words = Counter(word for text in corpus for word in re.findall(r"[a-z]+", text.lower()))
    splits = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in splits.items():
            for pair in pairwise(pieces):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for pieces in splits.values():
            for place in range(len(pieces) - 2, -1, -1):
                if tuple(pieces[place : place + 2]) == best:
                    pieces[place : place + 2] = ["".join(best)]
    return merges


def clip_tokenizer(corpus: list[str], merges: int, pad: str) -> CLIPTokenizer:
    """Make a byte-level BPE with CLIP's rules. Every byte has a token, inside and at the end of a word."""
    pairs = byte_pair_merges(corpus, merges)
    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*byte_tokens, *(f"{token}</w>" for token in byte_tokens), *("".join(pair) for pair in pairs), START, END]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, pad_token=pad, model_max_length=TEXT_TOKENS)


def t5_tokenizer(corpus: list[str], words: int = 120) -> T5Tokenizer:
    """Make a unigram tokenizer with T5's rules: frequent words, syllables, then single letters and signs.

    The scores are plain log frequencies for words, and lower for the smaller pieces, so a caption is cut into as few
    pieces as possible. Every Latin letter and sign is a piece: no word becomes <unk>.
    """
    counts = Counter(word for text in corpus for word in text.replace(",", " ,").split())
    total = sum(counts.values())
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}
    for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:words]:
        pieces["▁" + word if word != "," else word] = math.log(count / total)
    syllables = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
    letters = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0x180), *range(0x2010, 0x2027))]
    for score, group in ((-10.0, syllables), (-12.0, letters)):
        for piece in ("▁" + piece for piece in group if score == -10.0 or piece.isascii()):
            pieces.setdefault(piece, score)
        for piece in group:
            pieces.setdefault(piece, score)
    pieces.setdefault("▁", -12.0)
    return T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=TEXT_TOKENS)


def build(seed: int = 0) -> Parts:
    """Build every part with fresh weights: the same seed gives the same weights."""
    torch.manual_seed(seed)
    corpus = caption_corpus()
    tokenizers = (clip_tokenizer(corpus, 320, END), clip_tokenizer(corpus, 240, "!"), t5_tokenizer(corpus))
    clips: list[CLIPTextModelWithProjection] = []
    for tokenizer, width in zip(tokenizers[:2], CLIP_WIDTHS, strict=True):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            hidden_act="quick_gelu" if not clips else "gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        clip = CLIPTextModelWithProjection(config)
        # The library's 0.02 is meant for widths of a thousand: here it would leave CLIP unheard beside T5.
        for embedding in (m for m in clip.modules() if isinstance(m, nn.Embedding)):
            nn.init.normal_(embedding.weight, std=0.3)
        clips.append(clip)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizers[2]),
            d_model=T5_WIDTH,
            d_kv=32,
            num_heads=4,
            d_ff=2 * T5_WIDTH,
            num_layers=2,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=tokenizers[2].pad_token_id,
            eos_token_id=tokenizers[2].eos_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    start_as_average(vae)
    width = HEADS * HEAD_WIDTH
    transformer = SD3Transformer2DModel(
        sample_size=12,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=BLOCKS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=sum(CLIP_WIDTHS),
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )
    initialise(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)
    return Parts(vae, transformer, (clips[0], clips[1], t5), tokenizers, scheduler)


def initialise(transformer: SD3Transformer2DModel) -> None:
    """Start as diffusion transformers do: Xavier linears, quiet modulation, an output near zero."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            if "norm" in name or name == "proj_out":
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def encode_text(parts: Parts, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Return (features_BLD, pooled_BD) as `StableDiffusion3Pipeline.encode_prompt` computes them, with gradients.

    L is both CLIPs' tokens followed by T5's: 2 * TEXT_TOKENS (CLIPs lie side by side in D, zero-padded to T5's width).
    """
    hidden, pooled = [], []
    for tokenizer, encoder in zip(parts.tokenizers[:2], parts.text_encoders[:2], strict=True):
        out = encoder(token_ids(tokenizer, captions).to(encoder.device), output_hidden_states=True)
        hidden.append(out.hidden_states[-2])
        pooled.append(out.text_embeds)
    clip_BLD = torch.cat(hidden, dim=-1)
    clip_BLD = nn.functional.pad(clip_BLD, (0, T5_WIDTH - clip_BLD.shape[-1]))
    t5_BLD = parts.text_encoders[2](token_ids(parts.tokenizers[2], captions).to(parts.text_encoders[2].device))[0]
    return torch.cat([clip_BLD, t5_BLD], dim=1), torch.cat(pooled, dim=-1)


def token_ids(tokenizer: CLIPTokenizer | T5Tokenizer, captions: list[str]) -> Tensor:
    """Return token numbers (B, TEXT_TOKENS), padded and cut as the pipeline does."""
    batch = tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    ids: Tensor = batch.input_ids
    return ids


def save(parts: Parts, folder: Path) -> int:
    """Write a float16 copy of the pipeline, in diffusers' layout. Returns the bytes written."""
    first, second, third = (copy.deepcopy(encoder) for encoder in parts.text_encoders)
    pipeline = StableDiffusion3Pipeline(
        transformer=copy.deepcopy(parts.transformer),
        scheduler=parts.scheduler,
        vae=copy.deepcopy(parts.vae).to(memory_format=torch.contiguous_format),
        text_encoder=first,
        tokenizer=parts.tokenizers[0],
        text_encoder_2=second,
        tokenizer_2=parts.tokenizers[1],
        text_encoder_3=third,
        tokenizer_3=parts.tokenizers[2],
    ).to("cpu", torch.float16)
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    # Real repositories carry the plain BPE files too.
    for name, tokenizer in (("tokenizer", parts.tokenizers[0]), ("tokenizer_2", parts.tokenizers[1])):
        tokenizer.backend_tokenizer.model.save(str(folder / name))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
