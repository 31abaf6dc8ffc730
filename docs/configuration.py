"""Writes docs/configuration.md, the table of all settings, out of the configuration's own models:

python docs/configuration.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.config import Config

PAGE = Path(__file__).with_suffix(".md")
INTRODUCTION = """# All settings

One YAML file, a section for each stage; see [the command line](cli.md) for overriding single settings. Unknown keys and
wrong types are errors that name the field. `loraline schema` prints the same for an editor. This page is written by
`python docs/configuration.py`.
"""
WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true, false", "null": "nothing"}


def page() -> str:
    """The page as Markdown."""
    schema = Config.model_json_schema()
    definitions = schema["$defs"]
    parts = [INTRODUCTION, *_table(schema, "", definitions)]
    for name, field in schema["properties"].items():
        section = _section(field, definitions)
        if section is not None:
            place = f"{name}[]." if field.get("type") == "array" else f"{name}."
            parts += [f"\n## {place.rstrip('.')}\n", f"{_line(section.get('description', ''))}\n"]
            parts += _table(section, place, definitions)
    return "\n".join(parts) + "\n"


def _table(section: dict[str, Any], place: str, definitions: dict[str, Any]) -> list[str]:
    lines = list(_rows(section, place, definitions))
    return ["| setting | value | default | |", "|---|---|---|---|", *lines]


def _rows(section: dict[str, Any], place: str, definitions: dict[str, Any]) -> Iterator[str]:
    required = section.get("required", [])
    for name, field in section["properties"].items():
        inner = _section(field, definitions)
        if inner is not None:
            if place and all(entry.get("default", "") is None for entry in inner["properties"].values()):
                yield f"| `{place}{name}` | mapping | | {_line(field.get('description', ''))} |"
            elif place:  # a section of the file has a table of its own
                yield from _rows(inner, f"{place}{name}.", definitions)
            continue
        kinds = [kind for kind in field.get("anyOf", []) if "$ref" in kind]
        if kinds:
            for kind in kinds:
                yield from _rows(definitions[kind["$ref"].rpartition("/")[2]], f"{place}{name}.", definitions)
            continue
        default = "required" if name in required else _default(field)
        yield f"| `{place}{name}` | {_value(field)} | {default} | {_line(field.get('description', ''))} |"


def _default(field: dict[str, Any]) -> str:
    empty = {"array": [], "object": {}}.get(field.get("type", ""))
    value = field.get("default", empty)
    return "" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`"


def _section(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a field holds (or a list of), if it does."""
    reference = field.get("$ref") or field.get("items", {}).get("$ref")
    found = definitions[reference.rpartition("/")[2]] if reference else {}
    return found if "properties" in found else None


def _value(field: dict[str, Any]) -> str:
    """What a field takes, in words."""
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(_value(kind) for kind in field["anyOf"])
    if field.get("type") == "array":
        return f"list: {_value(field['items'])}"
    if field.get("type") == "object":
        return f"mapping: {_value(field.get('additionalProperties', {}))}"
    return WORDS.get(field.get("type", ""), "")


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
