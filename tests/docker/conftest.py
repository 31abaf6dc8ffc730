"""An engine for the session, the image of target cpu, built by the Dockerfile at the root, and what stages read.

The containers get the configuration from the bucket, pictures and model from a Hub on loopback, and put the adapter
there. They share no volume, no user, no working folder.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NoReturn

import pytest

from tests.docker.engine import Engine, EngineUnavailableError, provide_base_image, provide_wheels, running_engine
from tests.pictures import TINY_SD3, draw_pictures
from tests.servers.hub import HubServer

IMAGE = "loraline:test-cpu"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A running engine; where there is none the tests are skipped with a warning, or fail if required."""
    with ExitStack() as stack:
        try:
            started = stack.enter_context(running_engine())
        except EngineUnavailableError as reason:
            unavailable(str(reason))
        yield started


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    """The image of target cpu."""
    given = os.environ.get("LORALINE_TEST_IMAGE")
    if given:
        return given
    provide_bases(engine)
    started = time.monotonic()
    engine.build("cpu", IMAGE, arguments={"LORALINE_REVISION": REVISION})
    size = int(engine.run("image", "inspect", "--format", "{{.Size}}", IMAGE).stdout)
    print(f"\n{IMAGE}: {size / 1e9:.2f} GB, built in {time.monotonic() - started:.0f} s")
    return IMAGE


def provide_bases(engine: Engine) -> None:
    """What images here are built from; where it cannot be had, the test ends as without an engine."""
    try:
        provide_base_image(engine)
    except EngineUnavailableError as reason:
        unavailable(str(reason))
    provide_wheels(engine)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub with eight pictures and the tiny model."""
    folder = tmp_path_factory.mktemp("hub")
    with HubServer(folder / "hub") as server:
        pictures = draw_pictures(folder / "pictures", 8)
        server.add_dataset("user/blots", {path.name: path.read_bytes() for path in sorted(pictures.iterdir())})
        files = {str(path.relative_to(TINY_SD3)): path.read_bytes() for path in TINY_SD3.rglob("*") if path.is_file()}
        server.add_model("user/tiny-sd3", files)
        yield server


def unavailable(reason: str) -> NoReturn:
    """Ends the test: a failure where containers are required, else a skip that is heard of."""
    if os.environ.get("LORALINE_REQUIRE_DOCKER") == "1":
        pytest.fail(f"LORALINE_REQUIRE_DOCKER=1, but: {reason}")
    warnings.warn(f"tests with containers are skipped: {reason}", pytest.PytestWarning, stacklevel=2)
    pytest.skip(reason)
