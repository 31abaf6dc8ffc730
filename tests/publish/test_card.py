"""The card: front matter that the Hub's own parser reads, and words of other people that stay words."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from stages.publish.card import escaped, licence, one_line, paragraphs, python_literal
from tests.publish.conftest import Bench, make_bench

HOSTILE = [
    "</td><script>alert(1)</script>",
    "a | b | c",
    "---\nlicense: mit\n---",
    "```\nimport os\n```",
    "![x](http://example.invalid/p.png) [link](javascript:alert(1))",
    "quote \" and ' and \\ and \x00 \x1b[31m",
    "line\none\r\ntwo\u2028three",
    "# heading",
    "1. list",
    "*bold* _under_ ~~gone~~ `code` $x$",
    "{{ config }} {% raw %}",
    "&lt;b&gt; &#60;",
    "\ud800 half a letter",
    "www.example.invalid https://example.invalid user@example.invalid",
    "ромашка 花 🌼",
    "key: value # comment",
    "!!python/object/apply:os.system ['true']",
]


def card_of(bench: Bench) -> str:
    bench.run()
    return (bench.root / "out" / "README.md").read_text(encoding="utf-8")


def test_front_matter_says_what_the_hub_needs(bench: Bench) -> None:
    data = ModelCard(card_of(bench)).data.to_dict()
    assert data["base_model"] == "stabilityai/stable-diffusion-3.5-large"
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "text-to-image"
    assert data["license"] == "other"
    assert data["license_name"] == "stabilityai-ai-community"
    assert data["license_link"].endswith("stabilityai/stable-diffusion-3.5-large/blob/main/LICENSE.md")
    assert data["instance_prompt"] == "zring"
    assert data["widget"] == [
        {"text": "a red ring", "output": {"url": "images/after-0.png"}},
        {"text": "a blue ring on grass", "output": {"url": "images/after-1.png"}},
    ]
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5


def test_pictures_named_in_the_card_are_published(bench: Bench) -> None:
    card = card_of(bench)
    named = set(re.findall(r"\]\((images/[^)]+)\)", card)) | {
        entry["output"]["url"] for entry in ModelCard(card).data.to_dict()["widget"]
    }
    assert named == {f"images/{side}-{index}.png" for side in ("before", "after") for index in (0, 1)}
    assert all((bench.root / "out" / name).is_file() for name in named)


def test_a_local_base_model_is_not_claimed_to_be_on_the_hub(tmp_path: Path) -> None:
    base = tmp_path / "secret-place" / "tiny"
    base.mkdir(parents=True)
    bench = make_bench(tmp_path, {"path": str(tmp_path / "out")}, model={"pretrained_model_name_or_path": str(base)})
    card = card_of(bench)
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert ModelCard(card).data.to_dict()["license_name"] == "that-of-the-base-model"
    assert "*tiny*" in card
    published = "".join(path.read_text(errors="replace") for path in (tmp_path / "out").iterdir() if path.is_file())
    assert "secret-place" not in published
    assert str(tmp_path) not in published


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_words_stay_words(tmp_path: Path, text: str) -> None:
    if "\ud800" in text:  # cannot come out of a YAML file; the pure functions are held to it below
        assert one_line(text).encode()
        return
    bench = make_bench(
        tmp_path,
        {"path": str(tmp_path / "out"), "trigger": text, "description": f"{text}\n\n{text}"},
        validation={"prompts": [text, text]},
    )
    card = card_of(bench)
    plain = make_bench(tmp_path / "plain", {"path": str(tmp_path / "plain" / "out"), "description": "a\n\nb"})
    data, expected = ModelCard(card).data.to_dict(), ModelCard(card_of(plain)).data.to_dict()
    assert data["widget"][0]["text"] == one_line(text)
    assert data["instance_prompt"] == one_line(text)
    assert data["license"] == "other"
    assert data.keys() == expected.keys()
    body, plain_body = ModelCard(card).text, ModelCard((plain.root / "out" / "README.md").read_text()).text
    outside_code = re.sub(r"^```python.*?^```$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in outside_code
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings == [line for line in plain_body.splitlines() if line.startswith("#")]
    rows = [line.count("|") for line in body.splitlines() if line.startswith("|")]
    assert rows == [line.count("|") for line in plain_body.splitlines() if line.startswith("|")]
    assert len(re.findall(r"^```", body, flags=re.MULTILINE)) == 2
    assert "](http" not in outside_code.replace("](https://huggingface.co/stabilityai", "")
    assert "](javascript" not in outside_code
    code = body.split("```python\n")[1].split("```\n")[0]
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert one_line(text) in strings


@pytest.mark.parametrize("text", HOSTILE)
def test_pure_escapes(text: str) -> None:
    assert not re.search(r"[<>`|*\[\]\n\x00]", escaped(text))
    assert ast.literal_eval(python_literal(text)) == one_line(text)
    assert "\n" not in python_literal(text)


def test_plain_words_are_left_alone() -> None:
    assert escaped("to_q, 0.0001, a-b (c) 50 %") == "to_q, 0.0001, a-b (c) 50 %"
    assert paragraphs("one\ntwo\n\n\n  three") == ["one two", "three"]


def test_licences() -> None:
    assert licence("apache-2.0", "stabilityai/x") == {"license": "apache-2.0"}
    assert licence("other", "stabilityai/x")["license_name"] == "stabilityai-ai-community"
    assert "license_link" not in licence("other", "someone/x")


def test_card_without_pictures_trigger_or_evaluation(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, {"path": str(tmp_path / "out"), "trigger": None}, validation={"prompts": []})
    bench.train(pictures=False, **{"evaluation.json": b'{"rounds": []}'})
    card = card_of(bench)
    data = ModelCard(card).data.to_dict()
    assert "widget" not in data
    assert "model-index" not in data
    assert "## Pictures" not in card
    assert "## Evaluation" not in card


def test_missing_pictures_are_said_not_hidden(bench: Bench) -> None:
    bench.train(pictures=False)
    bench.run()
    assert any("no validation pictures" in getattr(event, "text", "") for event in bench.recorder.events)
