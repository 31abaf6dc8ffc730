"""Quantised linear layers against optimum-quanto's own, and what loading holds in memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from optimum.quanto import QLinear, freeze, quantize
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from stages.core.errors import ConfigError, InputError
from stages.core.store import Store, StoreSection
from stages.models import transformer as loading
from stages.models.config import ModelSection
from stages.models.quantise import LEVELS, FrozenQuantoLinear, dequantised, group_size, tensor_bytes
from stages.models.source import ModelSource
from stages.models.transformer import add_lora, empty_transformer, load_transformer, lora_layers

CPU = torch.device("cpu")
QUANTO = {"int8-quanto": "qint8", "fp8-quanto": "qfloat8", "int4-quanto": "qint4", "int2-quanto": "qint2"}
CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "num_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": 96,
    "caption_projection_dim": 192,
    "pooled_projection_dim": 48,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer in the diffusers layout, its weights in several safetensors files."""
    path = tmp_path_factory.mktemp("sd3")
    torch.manual_seed(0)
    SD3Transformer2DModel(**CONFIG).save_pretrained(path / "transformer", max_shard_size="2MB")
    (path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    assert len(list((path / "transformer").glob("*.safetensors"))) > 2
    return path


def source_of(folder: Path, tmp_path: Path) -> ModelSource:
    store = Store(StoreSection(url=f"file://{tmp_path}/store", cache_dir=f"{tmp_path}/cache"))
    return ModelSource(ModelSection(pretrained_model_name_or_path=str(folder)), store)


@pytest.fixture(autouse=True)
def _no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quanto's compiled extension must never be asked for: its lock file outlives a process that is killed."""
    from optimum.quanto.library.extensions.extension import Extension

    def refuse(self: Extension) -> None:
        raise AssertionError(f"{self.name} would be compiled")

    monkeypatch.setattr(Extension, "lib", property(refuse))


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(2, 16, 8, 12, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 96, generator=generator),
        "pooled_projections": torch.randn(2, 48, generator=generator),
        "timestep": torch.tensor([12.5, 700.25]),
    }


# -- one layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", QUANTO)
@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (40, 384), (7, 160), (5, 33)])
def test_weight_is_quantos(level: str, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows)
    theirs = QLinear.from_module(linear, weights=QUANTO[level].replace("qfloat8", "qfloat8_e4m3fn"))
    theirs.freeze()
    if level in ("int4-quanto", "int2-quanto"):
        unpacked = _unpacked_by_definition(theirs.weight)
        expected = (unpacked * theirs.weight._scale - theirs.weight._shift).reshape(rows, columns)
    else:
        expected = theirs.weight.dequantize()
    ours = FrozenQuantoLinear(linear, QUANTO[level])
    torch.testing.assert_close(dequantised(ours.weight), expected, rtol=0, atol=0)
    assert (dequantised(ours.weight) - linear.weight).abs().max() < {8: 0.02, 4: 0.1, 2: 0.3}[LEVELS[level].bits]


def _unpacked_by_definition(weight: Any) -> torch.Tensor:
    """Value i of n: bits of byte (i mod m) from position (i div m) * bits on, with m the number of packed rows."""
    packed, bits = weight._data._data, weight._data.bits
    rows = [
        (packed[row % len(packed)].int() // 2 ** (row // len(packed) * bits)) % 2**bits
        for row in range(weight._data.shape[0])
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("inputs_", [33, 96, 128, 160, 384, 1536, 2432, 9728])
def test_group_size_is_quantos(inputs_: int) -> None:
    theirs = QLinear(inputs_, 4, weights="qint4", device="meta")
    assert group_size(inputs_) == theirs.weight_group_size


@pytest.mark.parametrize("level", QUANTO)
def test_gradient_is_that_of_the_dequantised_weight(level: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(160, 24)
    ours = FrozenQuantoLinear(linear, QUANTO[level])
    x = torch.randn(2, 5, 160, requires_grad=True)
    y = torch.randn(2, 5, 24)
    product = ours(x)
    (gradient,) = torch.autograd.grad(product, x, y)
    expected = F.linear(x, dequantised(ours.weight), linear.bias)
    (expected_gradient,) = torch.autograd.grad(expected, x, y)
    torch.testing.assert_close(product, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert not ours.weight.requires_grad
    assert ours.bias is not None
    assert not ours.bias.requires_grad


@contextmanager
def saved_bytes(found: list[int]) -> Iterator[None]:
    """Notes the bytes of every tensor that autograd keeps for the backward pass."""

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def test_a_frozen_layer_keeps_nothing_for_the_backward_pass() -> None:
    linear = nn.Linear(64, 64)
    ours, theirs = FrozenQuantoLinear(nn.Linear(64, 64), "qint8"), QLinear.from_module(linear, weights="qint8")
    theirs.freeze()
    theirs.requires_grad_(False)
    kept: dict[str, list[int]] = {"ours": [], "theirs": []}
    for name, layer in (("ours", ours), ("theirs", theirs)):
        x = torch.randn(128, 64, requires_grad=True)
        with saved_bytes(kept[name]):
            layer(x * 1.0)
    assert kept["ours"] == []
    assert 128 * 64 * 4 in kept["theirs"], "what this is for: quanto keeps the whole input"


def test_autocast_computes_in_the_weights_type() -> None:
    layer = FrozenQuantoLinear(nn.Linear(32, 8).bfloat16(), "qint8")
    x = torch.randn(3, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


# -- a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unquantised_is_what_diffusers_loads(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    ours, report = load_transformer(source_of(folder, tmp_path), dtype, CPU, "no_change")
    theirs = SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)
    expected = theirs.state_dict()
    assert set(ours.state_dict()) == set(expected)
    for name, value in ours.state_dict().items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name
    assert report.parameters == sum(part.numel() for part in theirs.parameters())
    assert report.bytes == sum(part.numel() * part.element_size() for part in expected.values())
    assert not ours.training
    assert not any(part.requires_grad for part in ours.parameters())


def test_int8_is_quantos_own_model(folder: Path, tmp_path: Path) -> None:
    ours, _ = load_transformer(source_of(folder, tmp_path), torch.float32, CPU, "int8-quanto", ["proj_out"])
    theirs = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    quantize(theirs, weights="qint8", exclude=["proj_out", "pos_embed.proj"])
    freeze(theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs()).sample, theirs(**inputs()).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", ["no_change", *QUANTO])
def test_every_level_trains_the_adapter_alone(folder: Path, tmp_path: Path, level: str, dtype: torch.dtype) -> None:
    model, report = load_transformer(source_of(folder, tmp_path), dtype, CPU, level, ["proj_out", "*.norm1.linear"])
    adapter = add_lora(model, 4, 8.0, 0.0, ["to_q", "add_k_proj", "ff.net.2"], [1], seed=1)
    model.train()
    model.enable_gradient_checkpointing()
    given = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        parts = {name: part if name == "timestep" else part.to(dtype) for name, part in given.items()}
        prediction = model(**parts).sample
    prediction.float().square().mean().backward()
    assert {name for name, part in model.named_parameters() if part.grad is not None} == set(adapter)
    assert all(part.dtype == torch.float32 for part in adapter.values())
    # dual attention has a to_q of its own in block 0
    assert len(adapter) == 2 * (2 + 1 + 1 + 1 + 1 + 1)
    levels = {row.name: row.level for row in report.layers}
    assert levels["proj_out"] == levels["transformer_blocks.2.norm1.linear"] == "no_change"
    assert levels["transformer_blocks.2.norm1_context.linear"] == level
    held = sum(tensor_bytes(part) for part in (*model.parameters(), *model.buffers()))
    assert report.bytes == held - sum(tensor_bytes(part) for part in adapter.values())


def test_fewer_bits_take_fewer_bytes(folder: Path, tmp_path: Path) -> None:
    sizes = [
        load_transformer(source_of(folder, tmp_path), torch.bfloat16, CPU, level, [])[1].bytes
        for level in ("no_change", "int8-quanto", "int4-quanto", "int2-quanto")
    ]
    assert sizes[1] < 0.55 * sizes[0]
    assert sizes[2] < 0.60 * sizes[1]
    assert sizes[3] < 0.70 * sizes[2]


def test_report_counts_the_modulation(folder: Path, tmp_path: Path) -> None:
    _, report = load_transformer(source_of(folder, tmp_path), torch.float32, CPU, "int8-quanto", ["proj_out"])
    table = {row["layers"]: row for row in report.grouped()}
    # norm1 of the two plain blocks makes 6 vectors of 192 from one; that of the dual block makes 9
    assert table["transformer_blocks.*.norm1.linear"]["parameters"] == (6 + 6 + 9) * 192 * 193
    assert table["transformer_blocks.*.norm1.linear"]["count"] == 3
    assert table["proj_out"]["level"] == "no_change"
    assert sum(row["bytes"] for row in table.values()) == report.bytes
    modulation = (6 + 6 + 9) + (6 + 6 + 2) + 2
    assert f"{modulation * 192 * 193 / 1e6:,.1f} M of them are AdaLN modulation" in report.summary()


def test_loading_holds_the_quantised_model_and_one_block(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts the bytes of all live unquantised weights whenever a layer is quantised."""
    live: dict[int, weakref.ref[torch.Tensor]] = {}
    peaks: list[int] = []
    real_fill = loading._Weights.fill

    def fill(self: Any, module: nn.Module, prefix: str, *rest: Any) -> None:
        real_fill(self, module, prefix, *rest)
        for part in module.parameters():
            live[id(part)] = weakref.ref(part)
        gc.collect()
        parts = [part for part in (ref() for ref in live.values()) if part is not None]
        peaks.append(sum(part.numel() * part.element_size() for part in parts if type(part.data) is torch.Tensor))

    monkeypatch.setattr(loading._Weights, "fill", fill)
    model, report = load_transformer(source_of(folder, tmp_path), torch.float32, CPU, "int8-quanto", [])
    plain = SD3Transformer2DModel(**CONFIG)
    block = max(sum(part.numel() for part in item.parameters()) for item in plain.transformer_blocks) * 4
    biases = sum(part.numel() * 4 for name, part in plain.named_parameters() if name.endswith(".bias"))
    rest = report.other_bytes + biases
    assert max(peaks) <= block + rest
    assert max(peaks) < 0.6 * report.parameters * 4
    assert model is not None


def test_weights_of_another_model(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "transformer"
    other.mkdir(parents=True)
    weights: dict[str, torch.Tensor] = {}
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        weights.update(load_file(path))
    (other / "config.json").write_text((folder / "transformer" / "config.json").read_text())
    (other.parent / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    missing = "transformer_blocks.1.attn.to_q.weight"
    save_file(
        {name: part for name, part in weights.items() if name != missing}, other / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(InputError, match=f"lack {missing}"):
        load_transformer(source_of(other.parent, tmp_path), torch.float32, CPU, "no_change")
    save_file({**weights, missing: torch.zeros(2, 2)}, other / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=r"to_q.weight has the shape \(2, 2\) and should have \(192, 192\)"):
        load_transformer(source_of(other.parent, tmp_path), torch.float32, CPU, "no_change")
    (other / "diffusion_pytorch_model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(InputError, match="damaged weights"):
        load_transformer(source_of(other.parent, tmp_path), torch.float32, CPU, "no_change")


# -- names ----------------------------------------------------------------------------------------------------------


def test_names_that_match_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"train.quantize_exclude: 'projout' matches no linear layer; near it are proj_out"
    ):
        load_transformer(source_of(folder, tmp_path), torch.float32, CPU, "int8-quanto", ["projout"])
    with pytest.raises(ConfigError, match=r"train.lora.targets: 'toq' matches no linear layer; near it are attn.to_q"):
        lora_layers(CONFIG, ["to_k", "toq"], [])
    with pytest.raises(ConfigError, match="there is no block 3; this model has 0 to 2"):
        lora_layers(CONFIG, ["to_q"], [3])
    with pytest.raises(ConfigError, match="no block is left"):
        lora_layers(CONFIG, ["to_q"], [0, 1, 2])


def test_adapter_sits_where_the_names_say(folder: Path, tmp_path: Path) -> None:
    model, _ = load_transformer(source_of(folder, tmp_path), torch.float32, CPU, "int8-quanto")
    adapter = add_lora(model, 2, 2.0, 0.0, ["to_q", "to_out.0"], [0], seed=1)
    layers = {name.split(".lora_")[0] for name in adapter}
    assert layers == set(lora_layers(CONFIG, ["to_q", "to_out.0"], [0]))
    assert all(not part.any() for name, part in adapter.items() if "lora_B" in name)
    assert isinstance(model.transformer_blocks[1].attn.to_q.base_layer, FrozenQuantoLinear)


def test_the_empty_model_takes_no_memory() -> None:
    assert all(part.device.type == "meta" for part in empty_transformer(CONFIG).parameters())
