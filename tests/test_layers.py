"""One direction: flows -> stages; a stage's room -> core and models, never another room."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("download", "bucket", "latents", "embeds", "train", "publish")


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports when it runs; imports for type checkers alone do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


@pytest.mark.parametrize("path", modules("stages"), ids=lambda path: str(path.relative_to(ROOT)))
def test_stages_know_nothing_of_prefect(path: Path) -> None:
    for module in imports(path):
        assert module.split(".")[0] not in ("flows", "prefect"), module


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_no_other_room(room: str) -> None:
    for path in modules(f"stages/{room}"):
        for module in imports(path):
            for other in set(ROOMS) - {room}:
                assert not module.startswith(f"stages.{other}"), f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("ground", ["core", "models"])
def test_the_ground_floor_imports_no_room(ground: str) -> None:
    allowed = {"core": ("stages.core",), "models": ("stages.core", "stages.models", "stages.train.config")}[ground]
    for path in modules(f"stages/{ground}"):
        for module in imports(path):
            assert not module.startswith("stages.") or module.startswith(allowed), f"{path.relative_to(ROOT)}: {module}"


def test_the_command_line_starts_without_heavy_libraries() -> None:
    heavy = ("torch", "diffusers", "transformers", "prefect")
    code = f"import sys, stages.cli; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "[]"


def test_nothing_reads_pickles_or_runs_remote_code() -> None:
    for folder in ("stages", "flows"):
        for path in modules(folder):
            text = path.read_text(encoding="utf-8")
            for word in ("import pickle", "torch.load(", "torch.save(", "trust_remote_code=True", "eval("):
                assert word not in text.replace(".eval(", "").replace("safetensors.torch.load(", ""), f"{path}: {word}"
