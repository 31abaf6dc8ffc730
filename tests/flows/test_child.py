"""What a stage's process hears when its parent is asked to leave."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.core.preemption import stop_on_signals
from tests.conftest import ROOT
from tests.pictures import small_config

# In the place of a stage: counts what it is sent while it saves, and says so at the end.
STAGE = """
import pathlib, signal, sys, time
folder, heard = pathlib.Path(sys.argv[1]), []
signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
signal.signal(signal.SIGINT, lambda *_: heard.append("SIGINT"))
(folder / "ready").touch()
while not heard:
    time.sleep(0.05)
time.sleep(1)
(folder / "heard").write_text(" ".join(heard))
sys.exit(75)
"""
# As Prefect's engine: a signal is an exception in the main thread.
PARENT = """
import pathlib, signal, sys
from flows import child
from stages.config import Config
from stages.core.events import Recorder
from stages.pipeline import Pipeline

def leave(*_):
    raise KeyboardInterrupt

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, leave)
child.sys.executable = sys.argv[1]
pipeline = Pipeline.open(Config.model_validate_json(pathlib.Path(sys.argv[2]).read_text()))
child.run_stage(pipeline.order[0], pipeline.config, {}, Recorder())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_for_the_whole_group_asks_a_stage_once(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "config.json").write_text(small_config(tmp_path, tmp_path / "images").model_dump_json())
    (tmp_path / "stage.py").write_text(STAGE)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path}/stage.py {tmp_path}\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(python), str(tmp_path / "config.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(600):
            if (tmp_path / "ready").exists():
                break
            time.sleep(0.05)
        os.killpg(parent.pid, number)
        assert parent.wait(30) != 0
    finally:
        parent.kill()
    assert (tmp_path / "heard").read_text() == "SIGTERM", "one signal, and it was let finish"


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """A shell has what it starts in the background ignore Ctrl-C, these tests perhaps too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_only_a_person_who_insists_ends_a_stage_in_the_middle() -> None:
    with stop_on_signals() as flag:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert flag.requested
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
