"""SimCLR against numbers of the authors' code, and DCL against those of a re-implementation.

SimCLR: made with google-research/simclr, model_util.py (projection_head, get_optimizer), resnet.py (batch_norm_relu),
objective.py and lars_optimizer.py, commit 383d414, in TensorFlow with float64: four steps at rates 0.25, 0.5, 0.25,
0.125 on `TinyConvNet`, two projector layers of widths 6 and 8, temperature 0.3, weight decay 0.05, batch 5. Weights
and views as in `rules` and `runs`, in their layout. Their mean over samples, which is rounded to float32, was taken
in float64.

DCL: its authors published no code. Made with raminnakhli/Decoupled-Contrastive-Learning, loss/dcl.py, commit 0b9b76d:
the loss of both views of 5 images (`by_rule` number 3, normalized) at temperature 0.3, and of its gradient the
squared norm and the product with `by_rule` number 5; of DCLW, whose weights take a gradient there, the loss alone.
"""

from dataclasses import dataclass

import pytest
import torch

from src.models.joint_embedding.simclr import SimCLR
from src.models.losses.contrastive import dcl, dclw
from src.optim import OptimizerRecipe, classic_lars
from src.schedules import Horizon, Schedule
from tests.fidelity.rules import TinyConvNet, by_rule, fill
from tests.fidelity.runs import batch, run, squares, views

LOSSES = [8.882670993064918, 9.064857768342026, 8.202907287430298, 7.9001870581547795]
# squared norms of the weights after the steps: backbone, projector
SQUARES = [
    7.310292077464613,
    6.149678452516919,
    13.479828330344663,
    1.615562858690421,
    18.54675541108295,
    13.975861138895205,
    2.1033098042732474,
    9.807192638515879,
]
DCL = [13.478109419784715, 50.1688884858837, -8.941992806297222]
DCLW = 13.479750244829177


@dataclass(frozen=True)
class Rates(Schedule):
    """The learning rate of each step."""

    rates: tuple[float, ...]

    def value(self, step: int, horizon: Horizon) -> float:
        return self.rates[step]


def test_four_steps_are_the_authors():
    recipe = OptimizerRecipe(classic_lars, lr=0.25, weight_decay=0.05)
    method = SimCLR(TinyConvNet(), recipe, temperature=0.3, projection_dim=8).double()
    learning = [parameter for parameter in method.parameters() if parameter.requires_grad]
    fill(learning)
    schedules = {"optimizer": {"lr": Rates((0.25, 0.5, 0.25, 0.125))}}
    losses = run(method, [batch(views(step)) for step in range(4)], schedules, epochs=1)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(learning) == pytest.approx(SQUARES, rel=1e-12)


def test_dcl_is_the_re_implementation_s():
    z = torch.nn.functional.normalize(by_rule((5, 2, 4), 3, 1.0), dim=-1).requires_grad_(True)
    loss = dcl(z, z, 0, temperature=0.3)
    loss.backward()
    gradient = z.grad
    found = [loss.item(), gradient.pow(2).sum().item(), (gradient * by_rule(z.shape, 5)).sum().item()]
    assert found == pytest.approx(DCL, rel=1e-12)
    assert dclw(z, z, 0, temperature=0.3).item() == pytest.approx(DCLW, rel=1e-12)
