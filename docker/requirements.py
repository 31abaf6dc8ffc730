"""Writes what an image installs as three lists, out of pyproject.toml: torch.txt, stages.txt and worker.txt.

The Dockerfile installs from these, so that a change of pyproject.toml that changes no list costs nothing.
"""

import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
lists = {
    "torch.txt": [line for line in project["dependencies"] if line.startswith("torch")],
    "stages.txt": project["dependencies"],
    "worker.txt": project["optional-dependencies"]["deploy"],
}
for name, lines in lists.items():
    Path(name).write_text("\n".join(sorted(lines)) + "\n", encoding="utf-8")
