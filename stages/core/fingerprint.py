"""Fingerprints: sha256 over canonical JSON. The one way in which loraline decides that two things are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces, no NaN: equal values give equal text on every machine.

    Raises:
        ValueError: the value holds NaN or infinity.
        TypeError: the value is not JSON.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """Hex sha256 of a JSON value's canonical text."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_bytes(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def digest_lines(lines: Iterable[str]) -> str:
    """Hex sha256 of sorted text lines: a digest of a set that does not depend on its order."""
    sha = hashlib.sha256()
    for line in sorted(lines):
        sha.update(line.encode())
        sha.update(b"\n")
    return sha.hexdigest()


def digest_file(path: Path) -> str:
    """Hex sha256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(stage: str, version: int, spec: dict[str, Any], inputs: dict[str, str]) -> str:
    """The name of an artifact before it is made: stage, its version, settings that decide it, digests of its inputs."""
    return digest_of({"stage": stage, "version": version, "spec": spec, "inputs": inputs})
