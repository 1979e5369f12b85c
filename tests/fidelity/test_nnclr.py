"""NNCLR against numbers of a re-implementation, since its authors published no code.

Made with vturrisi/solo-learn, solo/methods/nnclr.py and solo/losses/nnclr.py, commit 9187ea3: four steps of SGD
(momentum 0.9, rate 0.1, weight decay 0.01) in float64 on `TinyConvNet`, projector of widths 7, 7 and 8, predictor of
widths 9 and 8, temperature 0.3, queue of 10 projections (`by_rule` number 50, normalized), five images. Their base
class, which encodes each view in a forward pass of its own, was replaced by one that does the same without its online
classifier. Weights and views as in `rules` and `runs`.
"""

import pytest
import torch

from src.models.joint_embedding.nnclr import NNCLR
from src.optim import OptimizerRecipe, Rule, sgd
from tests.fidelity.rules import TinyConvNet, by_rule, fill
from tests.fidelity.runs import batch, run, squares, views

LOSSES = [1.771452436581292, 2.405289339727423, 1.721025157555197, 1.6076846287278022]
# squared norms of the weights after the steps: backbone, projector, predictor; first channel of the queue
SQUARES = [
    9.986041530528391,
    4.832540125442342,
    6.951331648173076,
    2.3563700367191114,
    6.124781749044419,
    7.05768538974073,
    8.128808178444624,
    3.1490448765496444,
    6.0301553054760975,
    7.675605321789975,
    8.02055232015421,
    3.2336629937841606,
    7.909918925996234,
    8.762173690311513,
    8.42755699251138,
    4.2216796904426515,
    9.2307950914974,
    8.809644417998067,
    9.149277810255601,
    3.3363647984791625,
    9.035342408206226,
]
QUEUE = [
    0.04981225311508383,
    0.41056338630537903,
    0.1303440883429089,
    0.3079242327885049,
    0.4671367443305415,
    0.23274960480675058,
    0.45461035402665506,
    0.030787752555367563,
    0.40955087149960595,
    0.27900573187555644,
]


def test_four_steps_are_the_re_implementation_s():
    recipe = OptimizerRecipe(sgd, lr=0.1, weight_decay=0.01, rules=[Rule("", weight_decay=0.01)])
    sizes = {"hidden_dim": 7, "predictor_dim": 9, "projection_dim": 8}
    method = NNCLR(TinyConvNet(), recipe, queue_size=10, temperature=0.3, **sizes).double()
    fill(method.parameters())
    method.queue.features.copy_(torch.nn.functional.normalize(by_rule((10, 8), 50), dim=1))
    losses = run(method, [batch(views(step)) for step in range(4)], {}, epochs=1)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(method.parameters()) == pytest.approx(SQUARES, rel=1e-12)
    assert method.queue.features[:, 0].tolist() == pytest.approx(QUEUE, rel=1e-12)
