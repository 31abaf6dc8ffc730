"""What the rooms that talk to the Hugging Face Hub share: its address, trying again, what an error means, whole files.

Which field of the configuration an answer concerns is the rooms' knowledge: a room that reads says it with a `Remote`,
the one that writes puts every `Trouble` into words of its own. The client is imported late, like all heavy libraries:
`--help` stays fast.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from stages.core.errors import ConfigError, LoralineError, TransientError
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


def _login() -> str | None:
    """What the client shows to the Hub, in words; None where it shows nothing."""
    from huggingface_hub import get_token

    return "HF_TOKEN" if read_token() else "the saved login" if get_token() else None


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

    if isinstance(error, LocalEntryNotFoundError):
        cause = _unwrapped(error)
        return trouble(cause) if cause is not error else None
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
    """The first line of an error's text, with the next where it announces it; its kind where it has no text."""
    error = _unwrapped(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def _unwrapped(error: BaseException) -> BaseException:
    """What kept the client from the server, where it only says that a file is not in its cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None else error


# -- reading a repository ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remote:
    """A repository that is read, in the words of the person who named it: every error says which field it concerns.

    Args:
        thing: what it is called in messages: 'the Hub data set owner/name'.
        repo: 'owner/name'.
        path: of its page: that of a data set begins with 'datasets/'.
        field: the configuration's field that names it.
        revision_field, revision: the same of the branch, tag or commit that is asked for.
        absent: what is not there if it is not there: 'Hub data set owner/name'.
    """

    thing: str
    repo: str
    path: str
    field: str
    revision_field: str
    revision: str | None
    absent: str

    def ask(self, what: str, call: Callable[[], T]) -> T:
        """Runs a call of the client until it works, or is known not to.

        Args:
            what: what the call does, for messages: 'look up'.

        Raises:
            ConfigError: no such repository or revision, no right to read it, or an answer that no retry can change.
            TransientError: the Hub did not answer.
        """
        return ask(call, lambda error: self._told(what, error))

    def whole(
        self, name: str, identity: str, download: Callable[[], str], sha256: Callable[[Path], str] = digest_file
    ) -> Path:
        """Downloads a file and makes sure of every byte: the client takes wrong ones of the right number.

        Args:
            name: the file's path in the repository.
            identity: what the Hub calls its bytes (see `identity`).
            download: the call of the client; returns the local path.
            sha256: how a local file's sha256 is found, where that is remembered.

        Raises:
            ConfigError: as `ask`.
            TransientError: the Hub did not answer, or sent wrong bytes twice.
        """
        for _ in range(2):
            local = Path(self.ask(f"download {name} of", download))
            if is_whole(local, identity, sha256):
                return local
            # The client keeps it under the name of the right bytes, and would hand it out again for ever.
            local.resolve().unlink(missing_ok=True)
            local.unlink(missing_ok=True)
        raise TransientError(
            f"{self.field}: {name} of {self.thing}: the bytes that arrive do not match the digest that the Hub states "
            f"(twice). Run again later, or look at the proxy or mirror in between."
        )

    def _told(self, what: str, error: Exception) -> LoralineError:
        """What an answer of the Hub means for the person."""
        field, repo, line, site, login = self.field, self.repo, first_line(error), page(self.path), _login()
        match trouble(error):
            case "offline":
                return ConfigError(f"{field}: HF_HUB_OFFLINE is set, so {repo} cannot be read from the Hub; unset it")
            case "gated":
                return ConfigError(
                    f"{field}: {repo} is gated: accept its terms at {site} with your account, then set HF_TOKEN to a "
                    f"token of that account with read access."
                )
            case "no repository":
                hint = f"{login} may not read it, if it is private" if login else "a private one needs HF_TOKEN"
                return ConfigError(
                    f"{field}: there is no {self.absent} that may be read at {site}. Check the name; {hint}."
                )
            case "no revision":
                return ConfigError(f"{self.revision_field}: {repo} has no revision {self.revision!r}; see {site}")
            case "bad name":
                return ConfigError(f"{field}: there is no {self.absent}: {line}")
            case "bad token" if login:
                return ConfigError(f"{field}: the Hub does not accept {login} ({line}); make a new token")
            case "forbidden" if login:
                return ConfigError(f"{field}: {login} may not read {repo} ({line})")
            case "bad token" | "forbidden":
                return ConfigError(f"{field}: {repo} may not be read without HF_TOKEN ({line})")
        text = f"{field}: cannot {what} {self.thing} at {site}: {line}"
        if is_transient(error):
            return TransientError(f"{text} (after {ATTEMPTS} attempts)")
        return ConfigError(text)


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
