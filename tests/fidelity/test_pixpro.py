"""PixPro against numbers of the authors' code.

Made with zdaxie/PixPro, contrast/models/PixPro.py and contrast/lr_scheduler.py, commit e390d6b: two epochs of three
steps in float64 on `TinyConvNet`, whose map has nine positions, with heads of widths 7 and 8, --optimizer sgd, rate 0.1
after an epoch of warm-up, weight decay 0.01, momentum of the teacher from 0.9, --pixpro-p 2, --pixpro-pos-ratio 0.7,
--pixpro-transform-layer 1, --pixpro-ins-loss-weight 0.5. Both sides are given the same corners of crops: the second is
moved and scaled against the first, and in every other image mirrored. Weights and views as in `rules` and `runs`.
"""

import pytest
import torch
from torch import Tensor

from src.callbacks.ema_teacher import EMATeacher
from src.models.joint_embedding.pixpro import PixPro, crop_corners
from src.optim import OptimizerRecipe, Rule, sgd
from src.schedules import Cosine, WarmupCosine
from tests.fidelity.rules import TinyConvNet, by_rule, fill
from tests.fidelity.runs import Batch, batch, run, squares, views

LOSSES = [
    -4.830203232305845,
    -4.880850700964402,
    -5.824151078896927,
    -5.898877819013851,
    -4.9144107550953215,
    -4.882496252866588,
]
# squared norms of the weights after the steps: student, value transform, predictor, teacher
SQUARES = [
    7.164686702113798,
    4.771481246244695,
    6.956718941510317,
    1.8449984737816432,
    6.111141591251249,
    6.931324782213063,
    8.096409883860357,
    2.495890332954986,
    7.5475591372321915,
    1.9132629328512167,
    8.134225295315744,
    6.673831208617936,
    6.265271373097965,
    2.4921856033500456,
    8.408788453174152,
    3.5131423311147536,
    8.477306755000608,
    2.4229689132287446,
    7.402873761470125,
    5.942826886135214,
    7.301429117620968,
    2.305687433994216,
    7.932446572221529,
    4.712732952930294,
    6.068918953691677,
    7.345055765467334,
    1.2612791333727076,
    6.455139231178496,
    7.814150845356228,
    7.776357831950961,
    1.6216357629482867,
    8.215436593109285,
    1.2096816889904272,
    7.3952496120524085,
    6.257984029391745,
    7.318308516276733,
    1.5862559148231101,
    7.930968351705044,
]


def crops(step: int) -> Batch:
    """Crops of 24 to 40 pixels in images of 64, far apart in the last of the five images."""
    start = torch.tensor([10.0, 20.0], dtype=torch.float64) + by_rule((5, 2, 2), 70 + step, 4.0)
    start[4, 1] += 30
    size = 32 + by_rule((5, 2, 2), 80 + step, 8.0)
    flipped = torch.tensor([[False, False], [True, False], [False, True], [True, True], [False, False]])
    return {"boxes": torch.cat([start, start + size], dim=-1), "flipped": flipped}


def corners(step: int) -> Tensor:
    return crop_corners(crops(step))  # type: ignore[arg-type]


def method() -> PixPro:
    recipe = OptimizerRecipe(sgd, lr=0.1, weight_decay=0.01, rules=[Rule("", weight_decay=0.01)])
    sizes = {"hidden_dim": 7, "projection_dim": 8}
    made = PixPro(TinyConvNet(), recipe, instance_weight=0.5, teacher_momentum=0.9, **sizes).double()
    fill(made.parameters())
    return made


def test_six_steps_are_the_authors():
    trained = method()
    schedules = {
        "optimizer": {"lr": WarmupCosine(peak=0.1, start=0.001, end=1e-6, warmup="1 epoch")},
        "teacher_momentum": Cosine(start=0.9, end=1.0),
    }
    batches = [batch(views(step)) | crops(step) for step in range(6)]
    losses = run(trained, batches, schedules, EMATeacher("before"), epochs=2)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(trained.parameters()) == pytest.approx(SQUARES, rel=1e-12)
