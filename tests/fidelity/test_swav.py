"""SwAV against numbers of the authors' code.

Made with facebookresearch/swav, main_swav.py (train, distributed_sinkhorn and the rates of main) and src/resnet50.py
(forward, forward_head) around `TinyConvNet`, commit 06b1b7c, with LARC of NVIDIA/apex, apex/parallel/LARC.py, commit
e13873d: five epochs of one step in float64 on one process, two of them the warm-up from 0.5 to 40, end 0.4, weight
decay 0.05, 2 + 2 crops of 8 and 6 pixels, 4 prototypes that are frozen for two steps, a queue of 10 from the first
epoch on, weights and crops as in `rules` and `runs`.
"""

import pytest

from src.callbacks.gradients import FreezeAtFirst
from src.models.joint_embedding.swav import SwAV
from src.optim import OptimizerRecipe, Rule, larc
from src.schedules import WarmupCosine
from tests.fidelity.rules import TinyConvNet, fill
from tests.fidelity.runs import batch, run, squares, views

LOSSES = [1.5342910645511587, 1.5345307040915017, 1.238433805690489, 0.8321831954639813, 1.266628913080136]
# squared norms of the weights after the steps: backbone, projector, prototypes
SQUARES = [
    4.481446763796419,
    2.3835881696161394,
    3.4133670801659908,
    1.0085492823255455,
    2.4208145265344485,
    2.9274335513077983,
    4.197391004306861,
    2.1886319102615404,
    7.543532306122174,
    3.985540818655762,
]


def test_five_steps_are_the_authors():
    recipe = OptimizerRecipe(larc, lr=40.0, weight_decay=0.05, rules=[Rule("", weight_decay=0.05)])
    method = SwAV(TinyConvNet(), recipe, prototypes=4, projection_dim=8, queue_size=10).double()
    fill(method.parameters())
    rate = WarmupCosine(peak=40.0, start=0.5, end=0.4, warmup="2 epochs", inclusive=True)
    batches = [batch(views(step), views(step, side=6, first=(30, 40))) for step in range(5)]
    losses = run(method, batches, {"optimizer": {"lr": rate}}, FreezeAtFirst("prototypes", 2), epochs=5)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(method.parameters()) == pytest.approx(SQUARES, rel=1e-12)
