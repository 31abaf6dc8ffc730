"""The pages about the command line and the settings tell of all there is, and of nothing else."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import typer

from stages import cli

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
SYNOPSIS = re.search(r"(?:^    .+\n)+", PAGE, re.MULTILINE)


def commands() -> dict[str, set[str]]:
    """The long options of each command."""
    if not any(command.name == "run" for command in cli.app.registered_commands):
        cli._load_commands()
    group = typer.main.get_command(cli.app)
    return {
        name: {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }


def told() -> dict[str, set[str]]:
    """The same of the page's synopsis."""
    assert SYNOPSIS is not None
    entries = re.split(r"^    loraline (?=\w)", SYNOPSIS.group(), flags=re.MULTILINE)[1:]
    return {entry.split()[0]: set(re.findall(r"--[a-z][a-z-]*", entry)) for entry in entries}


def test_the_page_has_every_command() -> None:
    assert set(told()) == set(commands())


@pytest.mark.parametrize("name", ["run", "plan", "stage", "report", "doctor", "stages", "schema"])
def test_the_page_has_every_option_of_a_command(name: str) -> None:
    assert told()[name] == commands()[name] - {"--help"}


def test_every_option_is_explained() -> None:
    explained = {
        option for row in re.findall(r"^\| (`-[^|]*)\|", PAGE, re.MULTILINE) for option in re.findall(r"--[a-z-]+", row)
    }
    assert explained == {option for options in commands().values() for option in options} - {"--help"}


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        assert "://" in target or (path.parent / target).exists(), target


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert {name for name in pages if f"](docs/{name})" not in readme} == set()


def test_the_page_of_all_settings_is_that_of_the_models() -> None:
    """After a change of a setting: python docs/configuration.py"""
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == runpy.run_path(str(ROOT / "docs" / "configuration.py"))["page"]()
