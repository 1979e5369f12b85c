"""SimSiam against numbers of the authors' code.

Made with facebookresearch/simsiam, simsiam/builder.py and the loop of main_simsiam.py with --fix-pred-lr, commit
a7bc177: three steps of SGD (momentum 0.9, weight decay 0.01, rates 0.5, 0.3, 0.1, the predictor's 0.5 throughout) in
float64 on `TinyConvNet` with dim=8 and pred_dim=4, weights and images as in `rules`.
"""

from functools import partial

import pytest
import torch

from src.models.joint_embedding.simsiam import SimSiam
from src.optim import OptimizerRecipe, Rule
from tests.fidelity.rules import TinyConvNet, by_rule, fill

LOSSES = [-0.05485821030308259, 0.0070796033054408795, 0.014892430250191827]
# squared norms of the weights after the steps: backbone, projector, predictor
SQUARES = [7.207321272020393, 4.74163878777012, 6.910195937068214, 1.6220449914281674, 5.021881798092145]
SQUARES += [5.271664511930535, 1.608605240683559, 6.652163591199086, 4.629407201204092, 2.712519353134374]
SQUARES += [1.374269898340102, 4.745708700229703, 2.441872149231302, 1.3763544342202139, 8.177988117388638]


def test_three_steps_are_the_authors():
    decay = 1e-2
    rules = [
        Rule(r"^predictor\.", constant_lr=True, weight_decay=decay),
        Rule("", weight_decay=decay),
    ]
    recipe = OptimizerRecipe(partial(torch.optim.SGD, momentum=0.9), lr=0.5, weight_decay=decay, rules=rules)
    method = SimSiam(TinyConvNet(), recipe, projection_dim=8, predictor_dim=4).double().train()
    fill(method.parameters())
    optimizer = recipe.build(method)
    losses = []
    for step, rate in enumerate((0.5, 0.3, 0.1)):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 if group["constant_lr"] else rate
        views = torch.stack([by_rule((5, 3, 8, 8), first + step, 1.0) for first in (10, 20)], dim=1)
        loss = method.training_step({"views": views}, step)["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert [p.pow(2).sum().item() for p in method.parameters()] == pytest.approx(SQUARES, rel=1e-12)
