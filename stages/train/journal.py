"""What is written down while training runs: TensorBoard's event files and JSON lines, for people to watch.

Both are volatile: they hold times, and a resumed run writes on. What belongs to the artifact is the history, which is
kept in checkpoints.

    runs/train-<fingerprint>/tensorboard/     event files
    runs/train-<fingerprint>/metrics.jsonl    one object a record: step, time and numbers

In a local store they are written in place, so that they can be watched live; else they are uploaded at checkpoints.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from PIL import Image

from stages.core.filesystem import LocalFiles
from stages.core.store import Store


class Journal:
    """The journal of one run.

    Args:
        store: where it ends up.
        run: 'train-<fingerprint>'.
        scratch: a local folder, for a store that is not local.
        start: steps done already; what an interrupted run wrote beyond them is dropped.
    """

    def __init__(self, store: Store, run: str, scratch: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imported late: it takes a second

        self._files, self._folder = store.files, f"runs/{run}"
        self._local = isinstance(store.files, LocalFiles)
        root = store.files.absolute(self._folder) if isinstance(store.files, LocalFiles) else scratch / "journal"
        self._events = root / "tensorboard"
        self._events.mkdir(parents=True, exist_ok=True)
        if start == 0:  # from the beginning: what an earlier try drew is not of this run
            for name in store.files.names(f"{self._folder}/tensorboard"):
                store.files.delete(f"{self._folder}/tensorboard/{name}")
        self._path = root / "metrics.jsonl"
        before = store.files.read(f"{self._folder}/metrics.jsonl") or b""
        kept = [line for line in before.splitlines() if _step_of(line) is not None and (_step_of(line) or 0) <= start]
        self._path.write_bytes(b"".join(line + b"\n" for line in kept) if start else b"")
        self._lines = self._path.open("a", encoding="utf-8")
        # `purge_step` hides what the interrupted run had drawn beyond its last checkpoint.
        self._writer: Any = SummaryWriter(str(self._events), purge_step=start + 1 if start else None, flush_secs=10)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._lines.flush()

    def picture(self, step: int, name: str, path: Path) -> None:
        import numpy as np

        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def upload(self) -> None:
        """Brings what was written to the store, where it is not there anyway."""
        self._writer.flush()
        if self._local:
            return
        self._files.put_file(self._path, f"{self._folder}/metrics.jsonl")
        for path in sorted(self._events.iterdir()):
            self._files.put_file(path, f"{self._folder}/tensorboard/{path.name}")

    def close(self) -> None:
        self._writer.close()
        self._lines.close()


def _step_of(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
