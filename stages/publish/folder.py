"""Publishing into a folder: it is either as it was, or holds the whole new adapter; foreign files stay."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from stages.core.artifact import Manifest
from stages.core.errors import ConfigError
from stages.core.fingerprint import digest_file
from stages.core.statcache import StatCache
from stages.publish.package import ADAPTER, RECORD, Item, Package, left_over

TEMPORARY = ".loraline-publish-"
# A hidden folder of a publication that was killed; one that is younger may be another process at work.
LEFT_BEHIND_S = 3600


def check_folder(path: str) -> None:
    """Raises:
    ConfigError: it is a file, or it cannot be written.
    """
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"publish.path: {folder} is a file; give a folder")
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ConfigError(f"publish.path: {nearest} is a file, so {folder} cannot be made in it")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"publish.path: no permission to write {nearest}")


def publish_to_folder(package: Package, path: str) -> dict[str, Any]:
    """Puts the package there, unless it is there already.

    A new folder appears by one rename. In an existing one every file is replaced by a rename, the record last: a
    reader that trusts the record and its digests never takes a mixture for an adapter, and a publication that was
    killed half-way is made good by the next one.

    Returns:
        What was done, for the manifest.
    Raises:
        ConfigError: the folder cannot be written.
    """
    folder = Path(path).expanduser()
    try:
        if folder.is_dir():
            changed = _replace(package, folder)
        else:
            _create(package, folder)
            changed = len(package.items)
    except OSError as error:
        raise ConfigError(f"publish.path: cannot write {folder} ({error.strerror or error})") from error
    return {"path": path, "files_written": changed}


def gone_from_folder(manifest: Manifest, path: str, digests: StatCache) -> str | None:
    """Why the published adapter is no longer the one of the manifest, or None."""
    local = Path(path).expanduser() / ADAPTER
    expected = manifest.info["files"][ADAPTER]
    if not local.is_file():
        return f"{path} no longer holds {ADAPTER}"
    if local.stat().st_size != expected["bytes"] or digests.digest(local) != expected["sha256"]:
        return f"{ADAPTER} in {path} was changed"
    return None


def _create(package: Package, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder.parent))
    try:
        for item in package.items:
            _copy(item, temporary)
        temporary.chmod(0o755)  # mkdtemp's folders are for their maker alone
        _sync_folder(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(folder.parent)


def _replace(package: Package, folder: Path) -> int:
    _sweep(folder)
    changed = [item for item in package.items if not _is_there(item, folder)]
    old = _read_record(folder)
    if changed:
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
        try:
            for item in changed:
                _copy(item, temporary)
            for item in changed:  # the record is the last of a package
                target = folder / item.path
                target.parent.mkdir(parents=True, exist_ok=True)
                (temporary / item.path).replace(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _sync_folder(folder)
    for name in left_over(old, package):
        (folder / name).unlink(missing_ok=True)
    return len(changed)


def _is_there(item: Item, folder: Path) -> bool:
    target = folder / item.path
    return target.is_file() and target.stat().st_size == item.bytes and digest_file(target) == item.sha256


def _read_record(folder: Path) -> Any:
    try:
        return json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return None


def _copy(item: Item, folder: Path) -> None:
    target = folder / item.path
    target.parent.mkdir(parents=True, exist_ok=True)
    with item.local.open("rb") as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(folder: Path) -> None:
    for path in folder.glob(f"{TEMPORARY}*"):
        if time.time() - path.stat().st_mtime > LEFT_BEHIND_S:
            shutil.rmtree(path, ignore_errors=True)
