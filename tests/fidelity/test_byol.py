"""BYOL against numbers of the authors' code.

Made with google-deepmind/deepmind-research, byol/byol_experiment.py (_update_fn), utils/networks.py (MLP),
optimizers.py, schedules.py and helpers.py, commit f5de0ed, in JAX with float64: four steps, two of them the warm-up,
of a haiku copy of `TinyConvNet`, hidden 7, output 8, LARS, peak rate 0.125, weight decay 0.05, target momentum from
0.9, batch 5. Weights and views as in `rules` and `runs`, in their layout; their augmentation and input normalization
are left out.
"""

import pytest

from src.callbacks.ema_teacher import EMATeacher
from src.models.joint_embedding.byol import BYOL
from src.optim import OptimizerRecipe, lars
from src.schedules import Cosine, WarmupCosine
from tests.fidelity.rules import TinyConvNet, fill
from tests.fidelity.runs import batch, run, squares, views

LOSSES = [4.847188888618764, 4.911340691963156, 4.795573783884822, 3.738794967609252]
# squared norms of the weights after the steps: student, teacher, predictor
SQUARES = [
    7.310499532673873,
    6.169935170187632,
    6.511401593826424,
    1.882964490261236,
    6.236976975134939,
    6.807660447326963,
    9.554864153339759,
    2.5870867716174826,
    6.032691880015472,
    5.902046664159793,
    7.466289993346328,
    1.6157813272602604,
    6.295684655010609,
    7.758062312985798,
    8.095307764496694,
    2.097145411006315,
    2.552237540991108,
    8.32774918199528,
    7.81567367630031,
    7.143520177437547,
    2.589509622027716,
]


def test_four_steps_are_the_authors():
    recipe = OptimizerRecipe(lars, lr=0.125, weight_decay=0.05)
    method = BYOL(TinyConvNet(), recipe, hidden_dim=7, projection_dim=8, teacher_momentum=0.9).double()
    fill(method.parameters())
    schedules = {
        "optimizer": {"lr": WarmupCosine(peak=0.125, warmup=2)},
        "teacher_momentum": Cosine(start=0.9, end=1.0),
    }
    losses = run(method, [batch(views(step)) for step in range(4)], schedules, EMATeacher("after"), epochs=1)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(method.parameters()) == pytest.approx(SQUARES, rel=1e-12)
