"""The embedded demo does what it says: the base draws what it is told, and the adapter draws what the base cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.servers.prefect import empty_database

pytestmark = pytest.mark.slow
DEMO = ROOT / "examples" / "demo"
WEIGHTS_LIMIT = 15_000_000


def run(*command: str, cwd: Path, home: Path) -> str:
    environment = {**os.environ, "PREFECT_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    return answer.stdout + answer.stderr


def test_the_model_is_small_and_in_the_layout_of_a_pipeline() -> None:
    weights = list(DEMO.glob("tiny-sd3/*/*.safetensors"))
    assert len(weights) == 5
    assert sum(path.stat().st_size for path in weights) <= WEIGHTS_LIMIT
    assert not [path for path in DEMO.glob("tiny-sd3/**/*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_the_base_draws_what_the_prompt_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEMO))
    import judge

    assert judge.check_on_drawn(100) >= 0.97
    assert judge.judge_model(DEMO / "tiny-sd3", 64, seed=123, steps=20, guidance=4.0, sheet=None) >= 0.8


def test_the_data_set_is_the_same_bytes_for_the_same_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(DEMO))
    from make_dataset import make_dataset

    for name in ("one", "two"):
        make_dataset(tmp_path / name, count=30)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len([name for name in files if not name.endswith(".txt")]) == 32  # two of them broken
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_the_adapter_learns_the_new_thing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole demo through Prefect, as `make demo` runs it; then the published adapter, loaded by diffusers alone."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    home = tmp_path / "prefect"
    home.mkdir()
    shutil.copyfile(empty_database(), home / "prefect.db")
    run("examples/demo/make_dataset.py", ".loraline/demo-images", cwd=tmp_path, home=home)
    # Pictures and losses once, at the end; they change nothing of the adapter.
    rarely = ("--set", "validation.every=450", "--set", "train.evaluation.every=450")
    flow = ("-m", "stages.cli", "run", "--config", "examples/demo/config.yaml", *rarely)
    first = run(*flow, cwd=tmp_path, home=home)
    assert "Report:" in first
    assert (tmp_path / ".loraline/store/runs/demo/report.html").stat().st_size > 50_000
    assert "Nothing to do" in run(*flow, cwd=tmp_path, home=home)

    import torch
    from diffusers import StableDiffusion3Pipeline

    monkeypatch.syspath_prepend(str(DEMO))
    import judge

    pipeline = StableDiffusion3Pipeline.from_pretrained(DEMO / "tiny-sd3", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = judge.concept_prompts()

    def score() -> float:
        drawn = judge.generate(pipeline, prompts, width=64, height=64, seed=1, steps=24, guidance=4.0)
        return float(judge.concept_score(drawn))

    before = score()
    pipeline.load_lora_weights(tmp_path / ".loraline/published/demo")
    after = score()
    assert before <= 0.1, before
    assert after >= 0.6, after
