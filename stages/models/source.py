"""Where a base model comes from: a local folder or a Hub repository in the diffusers layout, and what identifies it.

A component's identity is made of what is in it (the digests of its weight files, and of its configuration without the
keys that only say who wrote it when), so that a folder and a Hub repository of the same bytes are the same model to
every fingerprint. On the Hub it is read off the repository's file list: no weights are downloaded to make a plan.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from stages.core.errors import ConfigError
from stages.core.fingerprint import digest_lines, digest_of
from stages.core.statcache import StatCache
from stages.core.store import Store
from stages.models.config import FIELD, ModelSection
from stages.models.hub import HubFiles

MODELS = ("vae", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
COMPONENTS = (*MODELS, *TOKENIZERS, "scheduler")

_INDEX = "model_index.json"
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
_SMALL_SUFFIXES = (".json", ".txt", ".model")
_VOLATILE_KEYS = ("_name_or_path", "_diffusers_version", "transformers_version")
_REPO_NAME = re.compile(r"[\w.\-]+/[\w.\-]+")


class ModelFiles(Protocol):
    """The files of a model, wherever they are; paths are relative and use '/'."""

    @property
    def where(self) -> str: ...

    def names(self) -> list[str]: ...

    def sha256(self, path: str) -> str: ...

    def read(self, path: str) -> bytes: ...

    def fetch(self, paths: Iterable[str]) -> Path: ...


class FolderFiles:
    """The files of a model in a local folder."""

    def __init__(self, folder: Path, digests: StatCache) -> None:
        self.folder = folder
        self._digests = digests

    @property
    def where(self) -> str:
        return f"the folder {self.folder}"

    def names(self) -> list[str]:
        paths = [*self.folder.glob("*"), *self.folder.glob("*/*")]
        return sorted(path.relative_to(self.folder).as_posix() for path in paths if path.is_file())

    def sha256(self, path: str) -> str:
        return self._digests.digest(self.folder / path)

    def read(self, path: str) -> bytes:
        return (self.folder / path).read_bytes()

    def fetch(self, paths: Iterable[str]) -> Path:
        for path in paths:
            if not (self.folder / path).is_file():
                raise ConfigError(f"{FIELD}: {self.where} has lost {path} since it was looked at")
        return self.folder


# One look at the Hub for each opened store: all stages of a run see the same commit, even if a branch moves meanwhile.
_OPENED: WeakKeyDictionary[Store, dict[tuple[str, str | None], ModelFiles]] = WeakKeyDictionary()


class ModelSource:
    """A Stable Diffusion 3 / 3.5 pipeline in the diffusers layout. Cheap to make; looks at its files when asked.

    Args:
        section: which model.
        store: whose cache remembers the digests of local files.
    """

    def __init__(self, section: ModelSection, store: Store) -> None:
        self.section = section
        self._store = store

    @property
    def name(self) -> str:
        """The model as the configuration names it."""
        return self.section.pretrained_model_name_or_path

    @property
    def commit(self) -> str | None:
        """The Hub commit that is read; None for a folder."""
        files = self.files
        return files.commit if isinstance(files, HubFiles) else None

    @property
    def files(self) -> ModelFiles:
        """The model's files; for a Hub repository, its revision is resolved at the first call.

        Raises:
            ConfigError: neither a folder nor a readable Hub repository.
            TransientError: the Hub did not answer.
        """
        opened = _OPENED.setdefault(self._store, {})
        key = (self.name, self.section.revision)
        if key not in opened:
            opened[key] = self._open()
        return opened[key]

    def _open(self) -> ModelFiles:
        folder = Path(self.name).expanduser()
        if folder.is_dir():
            return FolderFiles(folder.absolute(), self._store.digests)
        if not _REPO_NAME.fullmatch(self.name) or self.name.startswith("."):
            raise ConfigError(
                f"{FIELD}: there is no folder {self.name} here. Give the folder of a Stable Diffusion 3 in the "
                f"diffusers layout, or a Hub repository as 'owner/name'."
            )
        return HubFiles(self.name, self.section.revision, self._store.digests)

    # -- looking at it ------------------------------------------------------------------------------------------------

    def check(self, components: Iterable[str] = COMPONENTS) -> None:
        """Makes sure that the model can be read and has what is needed. Downloads a few kilobytes at most.

        Raises:
            ConfigError: it is not there, it may not be read, or a component is missing.
            TransientError: the Hub did not answer.
        """
        files = self.files
        self._check_layout()
        index = self._json(_INDEX)
        kind = str(index.get("_class_name"))
        if not kind.startswith("StableDiffusion3"):
            raise ConfigError(f"{FIELD}: {files.where} is a {kind}; loraline adapts Stable Diffusion 3 and 3.5")
        for component in components:
            if not any(index.get(component) or []):
                raise ConfigError(
                    f"{FIELD}: {files.where} comes without its {component}, which training needs; take the complete "
                    f"pipeline"
                )
            self._config_path(component)
            if component in MODELS:
                self.weights(component)

    def _check_layout(self) -> None:
        if _INDEX not in self.files.names():
            raise ConfigError(
                f"{FIELD}: {self.files.where} has no {_INDEX}, so it is not in the diffusers layout. A single-file "
                f"checkpoint has to be converted first; on the Hub, look for the repository named '...-diffusers'."
            )

    def config(self, component: str) -> dict[str, Any]:
        """A component's own configuration: 'config.json', or 'scheduler_config.json' of the scheduler.

        Raises:
            ConfigError: it has none, or it is not JSON.
        """
        return self._json(self._config_path(component))

    def identity(self, component: str) -> dict[str, str]:
        """What a component is, for fingerprints: {'weights', 'config'} of a model (or {'config'} of the scheduler),
        {'files'} of a tokenizer; each a hex sha256.

        Raises:
            ConfigError: the component is missing.
        """
        files = self.files
        if component in TOKENIZERS:
            self._config_path(component)
            lines = [f"{Path(path).name} {files.sha256(path)}" for path in self._small_files(component)]
            return {"files": digest_lines(lines)}
        config = {key: value for key, value in self.config(component).items() if key not in _VOLATILE_KEYS}
        identity = {"config": digest_of(config)}
        if component in MODELS:
            identity["weights"] = digest_lines(files.sha256(path) for path in self.weights(component))
        return identity

    def class_name(self, component: str) -> str:
        """The class that the model's index names for a component: 'T5TokenizerFast'."""
        entry = self._json(_INDEX).get(component)
        return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else "none"

    def variant(self, component: str) -> str | None:
        """The weight file variant to ask for: `model.variant` where this component has one, else None. Repositories
        give a variant for some of their components only."""
        variant = self.section.variant
        return variant if variant is not None and self._weights_named(component, variant) else None

    def folder(self, components: Iterable[str]) -> Path:
        """A local folder in the diffusers layout that holds these components (and, of a local model, all others).

        Of a Hub repository only their safetensors of one variant and their small files are downloaded, and verified.

        Raises:
            ConfigError: a component is missing.
            TransientError: the Hub did not answer, or sent wrong bytes.
        """
        wanted = [_INDEX]
        for component in components:
            self._config_path(component)
            wanted += self._small_files(component)
            if component in MODELS:
                wanted += self.weights(component)
        return self.files.fetch(wanted)

    # -- its files ----------------------------------------------------------------------------------------------------

    def _json(self, path: str) -> dict[str, Any]:
        try:
            record = json.loads(self.files.read(path))
        except (ValueError, UnicodeDecodeError) as error:
            raise ConfigError(f"{FIELD}: {path} of {self.files.where} is damaged: it is not JSON ({error})") from None
        if not isinstance(record, dict):
            raise ConfigError(f"{FIELD}: {path} of {self.files.where} is damaged: it holds no mapping")
        return record

    def _config_path(self, component: str) -> str:
        if component in TOKENIZERS:
            name = "tokenizer_config.json"
        else:
            name = "scheduler_config.json" if component == "scheduler" else "config.json"
        path = f"{component}/{name}"
        if path not in self.files.names():
            self._check_layout()
            raise ConfigError(f"{FIELD}: {self.files.where} has no {path}: the {component} is missing")
        return path

    def _inside(self, component: str) -> list[str]:
        """Files directly in a component's folder."""
        prefix = f"{component}/"
        return [path for path in self.files.names() if path.startswith(prefix) and "/" not in path[len(prefix) :]]

    def _small_files(self, component: str) -> list[str]:
        return [path for path in self._inside(component) if path.endswith(_SMALL_SUFFIXES)]

    def _weights_named(self, component: str, variant: str | None) -> list[str]:
        """A component's safetensors of a variant: one file, or all shards of it."""
        names = {Path(path).name: path for path in self._inside(component)}
        infix = f".{variant}" if variant else ""
        for stem in _WEIGHT_STEMS:
            if f"{stem}{infix}.safetensors" in names:
                return [names[f"{stem}{infix}.safetensors"]]
            # Shards name the variant before their number or, as older libraries wrote them, after it.
            number = r"-\d{5}-of-\d{5}"
            pattern = re.compile(
                rf"{stem}{re.escape(infix)}{number}\.safetensors|{stem}{number}{re.escape(infix)}\.safetensors"
            )
            shards = [path for name, path in sorted(names.items()) if pattern.fullmatch(name)]
            if shards:
                return shards
        return []

    def weights(self, component: str) -> list[str]:
        """Paths of a component's safetensors: those of the variant asked for, where it has them.

        Raises:
            ConfigError: it has none, or only pickled ones.
        """
        found = self._weights_named(component, self.section.variant) if self.section.variant else []
        found = found or self._weights_named(component, None)
        if found:
            return found
        inside = [Path(path).name for path in self._inside(component)]
        if any(name.endswith((".bin", ".pt", ".ckpt")) for name in inside):
            raise ConfigError(
                f"{FIELD}: the {component} of {self.files.where} has only pickled weights ({_listed(inside)}), which "
                f"can run code when they are read and are never loaded. Convert them to safetensors."
            )
        held = f" (it has {_listed(inside)})" if inside else ""
        hint = "; set model.variant" if any(name.endswith(".safetensors") for name in inside) else ""
        raise ConfigError(f"{FIELD}: {self.files.where} has no weights for its {component}{held}{hint}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
