from __future__ import annotations

import pytest
import torch
from diffusers.optimization import get_scheduler

from stages.train.config import TrainSection
from stages.train.schedule import learning_rate


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine", "polynomial"])
def test_it_is_diffusers_own(name: str, warmup: int) -> None:
    section = TrainSection.model_validate({"lr_scheduler": name, "lr_warmup_steps": warmup, "steps": 40})
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=section.learning_rate)
    scheduler = get_scheduler(name, optimiser, num_warmup_steps=warmup, num_training_steps=40)
    for step in range(40):
        assert learning_rate(section, step) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-9), step
        optimiser.step()
        scheduler.step()
