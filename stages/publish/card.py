"""The model card. Prompts, triggers and descriptions are other people's words: escaped for YAML, Markdown and HTML."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from stages.core.artifact import Manifest
from stages.publish.gate import Losses

if TYPE_CHECKING:
    from jinja2 import Template

    from stages.config import Config

TEMPLATE = Path(__file__).with_name("card.md.j2")
TAGS = ["text-to-image", "diffusers", "lora", "template:sd-lora", "stable-diffusion-3", "loraline"]
# Characters that begin something in Markdown or HTML. As numeric references they are only ever text.
_SPECIAL = re.compile(
    r"""[\\`*{}\[\]<>&"'#|~$@] | (?<![a-z0-9])_ | _(?![a-z0-9]) | (?<=www)\. | :(?=//) | ^[+\-=]""",
    re.IGNORECASE | re.VERBOSE,
)
_LIST_NUMBER = re.compile(r"^(\d+)([.)])(?=\s|$)")


@dataclass(frozen=True)
class Pair:
    """A validation prompt with its pictures' paths in the package, before and after training."""

    prompt: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class CardFacts:
    """What the card is made of. `rounds` are (step, held-out loss); `losses` those that were compared."""

    config: Config
    base_on_hub: bool
    adapter_name: str
    pairs: Sequence[Pair]
    rounds: Sequence[tuple[int, float]]
    losses: Losses
    downloads: Mapping[str, Manifest]
    train: Manifest
    record_name: str


def render_card(facts: CardFacts) -> str:
    """README.md: front matter that the Hub reads, and a page for people."""
    return f"---\n{front_matter(facts)}\n---\n\n{_template().render(_page(facts)).strip()}\n"


def front_matter(facts: CardFacts) -> str:
    """The card's metadata as YAML, without the lines of dashes."""
    from huggingface_hub import EvalResult, ModelCardData  # imported late, like all heavy libraries

    config = facts.config
    base = config.model.pretrained_model_name_or_path
    extra: dict[str, Any] = {**licence(config.publish.license, base if facts.base_on_hub else None)}
    if facts.base_on_hub:
        extra["base_model_relation"] = "adapter"
    if config.publish.trigger:
        extra["instance_prompt"] = one_line(config.publish.trigger)
    widget = [
        {"text": one_line(pair.prompt) or "-", "output": {"url": pair.after}} for pair in facts.pairs if pair.after
    ]
    if widget:
        extra["widget"] = widget
    results = None
    if facts.rounds and math.isfinite(facts.rounds[-1][1]):
        results = [
            EvalResult(
                task_type="text-to-image",
                dataset_type="held-out",
                dataset_name=f"held-out images of {', '.join(facts.downloads) or 'the data set'}",
                metric_type="loss",
                metric_name="held-out flow-matching loss",
                metric_value=round(facts.rounds[-1][1], 6),
            )
        ]
    data = ModelCardData(
        base_model=base if facts.base_on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=TAGS,
        datasets=_hub_datasets(facts) or None,
        model_name=config.name if results else None,
        eval_results=results,
        **extra,
    )
    return data.to_yaml()


def licence(name: str, base: str | None) -> dict[str, str]:
    """The card's licence fields. An adapter of a Stability model is under that model's licence."""
    if name != "other":
        return {"license": name}
    if base is not None and base.startswith("stabilityai/"):
        return {
            "license": "other",
            "license_name": "stabilityai-ai-community",
            "license_link": f"https://huggingface.co/{base}/blob/main/LICENSE.md",
        }
    return {"license": "other", "license_name": "that-of-the-base-model"}


def one_line(text: str) -> str:
    """Without line breaks, control characters and what cannot be written as UTF-8."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(plain.split())


def escaped(text: str) -> str:
    """One line of text that Markdown and HTML show as it is."""
    plain = _SPECIAL.sub(lambda found: f"&#{ord(found.group())};", one_line(text))
    return _LIST_NUMBER.sub(lambda found: f"{found.group(1)}&#{ord(found.group(2))};", plain)


def python_literal(text: str) -> str:
    """A Python string on one line, in double quotes: nothing in the text can end it, or the block of code around it."""
    return json.dumps(one_line(text), ensure_ascii=False)


def paragraphs(text: str) -> list[str]:
    """A text of several paragraphs, each escaped."""
    return [part for part in (escaped(block) for block in re.split(r"\n\s*\n", text)) if part]


def _hub_datasets(facts: CardFacts) -> list[str]:
    sources = [dataset.source for dataset in facts.config.datasets]
    return list(dict.fromkeys(source.repo for source in sources if source.type == "hub"))


def _page(facts: CardFacts) -> dict[str, Any]:
    config = facts.config
    validation, publish = config.validation, config.publish
    base = config.model.pretrained_model_name_or_path
    prompt = next((pair.prompt for pair in facts.pairs if pair.prompt), None) or publish.trigger or "a picture"
    return {
        "name": escaped(config.name),
        "base": escaped(base if facts.base_on_hub else PurePosixPath(base).name),
        "base_on_hub": facts.base_on_hub,
        "description": paragraphs(publish.description),
        "trigger": escaped(publish.trigger or ""),
        "pairs": [(escaped(pair.prompt) or "-", pair.before, pair.after) for pair in facts.pairs],
        "code": {
            "base": python_literal(base if facts.base_on_hub else f"path/to/{PurePosixPath(base).name}"),
            "revision": python_literal(config.model.revision) if config.model.revision and facts.base_on_hub else "",
            "adapter": python_literal(publish.repo if publish.target == "hub" and publish.repo else "."),
            "branch": python_literal(publish.branch) if publish.target == "hub" and publish.branch != "main" else "",
            "weight_name": python_literal(facts.adapter_name),
            "prompt": python_literal(prompt),
            "negative_prompt": python_literal(validation.negative_prompt) if validation.negative_prompt else "",
        },
        "validation": validation,
        "training": [(label, escaped(str(value))) for label, value in _training(config)],
        "rounds": [(step, f"{loss:.5f}") for step, loss in _first_and_last(facts.rounds)],
        "previous": "" if facts.losses.previous is None else f"{facts.losses.previous:.5f}",
        "previous_train": str(facts.losses.fingerprint or "")[:12],
        "datasets": [_dataset_row(facts, dataset_id) for dataset_id in facts.downloads],
        "provenance": _provenance_rows(facts.train),
        "record_name": facts.record_name,
    }


def _training(config: Config) -> list[tuple[str, object]]:
    train = config.train
    lora, sigmas = train.lora, train.sigmas
    rows: list[tuple[str, object]] = [
        ("Steps", train.steps),
        ("Batch size", f"{train.train_batch_size} x {train.gradient_accumulation_steps} (accumulation)"),
        ("Rank, alpha", f"{lora.rank}, {lora.alpha if lora.alpha is not None else lora.rank:g}"),
        ("Adapted layers", ", ".join(lora.targets)),
        ("Learning rate", f"{train.learning_rate:g}, {train.lr_scheduler}, {train.lr_warmup_steps} warm-up steps"),
        (
            "Optimiser",
            f"AdamW, weight decay {train.adam_weight_decay:g}, gradient norm at most {train.max_grad_norm:g}",
        ),
        ("Base precision", f"{train.base_model_precision}, mixed precision {train.mixed_precision}"),
        ("Noise levels", f"{sigmas.sampling}, shift {sigmas.shift}"),
        ("Objective", train.objective),
        ("Caption dropout", f"{train.caption_dropout:g}"),
        ("Seed", config.seed),
    ]
    if train.previous:
        start = f"the adapter of {train.previous[:12]}" if train.warm_start else "a fresh adapter"
        rows.append(("Started from", start))
    return rows


def _first_and_last(rounds: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [rounds[0], rounds[-1]] if len(rounds) > 1 else list(rounds)


def _dataset_row(facts: CardFacts, dataset_id: str) -> dict[str, str]:
    manifest = facts.downloads[dataset_id]
    dataset = facts.config.dataset(dataset_id)
    if dataset.source.type == "hub":
        commit = str(manifest.spec.get("source", {}).get("commit", ""))[:10]
        source = f"{dataset.source.repo} at {commit}" if commit else dataset.source.repo
    else:
        source = "a local folder"
    return {
        "id": escaped(dataset_id),
        "source": escaped(source),
        "images": f"{manifest.counts.get('images', 0):,}",
        "captions": f"{manifest.counts.get('distinct_captions', 0):,}",
        "refused": f"{len(manifest.refused):,}",
        "repeats": str(dataset.repeats),
    }


def _provenance_rows(train: Manifest) -> list[tuple[str, str]]:
    rows = [("train fingerprint", train.fingerprint), ("train digest", train.digest())]
    if train.code_revision:
        rows.append(("loraline revision", train.code_revision))
    wanted = ("loraline", "torch", "diffusers", "peft", "optimum-quanto")
    return rows + [(name, train.versions[name]) for name in wanted if name in train.versions]


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    # Markdown, not HTML: values are escaped by `escaped`, by hand, where they go in.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
