"""Where a model comes from: folders and Hub repositories, their identity, and what is said when something is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from stages.core import hub
from stages.core.errors import ConfigError, TransientError
from stages.core.store import Store, StoreSection
from stages.models.config import ModelSection
from stages.models.source import COMPONENTS, MODELS, TOKENIZERS, ModelSource
from stages.models.vae import load_vae
from tests.servers.hub import HubServer

REPO = "artist/tiny-sd3"
WEIGHTS = r"/resolve/.*safetensors|/storage|/objects"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(StoreSection(url=str(tmp_path / "store"), cache_dir=str(tmp_path / "cache")))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub", user="artist") as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("HF_TOKEN", running.token("read"))
        monkeypatch.setattr(hub, "FIRST_PAUSE_S", 0.0)
        yield running


def source(store: Store, where: Path | str, **fields: Any) -> ModelSource:
    return ModelSource(ModelSection(pretrained_model_name_or_path=str(where), **fields), store)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def minimal(**replaced: bytes | None) -> dict[str, bytes]:
    """A model whose weights are a few bytes each: enough for everything that does not load it."""
    index = {"_class_name": "StableDiffusion3Pipeline", **{name: ["library", "Class"] for name in COMPONENTS}}
    files: dict[str, bytes] = {
        "model_index.json": json.dumps(index).encode(),
        "scheduler/scheduler_config.json": b'{"shift": 3.0}',
    }
    for name in MODELS:
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        files[f"{name}/config.json"] = json.dumps({"_diffusers_version": "0.1", "kind": name}).encode()
        files[f"{name}/{stem}.safetensors"] = save({"weight": torch.full((4,), float(len(files)))})
    for name in TOKENIZERS:
        files[f"{name}/tokenizer_config.json"] = b"{}"
        files[f"{name}/vocab.json"] = json.dumps({"name": name}).encode()
    for path, content in replaced.items():
        if content is None:
            del files[path]
        else:
            files[path] = content
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


# -- identity ---------------------------------------------------------------------------------------------------------


def test_a_folder_and_a_hub_repository_of_the_same_bytes_are_the_same_model(
    store: Store, server: HubServer, tiny_sd3: Path
) -> None:
    server.add_model(REPO, files_of(tiny_sd3))
    local, remote = source(store, tiny_sd3), source(store, REPO)
    remote.check()
    for component in COMPONENTS:
        assert remote.identity(component) == local.identity(component), component
    assert server.count("GET", r"safetensors") == 0  # the plan of a run downloads no weights


def test_identity_follows_weights_and_config_but_not_who_wrote_them(store: Store, tmp_path: Path) -> None:
    model = write(tmp_path / "model", minimal())
    before = source(store, model).identity("vae")
    config = {"kind": "vae", "_diffusers_version": "9.9", "_name_or_path": "elsewhere", "transformers_version": "8"}
    (model / "vae/config.json").write_text(json.dumps(config, indent=4))
    assert source(store, model).identity("vae") == before
    (model / "vae/config.json").write_text(json.dumps({**config, "scaling_factor": 2.0}))
    changed = source(store, model).identity("vae")
    assert changed["config"] != before["config"]
    assert changed["weights"] == before["weights"]
    (model / "vae/diffusion_pytorch_model.safetensors").write_bytes(save({"weight": torch.zeros(5)}))
    assert source(store, model).identity("vae")["weights"] != before["weights"]


def test_a_tokenizers_identity_is_that_of_its_files(store: Store, tmp_path: Path) -> None:
    model = write(tmp_path / "model", minimal())
    before = source(store, model).identity("tokenizer_3")
    assert before != source(store, model).identity("tokenizer_2")
    (model / "tokenizer_3/vocab.json").write_text('{"other": 1}')
    assert source(store, model).identity("tokenizer_3") != before


def test_variants_and_shards_are_told_apart(store: Store, tmp_path: Path) -> None:
    files = minimal()
    plain = files.pop("text_encoder_3/model.safetensors")
    for number in (1, 2):
        files[f"text_encoder_3/model-0000{number}-of-00002.safetensors"] = save({f"w{number}": torch.ones(number)})
        files[f"text_encoder_3/model.fp16-0000{number}-of-00002.safetensors"] = save(
            {f"w{number}": torch.zeros(number)}
        )
    files["text_encoder_3/model.safetensors.index.json"] = b"{}"
    files["text_encoder_3/model.safetensors.index.fp16.json"] = b"{}"
    files["text_encoder/model.fp16.safetensors"] = plain
    model = write(tmp_path / "model", files)
    usual, half = source(store, model), source(store, model, variant="fp16")
    half.check()
    for component in ("text_encoder", "text_encoder_3"):
        assert half.variant(component) == "fp16"
        assert half.identity(component)["weights"] != usual.identity(component)["weights"]
    assert half.variant("vae") is None  # it has no such variant: the plain one is read, as diffusers does
    assert half.identity("vae") == usual.identity("vae")
    before = usual.identity("text_encoder_3")
    (model / "text_encoder_3/model-00002-of-00002.safetensors").write_bytes(save({"w2": torch.full((2,), 7.0)}))
    assert usual.identity("text_encoder_3") != before


# -- the Hub ----------------------------------------------------------------------------------------------------------


def test_only_what_is_asked_for_is_downloaded_and_it_loads(store: Store, server: HubServer, tiny_sd3: Path) -> None:
    server.add_model(
        REPO, {**files_of(tiny_sd3), "vae/diffusion_pytorch_model.bin": b"pickle", "big.safetensors": b"x"}
    )
    remote = source(store, REPO)
    folder = remote.folder(["vae"])
    names = set(files_of(folder))
    assert names == {"model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    vae = load_vae(remote, torch.float32, torch.device("cpu"))
    weights = load_file(tiny_sd3 / "vae" / "diffusion_pytorch_model.safetensors")
    name = "encoder.conv_in.weight"
    assert torch.equal(vae.state_dict()[name], weights[name].float())


def test_a_branch_that_moves_is_read_at_the_commit_it_had_first(store: Store, server: HubServer) -> None:
    commit = server.add_model(REPO, minimal())
    remote = source(store, REPO, revision="main")
    before = remote.identity("vae")
    server.add_model(REPO, {"vae/diffusion_pytorch_model.safetensors": save({"weight": torch.zeros(9)})})
    again = source(store, REPO, revision="main")  # another stage of the same run
    assert again.commit == remote.commit == commit
    assert again.identity("vae") == before
    assert load_file(again.folder(["vae"]) / "vae/diffusion_pytorch_model.safetensors")["weight"].shape == (4,)
    assert server.count("GET", r"^/api/models/") == 1


def test_busy_servers_cut_connections_and_wrong_bytes_are_lived_through(store: Store, server: HubServer) -> None:
    server.add_model(REPO, minimal())
    server.fail("GET", r"^/api/models/", status=503, times=2)
    remote = source(store, REPO)
    remote.check()
    server.fail("GET", r"resolve/.*vae/config", status=500, times=2)
    server.corrupt_download(r"(?i)(diffusion_pytorch_model|storage|objects|lfs)", times=1)
    folder = remote.folder(["vae"])
    files = minimal()
    for name in ("vae/config.json", "vae/diffusion_pytorch_model.safetensors"):
        assert (folder / name).read_bytes() == files[name]
    assert server.count("GET", r"^/objects/") == 2  # the first body had a wrong byte


def test_bytes_that_stay_wrong_are_an_error_and_are_not_kept(store: Store, server: HubServer) -> None:
    server.add_model(REPO, minimal())
    remote = source(store, REPO)
    server.corrupt_download(r"vocab\.json", times=9)
    with pytest.raises(TransientError, match=r"tokenizer/vocab\.json of the Hub repository artist/tiny-sd3"):
        remote.folder(["tokenizer"])
    server.faults.clear()
    assert (remote.folder(["tokenizer"]) / "tokenizer/vocab.json").read_bytes() == minimal()["tokenizer/vocab.json"]


def test_a_hub_that_stays_away_is_worth_another_run(store: Store, server: HubServer) -> None:
    server.add_model(REPO, minimal())
    server.fail("GET", r"^/api/models/", status=503, times=99)
    with pytest.raises(TransientError, match="after 5 attempts"):
        source(store, REPO).check()


def test_a_gated_model_says_how_to_get_it(store: Store, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add_user("stranger")
    server.add_model(REPO, minimal(), gated="manual")
    monkeypatch.setenv("HF_TOKEN", server.token("read", "stranger"))
    words = r"model\.pretrained_model_name_or_path: artist/tiny-sd3 is gated: accept its terms at .*HF_TOKEN"
    with pytest.raises(ConfigError, match=words):
        source(store, REPO).check()
    server.grant(REPO, "stranger")
    source(store, REPO).check()


def test_what_the_hub_does_not_have_is_named(store: Store, server: HubServer) -> None:
    server.add_model(REPO, minimal())
    with pytest.raises(ConfigError, match="no folder artist/none here, and no Hub repository"):
        source(store, "artist/none").check()
    with pytest.raises(ConfigError, match=r"model\.revision: artist/tiny-sd3 has no revision 'v9'"):
        source(store, REPO, revision="v9").check()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 503])
@pytest.mark.parametrize("pattern", ["^/api/models/", r"^/artist/.*config\.json"])
def test_whatever_the_hub_answers_the_field_is_named(
    store: Store, server: HubServer, monkeypatch: pytest.MonkeyPatch, pattern: str, status: int
) -> None:
    monkeypatch.setattr(hub, "ATTEMPTS", 1)
    server.add_model(REPO, minimal())
    server.fail("GET", pattern, status=status, times=99)
    kind = TransientError if status == 503 else ConfigError
    with pytest.raises(kind, match=r"^model\.pretrained_model_name_or_path: .*artist/tiny-sd3"):
        source(store, REPO).identity("vae")


@pytest.mark.parametrize("repo", ["artist/none", "artist/private"])
@pytest.mark.parametrize(("token", "hint"), [("stranger's", "HF_TOKEN may not read it"), ("no", "needs HF_TOKEN")])
def test_a_wrong_name_and_a_private_repository_look_the_same(
    store: Store, server: HubServer, monkeypatch: pytest.MonkeyPatch, repo: str, token: str, hint: str
) -> None:
    server.add_model("artist/private", minimal(), private=True)
    server.add_user("stranger")
    monkeypatch.setenv("HF_TOKEN", server.token("read", "stranger") if token == "stranger's" else "")
    words = rf"^model\.pretrained_model_name_or_path: there is no folder {repo} here.*{hint}"
    with pytest.raises(ConfigError, match=words):
        source(store, repo).check()


def test_nobody_answers(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ATTEMPTS", 1)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    words = (
        r"^model\.pretrained_model_name_or_path: cannot look up .* at http://127\.0\.0\.1:9/artist/tiny-sd3: .*refused"
    )
    with pytest.raises(TransientError, match=words):
        source(store, REPO).check()


def test_a_repository_of_single_files_is_told_apart_from_one_that_lacks_a_part(store: Store, server: HubServer) -> None:
    server.add_model(REPO, {"sd3.5_large.safetensors": b"x"})
    for look in (lambda: source(store, REPO).check(), lambda: source(store, REPO).identity("vae")):
        with pytest.raises(ConfigError, match=r"has no model_index\.json, so it is not in the diffusers layout"):
            look()


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_whole_model_passes(store: Store, tmp_path: Path) -> None:
    source(store, write(tmp_path / "model", minimal())).check()


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"model_index.json": None}, "has no model_index.json, so it is not in the diffusers layout"),
        ({"model_index.json": b'{"_class_name": "FluxPipeline"}'}, "is a FluxPipeline; loraline adapts"),
        ({"model_index.json": b'{"_class_name": "StableDiffusion3Pipeline"}'}, "comes without its vae"),
        ({"model_index.json": b"<html>"}, "model_index.json of .* is damaged"),
        ({"vae/config.json": None}, "no vae/config.json: the vae is missing"),
        ({"tokenizer_2/tokenizer_config.json": None}, "no tokenizer_2/tokenizer_config.json"),
        ({"text_encoder/model.safetensors": None}, "no weights for its text_encoder"),
        (
            {"text_encoder/model.safetensors": None, "text_encoder/pytorch_model.bin": b"pickle"},
            "only pickled weights .*pytorch_model.bin.*never loaded",
        ),
        (
            {"vae/diffusion_pytorch_model.safetensors": None, "vae/diffusion_pytorch_model.fp16.safetensors": b"x"},
            "set model.variant",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(
    store: Store, tmp_path: Path, replaced: dict[str, bytes | None], message: str
) -> None:
    model = write(tmp_path / "model", minimal(**replaced))
    with pytest.raises(ConfigError, match=message):
        source(store, model).check()


@pytest.mark.parametrize("name", ["models/sd3/here", "/nowhere/sd3", "./sd3", "sd3"])
def test_a_folder_that_is_not_there_is_not_looked_up_on_the_hub(store: Store, server: HubServer, name: str) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        source(store, name).check()
    assert not server.requests


def test_a_component_that_vanished_meanwhile(store: Store, tmp_path: Path) -> None:
    model = write(tmp_path / "model", minimal())
    found = source(store, model)
    found.check()
    shutil.rmtree(model / "vae")
    with pytest.raises(ConfigError, match="the vae is missing"):
        found.folder(["vae"])
