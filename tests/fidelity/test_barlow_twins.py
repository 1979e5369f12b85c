"""Barlow Twins against numbers of the authors' code.

Made with facebookresearch/barlowtwins, main.py (BarlowTwins, LARS, adjust_learning_rate and the loop), commit
8e8d284: twelve epochs of one step on `TinyConvNet` in float64 on one process, ten of them the warm-up, projector
7-7-8, lambda 0.3, batch 5, base rates 40 of matrices and 2 of biases and norms, weight decay 0.05, weights and views
as in `rules` and `runs`.
"""

import pytest

from src.models.joint_embedding.barlow_twins import BarlowTwins
from src.optim import OptimizerRecipe, Rule, lars
from src.schedules import WarmupCosine
from tests.fidelity.rules import TinyConvNet, fill
from tests.fidelity.runs import batch, run, squares, views

LOSSES = [
    19.61347731766673,
    18.856252807427445,
    22.643306407788387,
    16.351508819861788,
    15.606903380372655,
    15.231220827879174,
    18.44381013951372,
    20.310449087277558,
    17.848521225149224,
    20.965096601515185,
    22.36553628475795,
    11.399967847961715,
]
# squared norms of the weights after the steps: backbone, projector
SQUARES = [
    7.3100784540100925,
    47.15509153994905,
    9.344976072631379,
    1.882945508625923,
    81.69270933143785,
    14.312742530886297,
    2.193322381090086,
    29.468586557936913,
    4.13068867939353,
    2.587490828974431,
]


def test_twelve_steps_are_the_authors():
    rules = [Rule("", max_axes=1, lr_multiplier=2 / 40)]
    recipe = OptimizerRecipe(lars, lr=40 * 5 / 256, weight_decay=0.05, rules=rules)
    method = BarlowTwins(TinyConvNet(), recipe, off_diagonal_weight=0.3, hidden_dim=7, projection_dim=8).double()
    fill(method.parameters())
    rate = WarmupCosine(peak=recipe.lr, warmup="10 epochs", end=0.001 * recipe.lr)
    batches = [batch(views(step)) for step in range(12)]
    assert run(method, batches, {"optimizer": {"lr": rate}}, epochs=12) == pytest.approx(LOSSES, rel=1e-12)
    assert squares(method.parameters()) == pytest.approx(SQUARES, rel=1e-12)
