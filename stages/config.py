"""The configuration tree: one YAML file, one section a stage.

Each section lives beside the stage that reads it; this file only puts them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from stages.bucket.config import BucketOverrides, BucketSection
from stages.core import config as machinery
from stages.core.config import Section
from stages.core.store import StoreSection
from stages.download.config import DownloadSection, Source
from stages.embeds.config import EmbedsSection
from stages.latents.config import LatentsSection
from stages.models.config import ModelSection
from stages.publish.config import PublishSection
from stages.train.config import TrainSection, ValidationSection


def _source_as_choice(schema: dict[str, Any]) -> None:
    # Forms know "any of these" and offer a choice; for "one of these" they show a box for JSON.
    source = schema["properties"]["source"]
    source["anyOf"] = source.pop("oneOf")
    source.pop("discriminator")


class DatasetSection(Section):
    """One data set: where its images and captions are, and how it is cropped and repeated."""

    model_config = ConfigDict(json_schema_extra=_source_as_choice)

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9_\-]{0,47}$")
    """Short unique name: lower-case letters, digits, '-' and '_'."""
    source: Source
    """A folder, or a data set repository on the Hub."""
    caption_strategy: Literal["filename", "textfile"] = "textfile"
    """'textfile': a .txt beside the image with the same name; 'filename': the name itself, '_' read as a space."""
    repeats: int = Field(default=0, ge=0)
    """Extra passes over this data set in every epoch; 0 shows each image once."""
    bucket: BucketOverrides = BucketOverrides()
    """Fields of the `bucket` section that differ for this data set."""


Executor = Literal["inline", "deployment"]
# The registry's names (a test holds them equal): the tree is put together below the registry.
StageName = Literal["download", "bucket", "latents", "embeds", "train", "publish"]


class FlowSection(Section):
    """How an orchestrator runs the stages. Nothing in here changes what they make."""

    executor: Executor = "inline"
    """'inline': each stage in a process beside the flow; 'deployment': each through its own deployment, on the work
    pool, image and hardware that are named there."""
    executors: dict[StageName, Executor] = Field(default_factory=dict)
    """Stages that are run differently: {latents: deployment, train: deployment} keeps the rest inline."""
    deployment: str = "stage/{stage}"
    """Name of a stage's deployment, as 'flow/deployment'."""
    retries: int = Field(default=2, ge=0)
    """How often a stage is tried again after a transient failure. Wrong settings and bad data are never tried again."""

    @field_validator("deployment")
    @classmethod
    def _names_the_stage(cls, deployment: str) -> str:
        try:
            if deployment.format(stage="a") == deployment.format(stage="b"):
                raise ValueError("holds no {stage}, so all stages would run the same deployment")
        except (KeyError, IndexError):
            raise ValueError("may hold {stage} and no other name in braces") from None
        return deployment

    def executor_of(self, stage: str) -> Executor:
        return {str(name): executor for name, executor in self.executors.items()}.get(stage, self.executor)


class Config(Section):
    """A whole run: captioned images in, a published LoRA out."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_\-]{0,62}$")
    """Name of the run and of its adapter: lower-case letters, digits, '-' and '_'."""
    seed: int = Field(default=0, ge=0)
    """Everything random in a run follows from this number."""
    store: StoreSection = StoreSection()
    """Where artifacts are kept: any fsspec location, on an object store for stages on several machines."""
    model: ModelSection
    """The base model."""
    datasets: list[DatasetSection] = Field(min_length=1)
    """What to learn from."""
    download: DownloadSection = DownloadSection()
    """Copying originals into raw shards."""
    bucket: BucketSection = BucketSection()
    """Scaling and cropping."""
    latents: LatentsSection = LatentsSection()
    """Encoding pictures."""
    embeds: EmbedsSection = EmbedsSection()
    """Encoding captions."""
    train: TrainSection = TrainSection()
    """Training the adapter."""
    validation: ValidationSection = ValidationSection()
    """Pictures drawn along the way."""
    publish: PublishSection
    """Where the adapter goes."""
    flow: FlowSection = FlowSection()
    """How the stages are run."""

    @model_validator(mode="after")
    def _datasets_agree(self) -> Config:
        ids = [dataset.id for dataset in self.datasets]
        if len(set(ids)) != len(ids):
            raise ValueError(f"datasets: the ids must differ, these are {ids}")
        for dataset in self.datasets:
            try:
                dataset.bucket.applied_to(self.bucket)
            except ValidationError as error:
                reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
                raise ValueError(f"datasets: {dataset.id}: {reason}") from None
        return self

    def dataset(self, dataset_id: str) -> DatasetSection:
        for dataset in self.datasets:
            if dataset.id == dataset_id:
                return dataset
        raise KeyError(dataset_id)


def load_config(path: str, overrides: Iterable[str] = (), environment: Mapping[str, str] | None = None) -> Config:
    """Reads a configuration file; see `stages.core.config.load`.

    Raises:
        ConfigError: in words that name the field.
    """
    return machinery.load(Config, path, overrides, environment)
