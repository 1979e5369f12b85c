"""MoCo v3 against numbers of the authors' code.

Made with facebookresearch/moco-v3, moco/builder.py, moco/optimizer.py, vits.py and main_moco.py (train), commit
c349e6e: three epochs of one step in float64, the first of them the warm-up, dim 8, mlp-dim 7, teacher momentum 0.9
along the cosine, weights and views as in `rules` and `runs`. ResNet: `TinyConvNet`, LARS, rate 2, weight decay 0.05,
temperature 1. ViT: 4 patches of 4 x 4 pixels, width 12, a block of 2 heads, frozen patch embedding, AdamW, rate
0.005, weight decay 0.1, temperature 0.2, batch 8; the fixed positions are set by the rule too, as the authors compute
theirs in float32. Of its matrices and views the sine of 20 times the rule is taken, times 0.3 for matrices: those of
the rule have rank 2, which makes class tokens nearly equal, and batch norm then enlarges rounding errors.
"""

import pytest
import timm
import torch
from torch import nn

from src.callbacks.ema_teacher import EMATeacher
from src.models.backbones.image_encoder import cls_token
from src.models.joint_embedding.moco_v3 import MoCoV3
from src.optim import OptimizerRecipe, Rule, adamw, lars
from src.schedules import Cosine, WarmupCosine
from tests.fidelity.rules import TinyConvNet, fill
from tests.fidelity.runs import Batch, batch, run, squares, views

# squared norms of the weights after the steps: student, teacher, predictor
RESNET_LOSSES = [7.836388292766993, 7.214998493279691, 7.046867397796098]
RESNET_SQUARES = [
    7.3089405105141285,
    9.791320547390725,
    10.847700194419774,
    1.882673513677641,
    42.19571754690913,
    16.530832853279342,
    2.459766729970412,
    6.8198831219389815,
    4.729852877907414,
    6.34017263478486,
    1.7113789471691825,
    6.744694247902721,
    6.459947243731003,
    2.3585878937020945,
    2.5170601863569892,
    6.007371680972779,
    13.455456251887513,
    2.471392736102687,
]
VIT_LOSSES = [3.0616303724986693, 2.998305588899038, 3.290812822955089]
VIT_SQUARES = [
    0.4571640395244101,
    2.583819355522323,
    24.74231271897228,
    14.020912130683996,
    12.763635845278959,
    11.042693068631133,
    18.429671670950903,
    37.63205839734557,
    6.211024701916222,
    11.190983517501603,
    13.300267255508622,
    13.695444182073853,
    24.657245509122244,
    49.20477972413269,
    24.627878433062733,
    13.017483108232508,
    11.121282662411453,
    12.299553023079264,
    3.6545143236941637,
    6.0959240834294794,
    7.495996464263741,
    2.1242673797517697,
    6.958048579281844,
    6.30835560488889,
    2.3628656128263392,
    0.4297582060870583,
    1.98245299644652,
    18.702837133930807,
    12.30203020692733,
    13.720367083947597,
    12.062071291322578,
    14.055369681983606,
    37.14066835993978,
    4.688885458128292,
    11.51162609855743,
    11.546848609835546,
    13.496368090094892,
    18.673537914503882,
    48.32458102808738,
    18.7761595199266,
    13.72525820962729,
    12.250925830185183,
    11.160281038988735,
    2.771609513701308,
    7.003845724850322,
    6.325307882778519,
    1.6247476036633877,
    7.958357784284074,
    6.546536929770878,
    1.899510024862782,
    2.336915833292787,
    7.94607020471247,
    6.2909132873297375,
    2.377463380595983,
]
# the authors' positions of the second patch, in the first row and the second column
TABLE = [
    0.0,
    0.0,
    0.0,
    1.0,
    1.0,
    1.0,
    0.8414709568023682,
    0.04639922082424164,
    0.0021544327028095722,
    0.5403023362159729,
    0.9989229440689087,
    0.9999976754188538,
]


def losses_of(method: MoCoV3, peak: float, batches: list[Batch]) -> list[float]:
    schedules = {
        "optimizer": {"lr": WarmupCosine(peak=peak, warmup="1 epoch")},
        "teacher_momentum": Cosine(start=0.9, end=1.0),
    }
    return run(method, batches, schedules, EMATeacher("before"), epochs=3)


def test_three_steps_of_the_resnet_are_the_authors():
    recipe = OptimizerRecipe(lars, lr=2.0, weight_decay=0.05)
    sizes = {"hidden_dim": 7, "projection_dim": 8, "projector_layers": 2, "predictor_norm": False}
    method = MoCoV3(TinyConvNet(), recipe, temperature=1.0, teacher_momentum=0.9, **sizes)
    fill(method.double().parameters())
    assert losses_of(method, 2.0, [batch(views(step)) for step in range(3)]) == pytest.approx(RESNET_LOSSES, rel=1e-12)
    assert squares(method.parameters()) == pytest.approx(RESNET_SQUARES, rel=1e-12)


def vit() -> nn.Module:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def test_three_steps_of_the_vit_are_the_authors():
    recipe = OptimizerRecipe(adamw, lr=0.005, weight_decay=0.1, rules=[Rule("", weight_decay=0.1)])
    sizes = {"hidden_dim": 7, "projection_dim": 8, "pool": cls_token}
    method = MoCoV3(vit(), recipe, temperature=0.2, teacher_momentum=0.9, **sizes)
    fill(method.double().parameters())
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.sin(20 * parameter))
    batches = [batch(torch.sin(20 * views(step, 8))) for step in range(3)]
    assert losses_of(method, 0.005, batches) == pytest.approx(VIT_LOSSES, rel=1e-12)
    # norms or the softmax cancel these shifts: of their zero gradients Adam makes steps of rounding errors
    shifts = ("attn.qkv.bias", "backbone.norm.bias", "projector.layers.4.bias")
    for (name, parameter), square in zip(method.named_parameters(), VIT_SQUARES, strict=True):
        if not name.endswith(shifts):
            assert parameter.detach().pow(2).sum().item() == pytest.approx(square, rel=1e-12), name


def test_the_fixed_positions_are_the_authors():
    recipe = OptimizerRecipe(adamw, lr=0.005)
    table = MoCoV3(vit(), recipe, hidden_dim=7, projection_dim=8).student["encoder"].backbone.pos_embed
    assert table[0, 2].tolist() == pytest.approx(TABLE, abs=1e-7)
    assert torch.count_nonzero(table[0, 0]) == 0
