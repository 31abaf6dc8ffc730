"""A deployed server for each module that asks for one, and a bucket for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.site import applied
from tests.flows.site import Site
from tests.servers.prefect import PrefectServer
from tests.servers.s3 import S3Server


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A server with deploy/ applied to it."""
    with applied(tmp_path_factory.mktemp("prefect")) as site:
        yield site.server


@pytest.fixture
def site(deployed: PrefectServer, moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    for key, value in moto.environment().items():
        monkeypatch.setenv(key, value)
    return Site(deployed, moto.with_new_bucket(), tmp_path)
