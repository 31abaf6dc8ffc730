"""The stage `embeds` against `StableDiffusion3Pipeline.encode_prompt`, and what is encoded when."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load, load_file, save_file

from stages.config import Config
from stages.core.artifact import KEYS, Manifest
from stages.core.errors import InputError
from stages.core.events import Message
from stages.core.fingerprint import digest_bytes
from stages.core.shard import MappedShard
from stages.core.stage import Setting
from stages.core.store import Store
from stages.embeds import captions as captions_module
from stages.embeds import encoding
from stages.embeds.stage import EmbedsStage
from stages.models import text
from tests.models.material import download_manifest, make_config, raw_shard, run

LONG = "a red circle and a blue square and a green triangle on a yellow ground with a small white star " * 4
CAPTIONS = ["a red circle on a blue ground", "a green square", LONG, "Größe 7, ein Kreis ✨", "a green square"]
PROMPTS = ["a red circle", "a blue square on a grey ground"]
NEGATIVE = "blurry"
LENGTH = 24


@pytest.fixture
def config(tmp_path: Path, tiny_sd3: Path) -> Config:
    return make_config(
        tmp_path,
        tiny_sd3,
        embeds={"t5_length": LENGTH, "dtype": "fp32", "batch_size": 3, "device": "cpu"},
        validation={"prompts": PROMPTS, "negative_prompt": NEGATIVE},
    )


@pytest.fixture
def downloaded(config: Config, tmp_path: Path) -> Manifest:
    store = Store(config.store)
    return download_manifest(
        [raw_shard(store, tmp_path, "one", CAPTIONS[:3]), raw_shard(store, tmp_path, "two", CAPTIONS[3:])]
    )


@pytest.fixture(scope="module")
def pipeline(tiny_sd3: Path) -> Any:
    return StableDiffusion3Pipeline.from_pretrained(tiny_sd3, torch_dtype=torch.float32)


def embed(config: Config, *downloads: Manifest) -> Manifest:
    return run(EmbedsStage(), config, {("download", manifest.dataset): manifest for manifest in downloads})[0]


def with_embeds(config: Config, **values: Any) -> Config:
    return config.model_copy(update={"embeds": config.embeds.model_copy(update=values)})


def read(config: Config, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """All embeddings by caption, read by plain webdataset and plain safetensors."""
    store = Store(config.store)
    found = {}
    for shard in manifest.shards:
        for sample in webdataset.WebDataset(str(store.fetch(shard)), shardshuffle=False, empty_check=False):
            record = json.loads(sample["json"])
            assert sample["__key__"] == digest_bytes(record["caption"].encode())
            assert record["caption"] not in found
            found[record["caption"]] = {**load(sample["safetensors"]), "t5_tokens": record["t5_tokens"]}
    return found


def as_pipeline(entry: dict[str, Any], width: int) -> torch.Tensor:
    """Stored tensors put together as the transformer takes them: CLIP padded to T5's width, then T5 after it."""
    clip_LD = torch.nn.functional.pad(entry["clip"], (0, width - entry["clip"].shape[-1]))
    return torch.cat([clip_LD, entry["t5"]])


class Counter:
    """Counts the captions that go through each encoder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clip: list[str] = []
        self.t5: list[str] = []
        for kind, log in ((text.ClipEncoder, self.clip), (text.T5Encoder, self.t5)):
            monkeypatch.setattr(kind, "encode", self._counted(kind.encode, log))

    @staticmethod
    def _counted(real: Any, log: list[str]) -> Any:
        def encode(encoder: Any, captions: list[str]) -> Any:
            log.extend(captions)
            return real(encoder, captions)

        return encode


@pytest.mark.parametrize("length", [LENGTH, 77])
def test_embeddings_are_those_of_encode_prompt(
    config: Config, downloaded: Manifest, pipeline: Any, length: int
) -> None:
    found = read(config, embed(with_embeds(config, t5_length=length), downloaded))
    assert set(found) == {*CAPTIONS, *PROMPTS, NEGATIVE, ""}
    for caption, entry in found.items():
        with torch.no_grad():
            embeds_BLD, _, pooled_BD, _ = pipeline.encode_prompt(
                caption, None, None, do_classifier_free_guidance=False, max_sequence_length=length
            )
        got_LD = as_pipeline(entry, embeds_BLD.shape[-1])
        torch.testing.assert_close(got_LD, embeds_BLD[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(entry["pooled"], pooled_BD[0], rtol=0, atol=1e-6)
        assert got_LD.std() > 0.01


def test_the_negative_branch_of_encode_prompt_is_the_negative_prompts_entry(
    config: Config, downloaded: Manifest, pipeline: Any
) -> None:
    entry = read(config, embed(config, downloaded))[NEGATIVE]
    with torch.no_grad():
        _, negative_BLD, _, pooled_BD = pipeline.encode_prompt(
            PROMPTS[0], None, None, negative_prompt=NEGATIVE, max_sequence_length=LENGTH
        )
    torch.testing.assert_close(as_pipeline(entry, negative_BLD.shape[-1]), negative_BLD[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(entry["pooled"], pooled_BD[0], rtol=0, atol=1e-6)


def test_each_shard_lists_its_captions_beside_it(config: Config, downloaded: Manifest) -> None:
    manifest, store = embed(config, downloaded), Store(config.store)
    for shard in manifest.shards:
        assert store.read_blob(shard.sidecars[KEYS]).decode().split() == MappedShard(store.fetch(shard)).keys
    assert sum(len(store.keys(shard)) for shard in manifest.shards) == manifest.counts["captions"]


def test_zero_padding_stores_only_real_tokens(config: Config, downloaded: Manifest, pipeline: Any) -> None:
    kept = read(config, embed(config, downloaded))
    zeroed = read(config, embed(with_embeds(config, t5_padding="zero"), downloaded))
    for caption, entry in zeroed.items():
        tokens = pipeline.tokenizer_3(
            caption, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
        )
        real = int(tokens.attention_mask.sum())
        assert entry["t5_tokens"] == real == len(entry["t5"])
        assert torch.equal(entry["t5"], kept[caption]["t5"][:real])
        assert len(kept[caption]["t5"]) == LENGTH
    assert zeroed[""]["t5_tokens"] < zeroed[LONG]["t5_tokens"] == LENGTH


def test_bf16_is_stored_as_bf16(config: Config, downloaded: Manifest) -> None:
    exact = read(config, embed(config, downloaded))
    rounded = read(config, embed(with_embeds(config, dtype="bf16"), downloaded))
    for caption, entry in rounded.items():
        for name in ("clip", "t5", "pooled"):
            assert entry[name].dtype == torch.bfloat16
            assert (entry[name].float() - exact[caption][name]).abs().max() < 0.1 * exact[caption][name].abs().max()


def test_captions_that_are_cut_are_counted_and_warned_of(config: Config, downloaded: Manifest, pipeline: Any) -> None:
    manifest, recorder = run(EmbedsStage(), config, {("download", "pictures"): downloaded})
    longer = {
        caption
        for caption in {*CAPTIONS, *PROMPTS, NEGATIVE, ""}
        if len(pipeline.tokenizer(caption).input_ids) > pipeline.tokenizer.model_max_length
        or len(pipeline.tokenizer_2(caption).input_ids) > pipeline.tokenizer.model_max_length
    }
    assert LONG in longer
    assert manifest.info["truncated_clip"] == len(longer)
    by_t5 = sum(
        len(pipeline.tokenizer_3(caption).input_ids) > LENGTH for caption in {*CAPTIONS, *PROMPTS, NEGATIVE, ""}
    )
    assert manifest.info["truncated_t5"] == by_t5 > 0
    assert (manifest.info["captions"], manifest.info["distinct"], manifest.info["t5_length"]) == (5, 8, LENGTH)
    warnings = [event.text for event in recorder.events if isinstance(event, Message) and event.level == "warning"]
    assert any(f"{by_t5} of 8 captions are longer than embeds.t5_length {LENGTH}" in text for text in warnings)


def test_a_caption_is_encoded_once_and_a_new_one_alone(
    config: Config, downloaded: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = Counter(monkeypatch)
    first = embed(config, downloaded)
    assert sorted(count.t5) == sorted({*CAPTIONS, *PROMPTS, NEGATIVE, ""})
    assert sorted(count.clip) == sorted(2 * list({*CAPTIONS, *PROMPTS, NEGATIVE, ""}))
    count.clip.clear()
    count.t5.clear()
    fresh = raw_shard(Store(config.store), tmp_path, "three", ["a purple ring", "a green square"])
    second = embed(config, download_manifest([*downloaded.shards, fresh]))
    assert count.t5 == ["a purple ring"]
    assert count.clip == ["a purple ring"] * 2
    assert [shard.sha256 for shard in second.shards[: len(first.shards)]] == [shard.sha256 for shard in first.shards]


def test_a_second_run_loads_no_model(
    config: Config, downloaded: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = embed(config, downloaded)
    for name in ("clip_encoder", "t5_encoder"):
        monkeypatch.setattr(encoding, name, lambda *_: pytest.fail("an encoder was loaded for nothing"))
    assert embed(config, downloaded).digest() == first.digest()
    # Another image with a known caption: another artifact with the same content.
    double = raw_shard(Store(config.store), tmp_path, "three", ["a green square"])
    again = embed(config, download_manifest([*downloaded.shards, double]))
    assert again.fingerprint != first.fingerprint
    assert again.digest() == first.digest()


def test_other_prompts_make_another_artifact_but_leave_the_captions(
    config: Config, downloaded: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = embed(config, downloaded)
    count = Counter(monkeypatch)
    validation = config.validation.model_copy(update={"prompts": ["a star"]})
    second = embed(config.model_copy(update={"validation": validation}), downloaded)
    assert second.fingerprint != first.fingerprint
    assert sorted(count.t5) == ["", "a star", NEGATIVE]


def test_one_changed_caption_touches_only_its_own_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captions_module, "UNIT_CAPTIONS", 4)
    many = [f"number {number} of many" for number in range(60)]
    store = Store(config.store)
    first = embed(config, download_manifest([raw_shard(store, tmp_path, "many", many)]))
    assert len(first.shards) > 6
    count = Counter(monkeypatch)
    many[17] = "the changed one"
    second = embed(config, download_manifest([raw_shard(store, tmp_path, "many", many)]))
    assert "the changed one" in count.t5
    kept = {shard.sha256 for shard in first.shards} & {shard.sha256 for shard in second.shards}
    assert len(kept) >= len(first.shards) - 2
    assert len(count.t5) == sum(shard.samples for shard in second.shards if shard.sha256 not in kept)
    assert set(read(config, second)) == {*many, *PROMPTS, NEGATIVE, ""}


def test_many_groups_give_the_same_as_one(
    config: Config, downloaded: Manifest, tmp_path: Path, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = embed(config, downloaded)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    other = config.model_copy(update={"store": make_config(elsewhere, tiny_sd3).store})
    store = Store(other.store)
    shards = [raw_shard(store, elsewhere, "one", CAPTIONS[:3]), raw_shard(store, elsewhere, "two", CAPTIONS[3:])]
    real = encoding.groups
    sizes: list[int] = []

    def small(units: Any) -> Any:
        for group in real(units, 3):
            sizes.append(len(group))
            yield group

    monkeypatch.setattr("stages.embeds.stage.groups", small)
    assert embed(other, download_manifest(shards)).digest() == once.digest()
    assert len(sizes) > 1


def test_only_one_encoder_is_in_memory_and_no_results_stay(
    config: Config, downloaded: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc

    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    alive: list[int] = []
    real = text._load

    def watched(*arguments: Any) -> Any:
        gc.collect()
        kinds = (CLIPTextModelWithProjection, T5EncoderModel)
        models = [thing for thing in gc.get_objects() if isinstance(thing, kinds)]
        held = [model for model in models if any(weight.device.type != "meta" for weight in model.parameters())]
        alive.append(len(held))
        return real(*arguments)

    before = sum(isinstance(thing, (CLIPTextModelWithProjection, T5EncoderModel)) for thing in gc.get_objects())
    monkeypatch.setattr(text, "_load", watched)
    embed(config, downloaded)
    assert alive == [alive[0]] * 3
    assert alive[0] <= before


def test_each_encoder_and_tokenizer_is_in_the_fingerprint(config: Config, tmp_path: Path, tiny_sd3: Path) -> None:
    stage = EmbedsStage()

    def spec(of: Config) -> dict[str, Any]:
        return stage.spec(Setting(of, Store(of.store)))

    model = tmp_path / "model"
    shutil.copytree(tiny_sd3, model)
    changed = config.model_copy(update={"model": make_config(tmp_path, model).model})
    assert spec(changed) == spec(config)
    weights = load_file(model / "text_encoder_2" / "model.safetensors")
    name = sorted(weights)[0]
    weights[name] = weights[name] + 0.5
    save_file(weights, model / "text_encoder_2" / "model.safetensors", metadata={"format": "pt"})
    with (model / "tokenizer_3" / "tokenizer.json").open("a") as file:
        file.write("\n")
    was, now = spec(config)["encoders"], spec(changed)["encoders"]
    assert {part for part in now if now[part] != was[part]} == {"text_encoder_2", "tokenizer_3"}
    assert spec(with_embeds(config, batch_size=1, device="auto")) == spec(config)
    for field, value in (("t5_length", 77), ("t5_padding", "zero"), ("dtype", "bf16")):
        assert spec(with_embeds(config, **{field: value})) != spec(config)


def test_two_data_sets_share_their_captions(config: Config, tmp_path: Path) -> None:
    store = Store(config.store)
    left = download_manifest([raw_shard(store, tmp_path, "left", ["a ring", "a star"])], "left")
    right = download_manifest([raw_shard(store, tmp_path, "right", ["a star", "a cross"])], "right")
    manifest = embed(config, left, right)
    assert set(read(config, manifest)) == {"a ring", "a star", "a cross", *PROMPTS, NEGATIVE, ""}
    assert manifest.info["captions"] == 4


def test_a_raw_shard_without_captions_says_what_to_do(config: Config, downloaded: Manifest) -> None:
    bare = download_manifest(downloaded.shards).model_copy(
        update={"shards": [shard.model_copy(update={"sidecars": {}}) for shard in downloaded.shards]}
    )
    with pytest.raises(InputError, match="raw shard one of pictures lists no captions: run download with --force"):
        embed(config, bare)
