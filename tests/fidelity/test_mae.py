"""MAE against numbers of the authors' code.

Made with facebookresearch/mae, models_mae.py and the loop of engine_pretrain.py with util/lr_sched.py, commit efb2a80,
on today's timm, in float64: two epochs of two steps of AdamW (betas 0.9 and 0.95, rate 0.01, half an epoch of warm-up,
weight decay 0.05). A ViT of width 12 and depth 2 and a decoder of width 8 and depth 1, with two heads each, read five
images of 16 pixels in patches of 4 a step. Weights, images and the noise that masks by are those of `rules`.
"""

from functools import partial
from itertools import count
from typing import Any

import pytest
import torch

from src.models.masked.mae import MAE
from src.optim import OptimizerRecipe
from src.schedules import WarmupCosine
from tests.fidelity.rules import ENLARGED, by_rule, fill
from tests.fidelity.runs import run, squares
from tests.toys import small_vit

LOSSES = [2.262838094410926, 2.2647186583778214, 1.9571623959668107, 1.7695814721135554]
SQUARES = [0.5220217921432837, 25.921189445032624, 11.748836608935314, 14.20639204716403, 12.734180098321062]
SQUARES += [19.642966548985715, 37.617659723955086, 6.486904461139556, 12.028356903816114, 11.21808658863273]
SQUARES += [13.165491516772523, 25.79714013283125, 48.868760248933384, 26.048702018094676, 13.820683189986788]
SQUARES += [13.00017370120825, 11.10353040176615, 19.623186748839466, 37.67156667840625, 6.500528864099371]
SQUARES += [11.119295217153422, 13.136664061195987, 13.788770631840377, 25.967010024662933, 48.95111148459809]
SQUARES += [25.86604264364988, 13.217450670093701, 11.129722547535746, 12.067721875662732, 0.40306687874687824]
SQUARES += [4.240586571296216, 8.620163327507353, 8.822924615321677, 8.052690893615223, 8.422175846674651]
SQUARES += [25.182642728036292, 2.8641992902139046, 7.856890344476589, 8.312112410385492, 8.967413482666295]
SQUARES += [12.433382563511453, 32.618986953693266, 11.571124492234421, 8.811100083503861, 8.101696024544276]
SQUARES += [7.852034001545622, 17.405826329046512, 49.18766603029749]


def method() -> MAE:
    vit: Any = small_vit(patch_size=4, embed_dim=12, depth=2)
    adamw = partial(torch.optim.AdamW, betas=(0.9, 0.95))
    recipe = OptimizerRecipe(adamw, lr=0.01, weight_decay=0.05)
    return MAE(vit, recipe, decoder_dim=8, decoder_depth=1, decoder_heads=2).double()


def test_four_steps_are_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, numbers = method(), count(51)
    learned = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    fill(learned)
    monkeypatch.setattr(torch, "rand", lambda *shape, device: by_rule(shape, next(numbers)))
    batches = [{"image": by_rule((5, 3, 16, 16), 10 + step, 1.0), "index": torch.arange(5)} for step in range(4)]
    schedules = {"optimizer.lr": WarmupCosine(peak=0.01, warmup="0.5 epochs")}
    assert run(ours, batches, schedules, epochs=2) == pytest.approx(LOSSES, rel=1e-12)
    assert squares(learned) == pytest.approx(SQUARES, rel=ENLARGED)
