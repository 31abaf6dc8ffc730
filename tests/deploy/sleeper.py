"""A flow that only takes its time: for tests of what becomes of runs, deployed by tests/deploy/site.py."""

from __future__ import annotations

import time

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed


@flow(name="sleeper", persist_result=False)
def sleep_flow(seconds: float) -> State[str]:
    """Sleeps; ends well, under a name of its own as the sensor's runs do."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.2)
    return Completed(name="Skipped", message="slept", data="")
