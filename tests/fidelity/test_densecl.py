"""DenseCL against numbers of the authors' code.

Made with WXinlong/DenseCL, openselfsup/models/densecl.py, necks.py (DenseCLNeck) and heads/contrastive_head.py, commit
b64bbb6: three epochs of one step of SGD (momentum 0.9, rate 0.3 along half a cosine, weight decay 0.01) in float64 on
`TinyConvNet`, whose map has nine positions, with widths 6 and 8, loss_lambda 0.3, two queues of 10 keys (`by_rule`
numbers 50 and 51, normalized), temperature 0.2, teacher momentum 0.9; weights of both encoders and views as in `rules`
and `runs`.
"""

import pytest
import torch

from src.callbacks.ema_teacher import EMATeacher
from src.models.joint_embedding.densecl import DenseCL
from src.optim import OptimizerRecipe, Rule, sgd
from src.schedules import WarmupCosine
from tests.fidelity.rules import TinyConvNet, by_rule, fill
from tests.fidelity.runs import batch, run, squares, views

LOSSES = [0.15959897972007156, 1.8011026562326218, 2.3809855091145358]
# squared norms of the weights after the steps: student, teacher; first channel of the dense queue
SQUARES = [
    7.1755119626148245,
    4.776282934166759,
    6.973519496428569,
    1.589264028867956,
    5.056672129287651,
    2.1983845742491566,
    8.734993779495818,
    1.5909398805532435,
    4.646723747401957,
    2.152190585597424,
    8.638967620426667,
    7.262750485324869,
    4.784703396002413,
    6.957529856170041,
    1.6053303036719142,
    5.276814276610158,
    2.200671214341175,
    8.880118115315014,
    1.6078324235342667,
    4.788795205221208,
    2.188027572450955,
    8.803818663178829,
]
DENSE_QUEUE = [
    0.16025557887062616,
    0.18679384223347134,
    0.17035726022803033,
    0.17080888987925597,
    0.18773565506301343,
    0.16658570034283415,
    0.1605032999992006,
    0.17955565818234853,
    0.15677751295368889,
    0.17114257644709605,
]


def test_three_steps_are_the_authors():
    recipe = OptimizerRecipe(sgd, lr=0.3, weight_decay=0.01, rules=[Rule("", weight_decay=0.01)])
    sizes = {"queue_size": 10, "projection_dim": 8}
    method = DenseCL(TinyConvNet(), recipe, dense_weight=0.3, teacher_momentum=0.9, **sizes).double()
    fill(method.parameters())
    for queue, number in ((method.queue, 50), (method.dense_queue, 51)):
        queue.features.copy_(torch.nn.functional.normalize(by_rule((10, 8), number), dim=1))
    schedules = {"optimizer": {"lr": WarmupCosine(peak=0.3, per_epoch=True)}}
    losses = run(method, [batch(views(step)) for step in range(3)], schedules, EMATeacher("before"), epochs=3)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(method.parameters()) == pytest.approx(SQUARES, rel=1e-12)
    assert method.dense_queue.features[:, 0].tolist() == pytest.approx(DENSE_QUEUE, rel=1e-12)
