"""An engine for the session, and the image of target cpu, built by the Dockerfile at the root."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator

import pytest

from tests.docker.engine import Engine, EngineUnavailableError, provide_base_image, provide_wheels, running_engine

IMAGE = "loraline:test-cpu"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A running engine; where there is none the tests are skipped with a warning, or fail if required."""
    running = running_engine()
    try:
        started = running.__enter__()
    except EngineUnavailableError as reason:
        _unavailable(str(reason))
    try:
        yield started
    finally:
        running.__exit__(None, None, None)


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    """The image of target cpu."""
    given = os.environ.get("LORALINE_TEST_IMAGE")
    if given:
        return given
    try:
        provide_base_image(engine)
    except EngineUnavailableError as reason:
        _unavailable(str(reason))
    provide_wheels(engine)
    started = time.monotonic()
    engine.build("cpu", IMAGE, arguments=[f"LORALINE_REVISION={REVISION}"])
    size = int(engine.run("image", "inspect", "--format", "{{.Size}}", IMAGE).stdout)
    print(f"\n{IMAGE}: {size / 1e9:.2f} GB, built in {time.monotonic() - started:.0f} s")
    return IMAGE


def _unavailable(reason: str) -> None:
    if os.environ.get("LORALINE_REQUIRE_DOCKER") == "1":
        pytest.fail(f"LORALINE_REQUIRE_DOCKER=1, but: {reason}")
    warnings.warn(f"tests with containers are skipped: {reason}", pytest.PytestWarning, stacklevel=2)
    pytest.skip(reason)
