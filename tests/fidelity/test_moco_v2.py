"""MoCo v2 against numbers of the authors' code.

Made with facebookresearch/moco, moco/builder.py and main_moco.py (adjust_learning_rate, train), commit 5df3287: three
epochs of one step on `TinyConvNet` in float64, --mlp --cos, dim 8, queue of 10 keys (`by_rule` number 50,
normalized), temperature 0.2, teacher momentum 0.9, rate 0.3, weight decay 0.01; weights of both encoders and views as
in `rules` and `runs`.
"""

from functools import partial

import pytest
import torch

from src.callbacks.ema_teacher import EMATeacher
from src.models.joint_embedding.moco_v2 import MoCoV2
from src.optim import OptimizerRecipe, Rule
from src.schedules import WarmupCosine
from tests.fidelity.rules import TinyConvNet, by_rule, fill
from tests.fidelity.runs import batch, run, squares, views

LOSSES = [0.19186697314963644, 1.7904113649974118, 2.3732707822229813]
# squared norms of the weights after the steps: student, teacher; first channel of the queue
SQUARES = [
    7.175398084103538,
    4.767871497660888,
    6.973354178847281,
    1.6146579424106695,
    5.044786812881218,
    2.2668281029302637,
    8.770199330053948,
    6.669967160278528,
    4.738632497900584,
    6.399000970370892,
    1.4795636727356276,
    5.80200407124878,
    2.0108712147073673,
    8.823662903497066,
]
QUEUE = [
    -0.015011500197323445,
    -0.008771377347630987,
    -0.015117465031860563,
    -0.015139108718602587,
    -0.008709086527946655,
    -0.026331582440300438,
    -0.0285212986286637,
    -0.02156214145806685,
    -0.02848572444345905,
    -0.024377156232088047,
]


def test_three_steps_are_the_authors():
    sgd = partial(torch.optim.SGD, momentum=0.9)
    recipe = OptimizerRecipe(sgd, lr=0.3, weight_decay=0.01, rules=[Rule("", weight_decay=0.01)])
    method = MoCoV2(TinyConvNet(), recipe, queue_size=10, projection_dim=8, teacher_momentum=0.9).double()
    fill(method.parameters())
    method.queue.features.copy_(torch.nn.functional.normalize(by_rule((10, 8), 50), dim=1))
    schedules = {"optimizer": {"lr": WarmupCosine(peak=0.3, per_epoch=True)}}
    losses = run(method, [batch(views(step)) for step in range(3)], schedules, EMATeacher("before"), epochs=3)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(method.parameters()) == pytest.approx(SQUARES, rel=1e-12)
    assert method.queue.features[:, 0].tolist() == pytest.approx(QUEUE, rel=1e-12)
