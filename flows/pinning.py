"""One commit for a whole run: whatever moves on the Hub meanwhile, all stages read the same data and the same model."""

from __future__ import annotations

from dataclasses import replace

from stages.models.source import ModelSource
from stages.pipeline import Pipeline


def pinned(pipeline: Pipeline) -> Pipeline:
    """The pipeline with every Hub data set and model at the commit that its revision stands for now."""
    config = pipeline.config
    datasets = []
    for node, dataset in zip(pipeline.nodes_of("download"), config.datasets, strict=True):
        commit = pipeline.spec(node)["source"].get("commit")
        if commit:
            dataset = dataset.model_copy(update={"source": dataset.source.model_copy(update={"revision": commit})})
        datasets.append(dataset)
    commit = ModelSource(config.model, pipeline.store).commit
    model = config.model.model_copy(update={"revision": commit}) if commit else config.model
    return replace(pipeline, config=config.model_copy(update={"datasets": datasets, "model": model}))
