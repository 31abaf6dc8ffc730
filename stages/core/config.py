"""Configuration machinery: typed sections, one YAML file, overrides, and errors that name the field.

What the sections are is said beside the stages that read them; the tree is put together in `stages/config.py`.
Order of precedence: `--set section.key=value`, then environment variables `LORALINE__SECTION__KEY=value`, then the
file, then defaults. Values of the first two are read as YAML, so `true`, `1e-4` and `[a, b]` are what they look like.
Secrets are never configuration: tokens and keys come from the environment alone (HF_TOKEN, AWS_*).
"""

from __future__ import annotations

import difflib
import io
import os
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import fsspec
from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.core.errors import ConfigError, TransientError
from stages.core.filesystem import is_transient
from stages.core.locations import open_files

ENVIRONMENT_PREFIX = "LORALINE__"
_SECRET = re.compile(r"(^|_)(token|secret|password|access_key|api_key)($|_)", re.IGNORECASE)


class Section(BaseModel):
    """Base of every configuration section: strict types, unknown keys are errors, never changed after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


Tree = TypeVar("Tree", bound=Section)


def load(
    model: type[Tree],
    path: str,
    overrides: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Tree:
    """Reads a configuration.

    Args:
        model: the tree's type.
        path: a YAML file: a local path or any fsspec URL ('s3://bucket/config.yaml').
        overrides: 'section.key=value' texts, as given to `--set`.
        environment: where `LORALINE__*` variables are looked up; the process's own by default.

    Raises:
        ConfigError: the file is missing or is not YAML; a key is unknown; a value has the wrong type.
        StoreError: an object store does not let it be read (no credentials, no permission, no such bucket).
        TransientError: the server that holds it did not answer.
    """
    try:
        text = _read(path).decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{path}: cannot read the configuration ({error})") from error
    tree = parse_yaml(text, path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of sections, this is {_type_name(tree)}")
    variables = os.environ if environment is None else environment
    for key, value in variables.items():
        if key.startswith(ENVIRONMENT_PREFIX):
            dotted = key.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            _assign(tree, dotted, parse_yaml(value, key), key)
    for override in overrides:
        dotted, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: write it as section.key=value")
        _assign(tree, dotted.strip(), parse_yaml(value, f"--set {dotted}"), "--set")
    overridden = overrides or any(key.startswith(ENVIRONMENT_PREFIX) for key in variables)
    return validate(model, tree, f"{path} and what overrides it" if overridden else path)


def _read(path: str) -> bytes:
    protocol, separator, rest = path.partition("://")
    if not separator or protocol == "file":
        return Path(rest if separator else path).expanduser().read_bytes()
    if protocol == "s3":
        folder, _, name = path.rpartition("/")
        data = open_files(folder).read(name)
        if data is None:
            raise FileNotFoundError(path)
        return data
    try:
        with fsspec.open(path, "rb") as file:
            data = bytes(file.read())
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the protocol's library has of its own
        kind = TransientError if is_transient(error) else ConfigError
        raise kind(f"{path}: cannot read the configuration ({str(error) or type(error).__name__})") from error
    return data


def validate(model: type[Tree], tree: Mapping[str, Any], source: str = "configuration") -> Tree:
    """Checks a tree of plain values against its model.

    Raises:
        ConfigError: with one line for each wrong field, naming the nearest valid one where a key is unknown.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(model, detail) for detail in error.errors(include_url=False)]
        shown = list(dict.fromkeys(lines))
        raise ConfigError(f"{source}: " + ("\n  ".join(["", *shown]) if len(shown) > 1 else shown[0])) from None


def parse_yaml(text: str, source: str) -> Any:
    """One YAML 1.2 document as plain values (so `1e-4` is a number and `no` is a text).

    Raises:
        ConfigError: it is not YAML, or a key stands twice.
    """
    try:
        return YAML(typ="safe", pure=True).load(io.StringIO(text))
    except YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def _assign(tree: dict[str, Any], dotted: str, value: Any, source: str) -> None:
    """Sets tree[a][b] for 'a.b'; an integer part picks an entry of a list ('datasets.0.repeats')."""
    parts = dotted.split(".")
    node: Any = tree
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        where = ".".join(parts[: position + 1])
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"{source} {dotted}: {where} is no entry of a list of {len(node)}")
            key: Any = int(part)
        elif isinstance(node, dict):
            key = part
        else:
            raise ConfigError(f"{source} {dotted}: {'.'.join(parts[:position])} is a value, it has no {part!r}")
        if last:
            node[key] = value
        elif isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        else:
            node = node[key]


def _explain(model: type[BaseModel], detail: Any) -> str:
    location = _written_location(model, list(detail["loc"]))
    field = ".".join(str(part) for part in location)
    value = detail.get("input")
    if detail["type"] == "extra_forbidden":
        parent, key = location[:-1], str(location[-1])
        names = _field_names(model, parent)
        hint = ""
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.55)
        if near:
            hint = f"; did you mean {'.'.join([*map(str, parent), near[0]])}?"
        else:
            elsewhere = _find_key(model, key)
            if elsewhere:
                hint = f"; did you mean {elsewhere}?"
            elif names:
                hint = f"; valid here: {', '.join(sorted(names))}"
        return f"{field}: unknown key{hint}"
    if detail["type"] == "missing":
        return f"{field}: is required"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not field:
        return message
    if _SECRET.search(field) or isinstance(value, dict | list):
        return f"{field}: {message}"
    return f"{field}: {message} (got {value!r}, {_type_name(value)})"


def _written_location(model: type[BaseModel], location: list[int | str]) -> list[int | str]:
    """The location as a person wrote it: pydantic puts the tag of a discriminated union in between."""
    models, written = [model], []
    for position, part in enumerate(location):
        fields = [candidate.model_fields[part] for candidate in models if part in candidate.model_fields]
        if isinstance(part, str) and not fields and position < len(location) - 1:
            continue
        written.append(part)
        if fields:
            models = [sub for field in fields for sub in _sub_models(field.annotation)]
    return written


def _sub_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, list, dict, tuple, Annotated):
        return [model for argument in get_args(annotation) for model in _sub_models(argument)]
    return []


def _field_names(model: type[BaseModel], location: list[int | str]) -> list[str]:
    models = [model]
    for part in location:
        if isinstance(part, int):
            continue
        models = [
            sub
            for candidate in models
            if part in candidate.model_fields
            for sub in _sub_models(candidate.model_fields[part].annotation)
        ]
    return sorted({name for candidate in models for name in candidate.model_fields})


def _find_key(model: type[BaseModel], key: str, prefix: str = "") -> str | None:
    """A field of that exact name in another section: 'train.learning_rate' for a top-level `learning_rate`."""
    for name, field in model.model_fields.items():
        for sub in _sub_models(field.annotation):
            if key in sub.model_fields:
                return f"{prefix}{name}.{key}"
    return None


def _type_name(value: Any) -> str:
    return {type(None): "nothing", dict: "a mapping", list: "a list", str: "a text", bool: "true/false"}.get(
        type(value), type(value).__name__
    )
