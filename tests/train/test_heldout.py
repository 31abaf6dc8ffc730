from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel

from stages.train.draws import seed_for
from stages.train.heldout import choose_held_out
from tests.train.conftest import digest

IMAGES = [digest(str(number)) for number in range(100)]


def test_choice_keeps_still_when_a_data_set_grows() -> None:
    before = choose_held_out(IMAGES[:80], 0.1, 64, 1)
    after = choose_held_out(IMAGES, 0.1, 64, 1)
    assert len(before) == 8
    assert len(after) == 10
    assert len(before & after) >= 6
    assert choose_held_out(reversed(IMAGES), 0.1, 64, 1) == after


@pytest.mark.parametrize(
    ("images", "share", "at_most", "needed", "expected"),
    [
        (100, 0.0, 64, 1, 0),
        (100, 0.5, 10, 1, 10),
        (5, 0.01, 64, 4, 1),
        (5, 0.5, 64, 4, 1),
        (4, 0.5, 64, 4, 0),
        (3, 0.5, 64, 4, 0),
    ],
)
def test_training_keeps_what_it_needs(images: int, share: float, at_most: int, needed: int, expected: int) -> None:
    assert len(choose_held_out(IMAGES[:images], share, at_most, needed)) == expected


def test_loss_is_measured_by_hand(make: Any, model_folder: Any) -> None:
    """Before the first step: the plain model's loss on the held-out pictures, at noise levels 1/4 and 3/4, shifted."""
    made = make(
        {(64, 48): 12, (48, 48): 8}, train__evaluation={"share": 0.2, "sigmas": 2, "every": 2, "max_samples": 4}
    )
    manifest = made.run(validation__prompts=[], train__sigmas__shift="auto")
    record = json.loads(made.store.read_blob(manifest.file("evaluation.json")))
    keys = [entry["key"] for entry in record["held_out"]]
    assert set(keys) == {
        key
        for key in made.latents
        if digest(f"image {key}") in choose_held_out([digest(f"image {k}") for k in made.latents], 0.2, 4, 2)
    }
    assert [found["step"] for found in record["rounds"]] == [0, 2, 4]
    model = SD3Transformer2DModel.from_pretrained(model_folder / "transformer")
    losses = []
    for key in keys:
        for place, level in enumerate((0.25, 0.75)):
            x = made.latents[key]
            shift = torch.tensor(0.5 + (x[0].numel() / 4 - 256) * 0.65 / 3840).exp()
            s = shift * level / (1 + (shift - 1) * level)
            e = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed_for(0, "held out", key, place)))
            text, pooled = made.texts[made.captions[key]]
            with torch.no_grad():
                v = model(((1 - s) * x + s * e)[None], text[None], pooled[None], 1000 * s[None]).sample[0]
            losses.append(((v - (e - x)) ** 2).mean())
    assert record["rounds"][0]["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert record["rounds"][0]["by_sigma"]["0.7500"] == pytest.approx(float(torch.stack(losses[1::2]).mean()), rel=1e-5)
    assert record["rounds"][2]["loss"] != record["rounds"][0]["loss"]


def test_held_out_pictures_are_never_trained_on(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.train.loop import Trainer

    trained: set[str] = set()
    real = Trainer.read_batch

    def noted(self: Any, number: int) -> Any:
        batch = real(self, number)
        trained.update(batch.keys)
        return batch

    monkeypatch.setattr(Trainer, "read_batch", noted)
    made = make({(64, 48): 6}, train__steps=12)
    manifest = made.run(validation__prompts=[])
    held = {entry["key"] for entry in json.loads(made.store.read_blob(manifest.file("evaluation.json")))["held_out"]}
    assert len(held) == 1
    assert trained == set(made.latents) - held
