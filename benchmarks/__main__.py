"""All benchmarks, one after the other: `python -m benchmarks [NAME ...]`.

Each prints its table and writes JSON to `--out` (default `.loraline/benchmarks`). Ratios compare within one run, so a
busy machine changes them little; absolute numbers are of this machine, at this moment.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

NAMES = ("decode", "download", "bucket", "latents", "embeds", "train", "pipeline", "deployment")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(NAMES)} (all by default)")
    parser.add_argument("--out", type=Path, default=Path(".loraline/benchmarks"), help="folder for the JSON files")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(NAMES)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    # Two OpenMP threads on a busy machine can be ten times slower than one.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    failed = []
    for name in arguments.names or NAMES:
        print(f"\n## {name}\n", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(arguments.out / f"{name}.json")]
        if subprocess.run(command, env=environment, check=False).returncode != 0:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
