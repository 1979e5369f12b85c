"""SLIP against numbers of the authors' code.

Made with facebookresearch/SLIP, models.py (SLIP), losses.py (SLIPLoss, SIMCLRLoss), utils.cosine_scheduler and the loop
of main.py, commit c6faf5d: three epochs of two steps in float64 on one process, AdamW (betas 0.9 and 0.98, eps 1e-3,
weight decay 0.1), rate 1e-6 to 0.001 in the first epoch and to 1e-5 at the end. The image tower is `TinyConvNet`, the
text tower that of `towers`; the image projection is `by_rule` of number 50, SimCLR's projector has 7 hidden units and 8
outputs. The logit scale starts at 4.7. Their LayerNorm computes in float32 whatever its input; here it is PyTorch's,
and their batch norms are those of one process.
"""

import math
from functools import partial

import pytest

from src.models.image_text.slip import SLIP
from src.models.text.text_tower import CLIPTextTower
from src.optim import OptimizerRecipe, adamw
from src.schedules import WarmupCosine
from tests.fidelity.rules import TinyConvNet, by_rule, fill
from tests.fidelity.runs import run
from tests.fidelity.test_clip_rocket import before_norms, text_weights, views_batch
from tests.fidelity.towers import EMBED, TEXT_TOWER

LOSSES = [
    3.9309827969801727,
    3.8501827765329697,
    3.5879261916894354,
    3.659757345606766,
    3.4324633866065315,
    3.368312825133067,
]
SQUARES = [
    19.273577056118317,
    724.9138868563961,
    2.171543157903047,
    5.800153476586111,
    47.12836693868245,
    4.602005614055592,
]


def test_three_epochs_are_the_authors():
    recipe = OptimizerRecipe(partial(adamw, betas=(0.9, 0.98), eps=1e-3), lr=1e-3, weight_decay=0.1)
    text = CLIPTextTower(activation="quick_gelu", **TEXT_TOWER)
    sizes = {"embed_dim": EMBED, "hidden_dim": 7, "projection_dim": 8, "max_logit_scale": math.exp(4.6052)}
    method = SLIP(TinyConvNet(), text, recipe, **sizes).double()
    assert not method.load_state_dict(text_weights(projection=True), strict=False).unexpected_keys
    fill(method.image_encoder.parameters())
    fill(method.projector.parameters())
    method.image_projection.weight.data.copy_(by_rule((6, EMBED), 50).T)
    method.logit_scale.data.fill_(4.7)
    schedule = WarmupCosine(peak=1e-3, warmup="1 epochs", start=1e-6, end=1e-5, inclusive=True)
    losses = run(method, [views_batch(step) for step in range(6)], {"optimizer": {"lr": schedule}}, epochs=3)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    groups = [
        list(method.image_encoder.parameters()),
        [p for name, p in method.text_encoder.named_parameters() if not name.endswith("k_proj.bias")],
        [method.image_projection.weight],
        [method.text_projection.weight],
        [p for p in method.projector.parameters() if id(p) not in before_norms(method.projector)],
    ]
    found = [sum(p.detach().pow(2).sum().item() for p in group) for group in groups]
    assert [*found, method.logit_scale.item()] == pytest.approx(SQUARES, rel=1e-12)
