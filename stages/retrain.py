"""Retraining: which published adapter a new one follows (`train.previous`)."""

from __future__ import annotations

from dataclasses import replace

from stages.config import Config
from stages.pipeline import Node, Pipeline

TRAIN = Node("train")


def following(config: Config, previous: str | None) -> Config:
    """The configuration of a training that is measured against (and, by choice, starts from) that train artifact."""
    return config.model_copy(update={"train": config.train.model_copy(update={"previous": previous})})


def against_published(pipeline: Pipeline) -> Config:
    """The pipeline's configuration, measured against what it published last; as it is, where it published nothing.

    Where nothing has changed since that adapter was made, it is the configuration that made it, so that running it does
    nothing, instead of training a successor of the same pictures and settings.
    """
    current = pipeline.published()
    if current is None:
        return pipeline.config
    made = pipeline.store.manifest(TRAIN.stage, current)
    again = following(pipeline.config, made.spec.get("train", {}).get("previous") if made is not None else None)
    before_publish = [stage for stage in pipeline.stages if stage.name != "publish"]
    # The same pipeline with another `previous`: what was looked up of sources and models stays looked up.
    steps = replace(pipeline, config=again, stages=before_publish).plan()
    if any(step.node == TRAIN and step.fingerprint == current for step in steps):
        return again
    return following(pipeline.config, current)
