"""The server that the scripts beside this one write to."""

from __future__ import annotations

import argparse
import os

import httpx


def look_for_server(parser: argparse.ArgumentParser) -> None:
    """Ends the program, with one line that says what to do, where no Prefect server answers.

    To be called before Prefect is asked anything: without an address it would start a server of its own and forget it.
    """
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        parser.error(
            "PREFECT_API_URL is not set: the address of your Prefect server, such as http://127.0.0.1:4200/api"
        )
    try:
        # Whatever it answers, somebody is there; whether it takes the password is Prefect's to say.
        httpx.get(f"{url}/health", timeout=30)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        parser.error(f"no Prefect server answers at PREFECT_API_URL={url}: {error}")
