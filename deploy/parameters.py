"""Prints a configuration as the parameters of a flow run, for `prefect deployment run` and `prefect deploy --params`.

python deploy/parameters.py run.yaml [--set SECTION.KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import json
import sys

from stages.config import load_config
from stages.core.errors import LoralineError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, or an fsspec URL such as s3://bucket/run.yaml")
    parser.add_argument("--set", "-s", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="sets")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.sets)
    except LoralineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({"config": config.model_dump(mode="json")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
