"""What the rooms share of the Hub: which errors mean what, how often a call is tried, whether a file is whole."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub import errors

from stages.core import hub
from stages.core.errors import ConfigError, InputError


def answered(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    return kind("said the server", response=httpx.Response(status, request=httpx.Request("GET", "http://127.0.0.1")))


def wrapped(cause: Exception) -> errors.LocalEntryNotFoundError:
    """How the client tells of what kept it from the server."""
    error = errors.LocalEntryNotFoundError("not in the cache")
    error.__cause__ = cause
    return error


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "FIRST_PAUSE_S", 0.0)


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (answered(errors.HfHubHTTPError, 503), True),
        (answered(errors.HfHubHTTPError, 429), True),
        (answered(errors.HfHubHTTPError, 400), False),
        (answered(errors.RepositoryNotFoundError, 404), False),
        (httpx.ReadTimeout("slow"), True),
        (httpx.ConnectError("refused"), True),
        (ConnectionResetError("cut"), True),
        (wrapped(httpx.ConnectError("refused")), True),
        (wrapped(answered(errors.HfHubHTTPError, 502)), True),
        (wrapped(errors.OfflineModeIsEnabled("offline")), False),
        (errors.OfflineModeIsEnabled("offline"), False),
        (ValueError("wrong"), False),
        (None, False),
    ],
)
def test_which_errors_are_worth_another_try(error: Exception | None, transient: bool) -> None:
    assert hub.is_transient(error) is transient


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (errors.OfflineModeIsEnabled("offline"), "offline"),
        (wrapped(errors.OfflineModeIsEnabled("offline")), "offline"),
        (answered(errors.GatedRepoError, 403), "gated"),
        (wrapped(answered(errors.GatedRepoError, 401)), "gated"),
        (answered(errors.RepositoryNotFoundError, 401), "no repository"),
        (answered(errors.RevisionNotFoundError, 404), "no revision"),
        (answered(errors.RemoteEntryNotFoundError, 404), "no file"),
        (errors.HFValidationError("no name"), "bad name"),
        (answered(errors.HfHubHTTPError, 401), "bad token"),
        (answered(errors.HfHubHTTPError, 403), "forbidden"),
        (answered(errors.HfHubHTTPError, 500), None),
        (wrapped(httpx.ConnectError("refused")), None),
        (errors.LocalEntryNotFoundError("not in the cache"), None),
        (ValueError("wrong"), None),
    ],
)
def test_what_an_error_means(error: Exception, meaning: str | None) -> None:
    assert hub.trouble(error) == meaning


def test_a_busy_server_is_asked_a_bounded_number_of_times() -> None:
    calls: list[int] = []

    def busy() -> str:
        calls.append(1)
        if len(calls) < hub.ATTEMPTS:
            raise answered(errors.HfHubHTTPError, 503)
        return "there"

    assert hub.retried(busy) == "there"
    assert len(calls) == hub.ATTEMPTS
    calls.clear()
    with pytest.raises(httpx.ReadTimeout):
        hub.retried(lambda: calls.append(1) or _raise(httpx.ReadTimeout("slow")))
    assert len(calls) == hub.ATTEMPTS


def test_a_permanent_error_is_told_at_once_and_our_own_are_left_alone() -> None:
    calls: list[int] = []
    with pytest.raises(InputError, match="in words: said the server"):
        hub.ask(
            lambda: calls.append(1) or _raise(answered(errors.HfHubHTTPError, 400)),
            lambda error: InputError(f"in words: {hub.first_line(error)}"),
        )
    assert len(calls) == 1
    with pytest.raises(ConfigError, match="ours"):
        hub.ask(lambda: _raise(ConfigError("ours")), lambda error: InputError("in words"))


def _raise(error: Exception) -> None:
    raise error


def test_the_first_line_of_an_error() -> None:
    assert hub.first_line(ValueError("\n  first \nsecond")) == "first"
    assert hub.first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert hub.first_line(ValueError("Bad request:\n\nno such page\nthird")) == "Bad request: no such page"
    assert hub.first_line(wrapped(httpx.ConnectError("refused"))) == "refused"


def test_a_file_is_whole_when_it_is_what_its_name_says(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"what is up, doc?")
    # The number is that of the book 'Pro Git', chapter 'Git Objects'.
    assert hub.git_id(path) == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"
    small = SimpleNamespace(lfs=None, blob_id="bd9dbf5aae1a3862dd1526723246b20206e5fc37")
    sha256 = hashlib.sha256(b"what is up, doc?").hexdigest()
    large = SimpleNamespace(lfs=SimpleNamespace(sha256=sha256), blob_id="of the pointer")
    assert hub.is_whole(path, hub.identity(small))
    assert hub.is_whole(path, hub.identity(large))
    assert hub.is_whole(path, "0" * 64, sha256=lambda local: "0" * 64)
    path.write_bytes(b"what is up, dog?")
    assert not hub.is_whole(path, hub.identity(small))
    assert not hub.is_whole(path, hub.identity(large))


def test_the_environment_is_read_when_it_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert (hub.endpoint(), hub.read_token(), hub.cache_folder()) == (None, None, None)
    assert hub.page("datasets/a/b").endswith("/datasets/a/b")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1/")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert hub.page("a/b") == "http://127.0.0.1:1/a/b"
    assert (hub.read_token(), hub.cache_folder()) == ("hf_x", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", "elsewhere")
    assert hub.cache_folder() == "elsewhere"
    assert hub.client("hf_x").endpoint == "http://127.0.0.1:1/"


def test_the_client_is_imported_late() -> None:
    code = (
        "import sys, stages.core.hub, stages.models.hub, stages.download.hub, stages.publish.hub\n"
        "print('huggingface_hub' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
