"""What the rooms that talk to the Hugging Face Hub share: its address, trying again, what an error means, whole files.

Which field of the configuration an answer concerns is the rooms' knowledge: they put every `Trouble` into words. The
client is imported late, like all heavy libraries: `--help` stays fast.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from stages.core.errors import LoralineError
from stages.core.fingerprint import CHUNK_BYTES, digest_file

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
ATTEMPTS = 5
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0

Trouble = Literal["offline", "gated", "no repository", "no revision", "no file", "bad name", "bad token", "forbidden"]

_BUSY = {408, 429, 500, 502, 503, 504}
_TRANSPORTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
_SHA256_DIGITS = 64


# -- the environment --------------------------------------------------------------------------------------------------
# Read when it is needed: the client itself looks at these variables only when it is first imported.


def endpoint() -> str | None:
    """HF_ENDPOINT of the environment; None is the client's default."""
    return os.environ.get("HF_ENDPOINT") or None


def read_token() -> str | None:
    """HF_TOKEN of the environment; None lets the client look for a saved login."""
    return os.environ.get("HF_TOKEN") or None


def cache_folder() -> str | None:
    """The client's cache, by the variables that it documents; None is its default."""
    if os.environ.get("HF_HUB_CACHE"):
        return os.environ["HF_HUB_CACHE"]
    home = os.environ.get("HF_HOME")
    return str(Path(home).expanduser() / "hub") if home else None


def client(token: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), token=token)


def page(path: str) -> str:
    """Address of a page for people: 'owner/name' is a model's, 'datasets/owner/name' a data set's."""
    from huggingface_hub import constants

    return f"{(endpoint() or constants.ENDPOINT).rstrip('/')}/{path}"


# -- calls ------------------------------------------------------------------------------------------------------------


def retried(call: Callable[[], T]) -> T:
    """Runs a call of the client until it works, is known not to, or was tried `ATTEMPTS` times; then its error comes.

    The client alone is not enough: it does not retry a server's error on a file or on the repository's state.
    """
    retrying = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential_jitter(initial=FIRST_PAUSE_S, max=LONGEST_PAUSE_S, jitter=FIRST_PAUSE_S),
        retry=retry_if_exception(is_transient),
        reraise=True,
    )
    return retrying(call)


def ask(call: Callable[[], T], explain: Callable[[Exception], LoralineError]) -> T:
    """As `retried`, with the error that remains put into words by `explain`."""
    try:
        return retried(call)
    except LoralineError:
        raise
    except Exception as error:
        raise explain(error) from error


# -- errors -----------------------------------------------------------------------------------------------------------


def status(error: BaseException) -> int | None:
    """The HTTP status that an exception of the client carries."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def is_transient(error: BaseException | None) -> bool:
    """Whether another try can help: a busy or broken server, a cut or refused connection, a time limit."""
    while error is not None:
        code = status(error)
        if code is not None:
            return code in _BUSY
        if type(error).__name__ == "OfflineModeIsEnabled":  # a ConnectionError, but one that somebody asked for
            return False
        if type(error).__module__.split(".")[0] in _TRANSPORTS:
            return True
        if isinstance(error, ConnectionError | TimeoutError):
            return True
        error = error.__cause__ or error.__context__
    return False


def trouble(error: BaseException) -> Trouble | None:
    """What an error of the client means for the person, where trying again cannot help; None where it says nothing."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError):  # how the client wraps whatever kept it from the server
        return trouble(error.__cause__) if error.__cause__ is not None else None
    # In this order: a gated repository's error is a subclass of the missing one's, and both carry a status.
    kinds: tuple[tuple[type[Exception], Trouble], ...] = (
        (OfflineModeIsEnabled, "offline"),
        (GatedRepoError, "gated"),
        (RepositoryNotFoundError, "no repository"),
        (RevisionNotFoundError, "no revision"),
        (EntryNotFoundError, "no file"),
        (HFValidationError, "bad name"),
    )
    for kind, meaning in kinds:
        if isinstance(error, kind):
            return meaning
    by_status: dict[int | None, Trouble] = {401: "bad token", 403: "forbidden"}
    return by_status.get(status(error))


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its kind where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# -- files ------------------------------------------------------------------------------------------------------------


def identity(entry: Any) -> str:
    """How the Hub names a listed file's bytes: the sha256 of a large file, the git id of a small one."""
    return str(entry.lfs.sha256 if entry.lfs is not None else entry.blob_id)


def is_whole(local: Path, name: str, sha256: Callable[[Path], str] = digest_file) -> bool:
    """Whether a file holds exactly the bytes that the Hub calls `name` (see `identity`).

    Args:
        sha256: how its sha256 is found, where that is remembered.
    """
    return (sha256(local) if len(name) == _SHA256_DIGITS else git_id(local)) == name


def git_id(local: Path) -> str:
    """What git calls a file's content: hex sha1 over a short header and the bytes."""
    sha = hashlib.sha1(b"blob %d\0" % local.stat().st_size, usedforsecurity=False)
    with local.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()
