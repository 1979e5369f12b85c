"""SupCon against numbers of the authors' code.

Made with HobbitLong/SupContrast, losses.py, networks/resnet_big.py (SupConResNet), util.py (adjust_learning_rate,
set_optimizer) and train of main_supcon.py, commit 66a8fe5: three of four epochs of one step with --cosine and without
--warm, in float64 on `TinyConvNet`, feat_dim 8, temperature 0.3, rate 0.1, weight decay 0.01, five images of three
classes. Weights and views as in `rules` and `runs`.
"""

import math
from dataclasses import dataclass

import pytest
import torch

from src.models.supervised.supcon import SupCon
from src.optim import OptimizerRecipe, Rule, sgd
from src.schedules import Horizon, Schedule
from tests.fidelity.rules import TinyConvNet, fill
from tests.fidelity.runs import batch, run, squares, views

LOSSES = [9.416432613380138, 9.416992937946063, 9.416261801360763]
# squared norms of the weights after the steps: backbone, projector
SQUARES = [
    7.27844648494789,
    4.841736647408479,
    7.073888060865573,
    1.6071986446376032,
    5.134142896253265,
    2.2070528053120992,
    8.853620947208052,
]


@dataclass(frozen=True)
class Rates(Schedule):
    """The authors' rate of each epoch, counted from 1: half a cosine to a thousandth of 0.1 over four epochs."""

    def value(self, step: int, horizon: Horizon) -> float:
        return 1e-4 + (0.1 - 1e-4) * (1 + math.cos(math.pi * (step + 1) / 4)) / 2


def test_three_steps_are_the_authors():
    recipe = OptimizerRecipe(sgd, lr=0.1, weight_decay=0.01, rules=[Rule("", weight_decay=0.01)])
    method = SupCon(TinyConvNet(), recipe, temperature=0.3, projection_dim=8).double()
    fill(method.parameters())
    batches = [batch(views(step)) | {"label": torch.tensor([0, 1, 0, 2, 1])} for step in range(3)]
    losses = run(method, batches, {"optimizer": {"lr": Rates()}}, epochs=3)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(method.parameters()) == pytest.approx(SQUARES, rel=1e-12)
