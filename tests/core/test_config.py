"""Configuration: strict, with errors that name the field and the nearest valid one."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.config import Config, load_config
from stages.core.config import parse_yaml, validate
from stages.core.errors import ConfigError, StoreError, TransientError
from tests.servers.fault_proxy import FaultProxy
from tests.servers.s3 import S3Server

MINIMAL = """
name: test
model: {pretrained_model_name_or_path: some/model}
datasets: [{id: photos, source: {type: local, path: pictures}}]
publish: {path: out}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return str(path)


def test_defaults_fill_what_is_not_given(config_file: str) -> None:
    config = load_config(config_file, environment={})
    assert config.train.lora.rank == 16
    assert config.datasets[0].caption_strategy == "textfile"


def test_precedence_is_set_then_environment_then_file(config_file: str) -> None:
    environment = {"LORALINE__TRAIN__STEPS": "7", "LORALINE__TRAIN__LEARNING_RATE": "1e-3", "OTHER": "x"}
    config = load_config(config_file, ["train.steps=9"], environment)
    assert config.train.steps == 9
    assert config.train.learning_rate == 1e-3


def test_numbers_without_a_dot_are_numbers() -> None:
    assert parse_yaml("1e-4", "test") == 1e-4


def test_list_entries_are_addressed_by_number(config_file: str) -> None:
    assert load_config(config_file, ["datasets.0.repeats=3"], {}).datasets[0].repeats == 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learnign_rate=1", "train.learnign_rate: unknown key; did you mean train.learning_rate?"),
        ("learning_rate=1", "learning_rate: unknown key; did you mean train.learning_rate?"),
        ("datasets.0.source.paht=x", "datasets.0.source.paht: unknown key; did you mean datasets.0.source.path?"),
        ("train.lora.rnak=4", "train.lora.rnak: unknown key; did you mean train.lora.rank?"),
        ("train.steps=many", "train.steps: Input should be a valid integer (got 'many', a text)"),
        ("train.steps='5'", "train.steps: Input should be a valid integer (got '5', a text)"),
        ("bucket.crop='false'", "bucket.crop: Input should be a valid boolean (got 'false', a text)"),
        ("bucket.resolution=100", "bucket: resolution: 100.0 megapixels"),
        ("datasets.0.bucket.resolution=1024", "datasets: photos: resolution: 1024.0 megapixels"),
        ("train.sigmas.shift=-1", "train.sigmas: shift: give a number above 0"),
        ("publish.target=hub", "publish: target 'hub' needs publish.repo"),
        ("datasets=[]", "datasets: List should have at least 1 item"),
        ("datasets.3.repeats=1", "is no entry of a list of 1"),
        ("train", "write it as section.key=value"),
    ],
)
def test_errors_name_the_field(config_file: str, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, [override], {})
    assert expected in str(caught.value)


def test_all_wrong_fields_are_named_at_once(config_file: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, ["train.steps=x", "train.seed=1"], {})
    assert "train.steps" in str(caught.value)
    assert "train.seed" in str(caught.value)


def test_missing_file_bad_yaml_and_wrong_shape(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(str(tmp_path / "none.yaml"))
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(str(bad))
    bad.write_text("a: 1\na: 2", encoding="utf-8")
    with pytest.raises(ConfigError, match="duplicate key"):
        load_config(str(bad))
    bad.write_text("- 1", encoding="utf-8")
    with pytest.raises(ConfigError, match="mapping of sections"):
        load_config(str(bad))


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("name: !!python/object/apply:os.system ['echo hacked']", encoding="utf-8")
    with pytest.raises(ConfigError):
        load_config(str(path))


def test_a_resolved_configuration_survives_json(config_file: str) -> None:
    config = load_config(config_file, environment={})
    again = Config.model_validate(parse_yaml(config.model_dump_json(), "json"))
    assert again == config


def test_data_sets_may_differ_in_geometry(config_file: str) -> None:
    config = load_config(config_file, ["datasets.0.bucket.crop_style=random"], {})
    merged = config.datasets[0].bucket.applied_to(config.bucket)
    assert merged.crop_style == "random"
    assert merged.resolution == config.bucket.resolution


def test_data_set_ids_must_differ(config_file: str) -> None:
    twice = "datasets=[{id: a, source: {type: local, path: p}}, {id: a, source: {type: local, path: q}}]"
    with pytest.raises(ConfigError, match="ids must differ"):
        load_config(config_file, [twice], {})


def test_no_section_takes_a_secret() -> None:
    """Tokens and keys come from the environment; a field for one would end up in manifests and logs."""
    schema = str(Config.model_json_schema()).lower()
    for word in ("token'", "secret", "password", "access_key"):
        assert word not in schema.replace("aws_secret_access_key", "").replace("aws_access_key_id", ""), word


def test_every_field_is_described_in_the_schema() -> None:
    """The form in Prefect's pages and `loraline schema` show these words."""
    schema = Config.model_json_schema()
    sections = {"Config": schema, **schema["$defs"]}
    bare = [
        f"{name}.{field}"
        for name, section in sections.items()
        for field, shape in section.get("properties", {}).items()
        if not shape.get("description")
    ]
    assert not bare


def test_validate_reports_a_type(config_file: str) -> None:
    with pytest.raises(ConfigError, match="name: is required"):
        validate(Config, {})


def test_a_configuration_in_a_bucket_is_read_as_the_store_is(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server = moto.with_new_bucket()
    server.client().put_object(Bucket=server.bucket, Key="some/run.yaml", Body=MINIMAL.encode())
    for key, value in server.environment().items():
        monkeypatch.setenv(key, value)
    assert load_config(f"s3://{server.bucket}/some/run.yaml", environment={}).name == "test"
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(f"s3://{server.bucket}/some/walk.yaml", environment={})
    with pytest.raises(StoreError, match="The bucket does not exist"):
        load_config("s3://no-such-bucket-here/run.yaml", environment={})


def test_no_credentials_for_a_configuration_are_said_plainly(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in moto.environment():
        monkeypatch.delenv(key, raising=False)
    for key, value in {
        "AWS_ENDPOINT_URL": moto.endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "AWS_CONFIG_FILE": "/nonexistent",
    }.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(StoreError, match="set AWS_ACCESS_KEY_ID"):
        load_config(f"s3://{moto.bucket}/run.yaml", environment={})


def test_a_server_that_is_down_is_worth_another_try(
    s3: S3Server, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = s3.through(fault_proxy)
    for key, value in server.environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    fault_proxy.answer(503, times=None)
    with pytest.raises(TransientError, match="after 5 attempts"):
        load_config(f"s3://{server.bucket}/run.yaml", environment={})
