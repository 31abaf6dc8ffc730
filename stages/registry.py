"""The one list of stages. The command line, the flow's tasks, the deployments and the docs are made from it."""

from __future__ import annotations

from stages.bucket.stage import BucketStage
from stages.core.stage import Stage
from stages.download.stage import DownloadStage
from stages.embeds.stage import EmbedsStage
from stages.latents.stage import LatentsStage
from stages.publish.stage import PublishStage
from stages.train.stage import TrainStage

STAGES: tuple[Stage, ...] = (
    DownloadStage(),
    BucketStage(),
    LatentsStage(),
    EmbedsStage(),
    TrainStage(),
    PublishStage(),
)
