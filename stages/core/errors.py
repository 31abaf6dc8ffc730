"""What can go wrong, by kind. The kind decides the exit code, and whether a retry can help.

Permanent kinds (bad configuration, bad data, a missing input) are never worth a retry; `TransientError` and
`PreemptedError` are. The numbers follow sysexits(3) where it has one that fits.
"""

from __future__ import annotations


class LoralineError(Exception):
    """Base of every error that is meant for the person who runs loraline: what was wrong, where, what to do."""

    exit_code = 1
    transient = False


class ConfigError(LoralineError):
    """The configuration is wrong: the message names the field and the nearest valid one."""

    exit_code = 78  # EX_CONFIG


class InputError(LoralineError):
    """The data is wrong: an empty folder, too few images, everything refused."""

    exit_code = 65  # EX_DATAERR


class MissingInputError(LoralineError):
    """A stage was asked to run before the stages that it reads from."""

    exit_code = 66  # EX_NOINPUT


class StoreError(LoralineError):
    """The store cannot be used: no permission, wrong address, or it does not keep its promises."""

    exit_code = 73  # EX_CANTCREAT


class CorruptBlobError(StoreError):
    """A blob's bytes are not the bytes that its name promises."""


class TransientError(LoralineError):
    """Worth another try: the network, a busy server, a full queue."""

    exit_code = 75  # EX_TEMPFAIL
    transient = True


class PreemptedError(TransientError):
    """The process was asked to leave (SIGTERM) and saved what it had."""

    exit_code = 143  # 128 + SIGTERM
