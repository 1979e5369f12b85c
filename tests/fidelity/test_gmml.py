"""GMML against numbers of the authors' code.

Made with Sara-Ahmed/GMML, vision_transformer.py, utils.py and the loop of main.py, commit 1882712, in float64: three
epochs of two steps of AdamW (rate 0.01, an epoch of warm-up, a cosine to 0.0001, weight decay from 0.04 to 0.4, each
gradient clipped to a norm of 0.05). A ViT of width 12 and depth 3 with two heads reads two views of four images of 16
pixels in patches of 4 a step, and reconstructs them from its blocks 1 and 3. View v of a step is corrupted where
`by_rule` of number (30, 40)[v] + step is above 0.1, by the values of number (50, 60)[v] + step. Weights and views are
those of `rules`.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from src.callbacks.gradients import ClipEachParameter
from src.models.masked.gmml import GMML
from src.optim import OptimizerRecipe, adamw
from src.schedules import Cosine, WarmupCosine
from tests.fidelity.rules import by_rule, fill
from tests.fidelity.runs import batch, run, squares, views
from tests.toys import small_vit

LOSSES = [1.1622616112119841, 1.1574831563243784, 0.9154854516392815, 0.8822448377951762, 0.847215155199048]
LOSSES += [0.7960471668148137]
SQUARES = [0.5168507804111503, 8.899330436303602, 25.891655476702987, 13.91502356163016, 13.329369504216535]
SQUARES += [11.118860099961992, 19.533520878516487, 37.55771862570131, 6.550524687824929, 11.230029324380993]
SQUARES += [12.913134911955378, 13.903438943079065, 25.72697697111415, 49.55951780905555, 25.849732518754365]
SQUARES += [13.078708420263993, 10.966927557308864, 12.252993880667884, 19.556819581039363, 37.479358652031664]
SQUARES += [6.312782046549449, 12.98749937404287, 13.737189708749888, 11.517100927581785, 25.708608699922962]
SQUARES += [51.71945875297773, 26.08816602502901, 11.271787409892571, 12.060642379601848, 14.366922408030415]
SQUARES += [20.066256464140697, 37.577129851926344, 6.46824957317163, 13.937117531233866, 11.613243908637797]
SQUARES += [11.260333954010296, 26.311420274482362, 51.53820694679381, 25.834775495166966, 11.844785780054373]
SQUARES += [14.013494122272999, 12.70946774927842, 6.446530727067463, 12.424067445669747, 6.561070402649801]
SQUARES += [11.842554610185951, 6.400913658760568, 13.37234813986893, 26.08728591629759, 1.8130234597269936]


class ByRule:
    """Corrupts views by the rule."""

    step = 0

    def __call__(self, views: Tensor) -> tuple[Tensor, Tensor]:
        masks = torch.stack([by_rule((4, 1, 16, 16), number + self.step, 1.0) > 0.1 for number in (30, 40)], dim=1)
        noise = torch.stack([by_rule((4, 3, 16, 16), number + self.step, 1.0) for number in (50, 60)], dim=1)
        self.step += 1
        return torch.where(masks, noise, views), masks


def test_six_steps_are_the_authors() -> None:
    vit: Any = small_vit(patch_size=4, embed_dim=12, depth=3)
    method = GMML(vit, OptimizerRecipe(adamw, lr=0.01, weight_decay=0.04), blocks=(1, 3)).double()
    method.corruption = ByRule()  # type: ignore[assignment]
    fill(method.parameters())
    schedules = {
        "optimizer.lr": WarmupCosine(peak=0.01, warmup="1 epoch", end=1e-4, inclusive=True),
        "optimizer.weight_decay": Cosine(start=0.04, end=0.4),
    }
    batches = [batch(views(step, count=4, side=16)) for step in range(6)]
    losses = run(method, batches, schedules, ClipEachParameter(0.05), epochs=3)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(method.parameters()) == pytest.approx(SQUARES, rel=1e-12)
