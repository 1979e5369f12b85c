"""VICReg against numbers of the authors' code.

Made with facebookresearch/vicreg, main_vicreg.py (VICReg, LARS, adjust_learning_rate and the loop), commit 4e12602:
twelve epochs of one step on `TinyConvNet` in float64 on one process, ten of them the warm-up, expander 7-7-8, batch
5, base rate 4, weight decay 0.05, weights and views as in `rules` and `runs`.
"""

import pytest

from src.models.joint_embedding.vicreg import VICReg
from src.optim import OptimizerRecipe, lars
from src.schedules import WarmupCosine
from tests.fidelity.rules import TinyConvNet, fill
from tests.fidelity.runs import batch, run, squares, views

LOSSES = [
    23.558466279470665,
    24.93701584430192,
    21.485501069118374,
    22.779434273839485,
    22.619557347154835,
    23.242146929621804,
    22.68038421240447,
    22.59428660454532,
    22.237081144755997,
    21.625545324020006,
    23.449859233925427,
    22.17743985413614,
]
# squared norms of the weights after the steps: backbone, projector
SQUARES = [
    7.310241427423289,
    9.614657238615425,
    12.357661786908874,
    1.8828968475655607,
    6.236976975135037,
    68.58595931402756,
    13.666864961704487,
    2.2128492482012465,
    6.14061714160015,
    6.365740808423327,
    5.379985020536062,
    2.569160524971546,
]


def test_twelve_steps_are_the_authors():
    recipe = OptimizerRecipe(lars, lr=4 * 5 / 256, weight_decay=0.05)
    method = VICReg(TinyConvNet(), recipe, hidden_dim=7, projection_dim=8).double()
    fill(method.parameters())
    rate = WarmupCosine(peak=recipe.lr, warmup="10 epochs", end=0.001 * recipe.lr)
    batches = [batch(views(step)) for step in range(12)]
    assert run(method, batches, {"optimizer": {"lr": rate}}, epochs=12) == pytest.approx(LOSSES, rel=1e-12)
    assert squares(method.parameters()) == pytest.approx(SQUARES, rel=1e-12)
