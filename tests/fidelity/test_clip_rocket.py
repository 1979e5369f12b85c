"""CLIP-rocket and its added objectives against numbers of the authors' code.

Made with facebookresearch/clip-rocket, models.py (CL2L, SIAMLIP, BARLIP), losses.py, utils.cosine_scheduler and the
loop of main.py with --momentum for BYOLIP, commit ebd9e58: three epochs of two steps in float64 on one process, AdamW
(betas 0.9 and 0.98, eps 1e-3, weight decay 0.1), rate 1e-6 to the peak in the first epoch and to 1e-5 at the end. The
image tower is `TinyConvNet`, the text tower that of `towers`; heads have 7 hidden units, projectors 9 hidden units and
8 outputs, filled by `fill` from the image tower to the predictors; label smoothing 0.1 (SwALIP 0), the loss summed. The
logit scales start at 4.7 and 2.3. The strong texts are those of the next pair and of the one after it. Their LayerNorm
computes in float32 whatever its input; here it is PyTorch's. Their attention for ViTs is not used.
"""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from src.callbacks.ema_teacher import EMATeacher
from src.models.backbones.released_towers import with_own_names
from src.models.image_text.barlip import BarLIP
from src.models.image_text.clip_rocket import CLIPRocket
from src.models.image_text.siamlip import BYOLIP, SiamLIP
from src.models.image_text.swalip import SwALIP
from src.models.text.text_tower import CLIPTextTower
from src.optim import OptimizerRecipe, adamw
from src.schedules import WarmupCosine
from tests.fidelity.rules import ENLARGED, TinyConvNet, by_rule, fill
from tests.fidelity.runs import run
from tests.fidelity.towers import EMBED, SIDE, TEXT, TEXT_TOWER, batch, numbered, text_shapes

RATE = 0.001
LOSSES: dict[str, list[float]] = {
    "rocket": [
        3.5511437473406833,
        3.6308415125085034,
        3.417883953440689,
        3.181642935311454,
        3.307838854049351,
        3.2461671198974216,
    ],
    "siamlip": [
        5.664699647478713,
        5.909372715486263,
        5.008442083933479,
        5.309623832365604,
        5.9668391794870015,
        5.714997041095442,
    ],
    "siamlip_sep": [
        5.1722099504268035,
        5.468463239004134,
        5.255590559042407,
        5.277014837189088,
        5.624899577083275,
        5.470344197612237,
    ],
    "byolip": [
        5.664699647478713,
        5.909330579297475,
        5.5115064222944365,
        5.308655654629996,
        5.14808011040847,
        5.184365265335158,
    ],
    "barlip": [
        3.6380713397767477,
        3.7281940306733903,
        3.4343682575056556,
        3.3146137072716915,
        3.444361936783638,
        3.3753535709253693,
    ],
    "swalip": [
        3.939108894824185,
        4.026576983248312,
        3.7878693331457547,
        3.5136496268448685,
        3.6654170779011817,
        3.5786584298442774,
    ],
}
# squared norms: image tower, text tower, heads and projectors in order, logit scales; last BYOLIP's teacher tower
SQUARES: dict[str, list[float]] = {
    "rocket": [
        19.2731892440796,
        727.6817340305911,
        2.205596735377287,
        5.717224322695792,
        41.9487381737808,
        49.73346673268634,
        4.6021297541914326,
        2.2965404460242196,
    ],
    "siamlip": [
        19.277687025835284,
        727.6767695687208,
        2.2054876690855227,
        5.717433163120774,
        41.94515639432262,
        49.73246757786525,
        24.483152905530275,
        28.51681493218932,
        33.09667816918978,
        33.75710417121984,
        4.602082452697303,
        2.2965252014755517,
    ],
    "siamlip_sep": [
        19.276321431668723,
        727.5460500093749,
        2.2051745326669705,
        5.718504600061971,
        41.944024171793394,
        49.732023695353014,
        24.490723335383628,
        28.51250508166433,
        24.46477509239746,
        28.524652320127565,
        33.115357391431544,
        34.172430554345304,
        33.53800994472663,
        33.28710848546593,
        4.601820604412836,
        2.296525892937152,
    ],
    "byolip": [
        19.281399602997734,
        727.6894371663709,
        2.2055311774282664,
        5.717349379098691,
        41.94655458817743,
        49.733664097076094,
        24.487814893264975,
        28.515514784351215,
        33.09436568377411,
        33.75342594380533,
        4.60210627993793,
        2.2965366360745176,
        19.28037929824788,
    ],
    "barlip": [
        19.28259548880812,
        727.6802547614127,
        2.2058407533623416,
        5.716475582590594,
        41.945917228634514,
        49.73593042393193,
        64.3347978768735,
        67.57593286121724,
        4.602227151836316,
        2.296543390292118,
    ],
    "swalip": [
        19.273253289810135,
        727.6823925524569,
        2.2055763046116024,
        5.7172251920891615,
        41.94802965709089,
        49.73355113108478,
        4.60211981646942,
        2.2965416546064232,
    ],
}
SIAM = partial(SiamLIP, hidden_dim=9, projection_dim=8)
KINDS = {
    "rocket": partial(CLIPRocket),
    "siamlip": partial(CLIPRocket, objective=SIAM),
    "siamlip_sep": partial(CLIPRocket, objective=partial(SIAM, separate_views=True)),
    "byolip": partial(BYOLIP, objective=SIAM),
    "barlip": partial(CLIPRocket, objective=partial(BarLIP, hidden_dim=9, projection_dim=8)),
    "swalip": partial(CLIPRocket, objective=SwALIP, label_smoothing=0.0),
}


def views_batch(step: int) -> dict[str, torch.Tensor]:
    texts = torch.stack([TEXT[[1, 2, 3, 0]], TEXT[[2, 3, 0, 1]]], dim=1)
    views = torch.stack([by_rule((4, 3, SIDE, SIDE), number + step, 1.0) for number in (40, 50)], dim=1)
    return {**batch(step), "views": views, "text_views": texts, "text_views_mask": texts != 0}


def text_weights(projection: bool = False) -> dict[str, torch.Tensor]:
    """The weights of the text tower of `towers` under our names, with its projection if asked for."""
    left_out = ("logit_scale",) if projection else ("logit_scale", "text_projection")
    shapes = {name: shape for name, shape in text_shapes().items() if name not in left_out}
    placeholders = {"visual.class_embedding": torch.zeros(1), "visual.positional_embedding": torch.zeros(1)}
    own = with_own_names(numbered(shapes) | placeholders)
    return {name: value for name, value in own.items() if name.startswith("text_")}


def parts(method: CLIPRocket) -> list[nn.Module]:
    """The image tower, and heads and projectors in the order in which they are filled."""
    heads: list[nn.Module] = [
        method.image_encoder.backbone,
        method.image_projection,
        method.text_projection,
        method.local_image_head,
        method.local_text_head,
    ]
    for group in (getattr(method.objective, name, None) for name in ("projectors", "predictors")):
        if group is not None:
            of_views = (group.image, group.text, group.local_image, group.local_text)
            heads += [part for part in of_views if part is not None]
    return heads


def squares(method: CLIPRocket) -> list[float]:
    """Biases without effect are left out, because Adam divides the rounding errors of their gradients by as much: those
    of keys, and those before a batch norm."""
    text = [p for name, p in method.text_encoder.named_parameters() if not name.endswith("k_proj.bias")]
    tower, *heads = ([p for p in part.parameters() if id(p) not in before_norms(part)] for part in parts(method))
    sums = [sum(p.detach().pow(2).sum().item() for p in group) for group in (tower, text, *heads)]
    return [*sums, method.logit_scale.item(), method.local_logit_scale.item()]


def before_norms(part: nn.Module) -> set[int]:
    layers = [layer for layer in part.modules() if isinstance(layer, nn.Linear | nn.BatchNorm1d)]
    return {
        id(layer.bias)
        for layer, following in pairwise(layers)
        if isinstance(layer, nn.Linear) and isinstance(following, nn.BatchNorm1d)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_three_epochs_are_the_authors(kind):
    recipe = OptimizerRecipe(partial(adamw, betas=(0.9, 0.98), eps=1e-3), lr=RATE, weight_decay=0.1)
    text = CLIPTextTower(activation="quick_gelu", **TEXT_TOWER)
    method = KINDS[kind](
        TinyConvNet(), text, recipe, embed_dim=EMBED, hidden_dim=7, max_logit_scale=math.exp(4.6052)
    ).double()
    assert not method.load_state_dict(text_weights(), strict=False).unexpected_keys
    fill([parameter for part in parts(method) for parameter in part.parameters()])
    method.logit_scale.data.fill_(4.7)
    method.local_logit_scale.data.fill_(2.3)
    callbacks = []
    if isinstance(method, BYOLIP):
        method.teacher.load_state_dict(method._student().state_dict())
        callbacks = [EMATeacher("after")]
    schedule = WarmupCosine(peak=RATE, warmup="1 epochs", start=1e-6, end=1e-5, inclusive=True)
    batches = [views_batch(step) for step in range(6)]
    losses = run(method, batches, {"optimizer": {"lr": schedule}}, *callbacks, epochs=3)
    assert losses == pytest.approx(LOSSES[kind], rel=ENLARGED)
    found = squares(method)
    if isinstance(method, BYOLIP):
        found.append(sum(p.pow(2).sum().item() for p in method.teacher["image_encoder"].parameters()))
    assert found == pytest.approx(SQUARES[kind], rel=ENLARGED)
