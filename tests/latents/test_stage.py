"""The stage `latents` against diffusers' own VAE code, and what it does when things go wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import load, load_file, save_file

from stages.config import Config
from stages.core.artifact import KEYS, Manifest
from stages.core.errors import ConfigError, InputError
from stages.core.events import Message
from stages.core.shard import MappedShard
from stages.core.stage import Inputs, Setting
from stages.core.store import Store
from stages.latents import stage as latents_stage
from stages.latents.stage import LatentsStage
from tests.models.material import bucket_manifest, cropped_shard, make_config, pixels, run

SIZES = {"wide": (96, 64), "square": (64, 64)}
SEEDS = {"wide": [1, 2, 3, 4, 5], "square": [6, 7, 8]}


@pytest.fixture
def config(tmp_path: Path, tiny_sd3: Path) -> Config:
    return make_config(tmp_path, tiny_sd3, latents={"batch_size": 2, "device": "cpu"})


@pytest.fixture
def cropped(config: Config, tmp_path: Path) -> Manifest:
    store = Store(config.store)
    return bucket_manifest(
        [cropped_shard(store, tmp_path, name, SEEDS[name], *SIZES[name]) for name in ("wide", "square")]
    )


@pytest.fixture
def vae(tiny_sd3: Path) -> Any:
    return AutoencoderKL.from_pretrained(tiny_sd3 / "vae", torch_dtype=torch.float32).eval()


def encode(config: Config, cropped: Manifest) -> Manifest:
    return run(LatentsStage(), config, {("bucket", "pictures"): cropped})[0]


def with_latents(config: Config, **values: Any) -> Config:
    return config.model_copy(update={"latents": config.latents.model_copy(update=values)})


def read(config: Config, manifest: Manifest) -> dict[str, torch.Tensor]:
    """All latents by key, read by plain webdataset and plain safetensors."""
    store = Store(config.store)
    found = {}
    for shard in manifest.shards:
        for sample in webdataset.WebDataset(str(store.fetch(shard)), shardshuffle=False, empty_check=False):
            found[sample["__key__"]] = load(sample["safetensors"])["latents"]
    return found


def reference(vae: Any, seeds: Sequence[int], size: tuple[int, int], batch: int) -> torch.Tensor:
    """diffusers' own way from pictures to the latents that its training scripts feed to the transformer."""
    pictures = [Image.fromarray(pixels(seed, *size)) for seed in seeds]
    # In PyTorch's usual memory layout: in another one the same convolutions round their last bits differently.
    pixels_BCHW = VaeImageProcessor(vae_scale_factor=8).preprocess(pictures).contiguous()
    with torch.no_grad():
        z_BCHW = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels_BCHW.split(batch)])
    return (z_BCHW - vae.config.shift_factor) * vae.config.scaling_factor


def test_latents_are_what_diffusers_encodes(config: Config, cropped: Manifest, vae: Any) -> None:
    found = read(config, encode(config, cropped))
    for name, seeds in SEEDS.items():
        wanted_BCHW = reference(vae, seeds, SIZES[name], batch=2)
        got_BCHW = torch.stack([found[f"sample-{seed:04}"] for seed in seeds])
        assert got_BCHW.dtype == torch.float32
        assert torch.equal(got_BCHW, wanted_BCHW)
        assert got_BCHW.std() > 0.01


def test_each_shard_lists_its_keys_beside_it(config: Config, cropped: Manifest) -> None:
    manifest, store = encode(config, cropped), Store(config.store)
    for shard in manifest.shards:
        assert store.read_blob(shard.sidecars[KEYS]).decode().split() == MappedShard(store.fetch(shard)).keys
        assert store.keys(shard) == store.keys(shard.model_copy(update={"sidecars": {}}))
    bare = [shard.model_copy(update={"sidecars": {}}) for shard in manifest.shards]
    assert manifest.model_copy(update={"shards": bare}).digest() == manifest.digest(), "a list is no content"


def test_scaling_and_shift_come_from_the_vaes_own_config(tmp_path: Path, tiny_sd3: Path, cropped: Manifest) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_sd3, model)
    path = model / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 1.5305, "shift_factor": 0.0609}))
    config = make_config(tmp_path, model, latents={"batch_size": 2, "device": "cpu"})
    manifest = encode(config, cropped)
    vae = AutoencoderKL.from_pretrained(model / "vae").eval()
    wanted_BCHW = reference(vae, SEEDS["square"], SIZES["square"], batch=2)
    got_BCHW = torch.stack([read(config, manifest)[f"sample-{seed:04}"] for seed in SEEDS["square"]])
    assert torch.equal(got_BCHW, wanted_BCHW)
    assert (manifest.spec["scaling_factor"], manifest.spec["shift_factor"]) == (1.5305, 0.0609)


def test_keys_order_buckets_and_geometry_are_those_of_the_crops(config: Config, cropped: Manifest) -> None:
    manifest = encode(config, cropped)
    store = Store(config.store)
    assert [shard.bucket for shard in manifest.shards] == [(96, 64), (64, 64)]
    assert manifest.counts == {"images": 8}
    for before, after in zip(cropped.shards, manifest.shards, strict=True):
        was = list(webdataset.WebDataset(str(store.fetch(before)), shardshuffle=False, empty_check=False))
        now = list(webdataset.WebDataset(str(store.fetch(after)), shardshuffle=False, empty_check=False))
        assert [sample["__key__"] for sample in now] == [sample["__key__"] for sample in was]
        assert [sample["json"] for sample in now] == [sample["json"] for sample in was]
        latents_CHW = load(now[0]["safetensors"])["latents"]
        assert tuple(latents_CHW.shape) == (16, before.bucket[1] // 8, before.bucket[0] // 8)


def test_bf16_is_close_to_fp32_and_stored_as_bf16(config: Config, cropped: Manifest, vae: Any) -> None:
    found = read(config, encode(with_latents(config, dtype="bf16"), cropped))
    wanted_BCHW = reference(vae, SEEDS["square"], SIZES["square"], batch=2)
    got_BCHW = torch.stack([found[f"sample-{seed:04}"] for seed in SEEDS["square"]])
    assert got_BCHW.dtype == torch.bfloat16
    assert (got_BCHW.float() - wanted_BCHW).abs().max() < 0.05 * wanted_BCHW.abs().max()


def test_a_draw_is_the_mode_plus_noise_of_the_pictures_own_digest(config: Config, cropped: Manifest, vae: Any) -> None:
    sampled = read(config, encode(with_latents(config, posterior="sample"), cropped))
    shard = next(shard for shard in cropped.shards if shard.name == "square")
    store = Store(config.store)
    for sample in webdataset.WebDataset(str(store.fetch(shard)), shardshuffle=False, empty_check=False):
        seed = int(json.loads(sample["json"])["image_sha256"][:16], 16) >> 1
        noise_CHW = torch.randn((16, 8, 8), generator=torch.Generator("cpu").manual_seed(seed))
        number = int(sample["__key__"][-4:])
        picture = VaeImageProcessor(vae_scale_factor=8).preprocess(Image.fromarray(pixels(number, 64, 64)))
        with torch.no_grad():
            posterior = vae.encode(picture).latent_dist
        z_CHW = posterior.mean[0] + posterior.std[0] * noise_CHW
        wanted_CHW = (z_CHW - vae.config.shift_factor) * vae.config.scaling_factor
        torch.testing.assert_close(sampled[sample["__key__"]], wanted_CHW, rtol=1e-4, atol=1e-4)


def test_the_same_pictures_give_the_same_digests_in_another_store(
    config: Config, cropped: Manifest, tmp_path: Path, tiny_sd3: Path
) -> None:
    first = encode(config, cropped)
    elsewhere = make_config(tmp_path / "other", tiny_sd3, latents={"batch_size": 2, "device": "cpu"})
    (tmp_path / "other").mkdir()
    store = Store(elsewhere.store)
    again = bucket_manifest(
        [cropped_shard(store, tmp_path / "other", name, SEEDS[name], *SIZES[name]) for name in ("wide", "square")]
    )
    assert encode(elsewhere, again).digest() == first.digest()


def test_what_is_done_is_not_done_again(
    config: Config, cropped: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(config, cropped)
    store = Store(config.store)
    grown = bucket_manifest([*cropped.shards, cropped_shard(store, tmp_path, "tall", [9], 64, 96)])
    encoded: list[int] = []
    real = latents_stage.encode

    def counted(vae: Any, pixels_BCHW: torch.Tensor, *rest: Any) -> torch.Tensor:
        encoded.append(len(pixels_BCHW))
        return real(vae, pixels_BCHW, *rest)

    monkeypatch.setattr(latents_stage, "encode", counted)
    second = encode(config, grown)
    assert sum(encoded) == 1
    assert [shard.sha256 for shard in second.shards[:2]] == [shard.sha256 for shard in first.shards]
    monkeypatch.setattr(latents_stage, "load_vae", lambda *_: pytest.fail("the VAE was loaded for nothing"))
    fewer = encode(config, bucket_manifest(grown.shards[1:]))  # another artifact, made of memos alone
    assert [shard.sha256 for shard in fewer.shards] == [shard.sha256 for shard in second.shards[1:]]


def test_the_vae_is_in_the_fingerprint_and_what_does_not_matter_is_not(
    config: Config, tmp_path: Path, tiny_sd3: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_sd3, model)
    stage = LatentsStage()

    def spec(of: Config) -> dict[str, Any]:
        return stage.spec(Setting(of, Store(of.store), of.datasets[0]))

    copied = make_config(tmp_path, model, latents={"batch_size": 7, "device": "auto"})
    assert spec(copied) == spec(config)
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name] = weights[name] + 0.5
    save_file(weights, path)
    changed = spec(copied)
    assert changed["vae"]["weights"] != spec(config)["vae"]["weights"]
    assert changed["vae"]["config"] == spec(config)["vae"]["config"]


class _SmallMemory:
    """A VAE on a device that takes no more than so many pictures at once."""

    def __init__(self, vae: Any, most: int) -> None:
        self.vae, self.most, self.sizes = vae, most, []
        self.config = vae.config

    def encode(self, pixels_BCHW: torch.Tensor) -> Any:
        self.sizes.append(len(pixels_BCHW))
        if len(pixels_BCHW) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return self.vae.encode(pixels_BCHW)


def test_too_little_memory_halves_the_batch_and_goes_on(
    config: Config, cropped: Manifest, vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = _SmallMemory(vae, most=2)
    monkeypatch.setattr(latents_stage, "load_vae", lambda *_: small)
    manifest, recorder = run(LatentsStage(), with_latents(config, batch_size=5), {("bucket", "pictures"): cropped})
    assert small.sizes == [5, 2, 2, 1, 2, 1]  # tried once too large, and never again
    warnings = [event.text for event in recorder.events if isinstance(event, Message) and event.level == "warning"]
    assert len(warnings) == 1
    assert "batch of 5: going on with 2" in warnings[0]
    found = read(config, manifest)
    for name, seeds in SEEDS.items():
        wanted_BCHW = reference(vae, seeds, SIZES[name], batch=2)
        got_BCHW = torch.stack([found[f"sample-{seed:04}"] for seed in seeds])
        torch.testing.assert_close(got_BCHW, wanted_BCHW, rtol=1e-4, atol=1e-5)


def test_a_shard_that_fails_does_not_take_the_one_before_it_along(
    config: Config, cropped: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = latents_stage.encode
    sizes: list[tuple[int, ...]] = []

    def breaks_at_squares(vae: Any, pixels_BCHW: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(tuple(pixels_BCHW.shape[2:]))
        if pixels_BCHW.shape[2] == pixels_BCHW.shape[3]:
            raise OSError("the power went out")
        return real(vae, pixels_BCHW, *rest)

    monkeypatch.setattr(latents_stage, "encode", breaks_at_squares)
    with pytest.raises(OSError, match="power"):
        encode(config, cropped)
    sizes.clear()
    monkeypatch.setattr(latents_stage, "encode", lambda *all: (sizes.append(tuple(all[1].shape[2:])), real(*all))[1])
    assert encode(config, cropped).counts == {"images": 8}
    assert set(sizes) == {(64, 64)}  # the other shard was remembered


def test_no_memory_for_one_picture_says_what_to_change(
    config: Config, cropped: Manifest, vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents_stage, "load_vae", lambda *_: _SmallMemory(vae, most=0))
    with pytest.raises(ConfigError, match=r"latents\.dtype: bf16, a smaller bucket\.resolution"):
        encode(config, cropped)


def test_latents_that_are_no_numbers_name_the_sample(
    config: Config, cropped: Manifest, vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = latents_stage.encode

    def broken(vae: Any, pixels_BCHW: torch.Tensor, posterior: Any, seeds: Sequence[int]) -> torch.Tensor:
        latents_BCHW = real(vae, pixels_BCHW, posterior, seeds)
        if len(latents_BCHW) == 2:
            latents_BCHW[1, 3, 2, 2] = float("nan")
        return latents_BCHW

    monkeypatch.setattr(latents_stage, "encode", broken)
    with pytest.raises(InputError, match=r"sample-0002 .*shard wide"):
        encode(config, cropped)


def test_crops_that_do_not_divide_are_found_before_anything_is_encoded(config: Config, tmp_path: Path) -> None:
    store = Store(config.store)
    crops = bucket_manifest([cropped_shard(store, tmp_path, "odd", [1], 60, 64)])
    setting = Setting(config, store, config.datasets[0])
    with pytest.raises(InputError, match="60x64 pixels do not divide by the VAE's 8"):
        LatentsStage().foresee(setting, Inputs({("bucket", "pictures"): crops}))


def test_a_picture_of_another_size_is_refused_by_name(config: Config, tmp_path: Path) -> None:
    store = Store(config.store)
    shard = cropped_shard(store, tmp_path, "lying", [1], 64, 64).model_copy(update={"bucket": (64, 72)})
    with pytest.raises(InputError, match="sample-0001 of cropped shard lying"):
        encode(config, bucket_manifest([shard]))
