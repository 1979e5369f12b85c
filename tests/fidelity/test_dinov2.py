"""DINOv2 against numbers of the authors' code.

Made with facebookresearch/dinov2, dinov2/train/ssl_meta_arch.py (SSLMetaArch: forward_backward, get_params_groups,
update_teacher), models/vision_transformer.py, layers, loss, utils/param_groups.py and CosineScheduler, commit b8931f7,
without xformers and FSDP: six steps in float64 on one process, their casts to float32 included. The ViT, crops and
weights of test_dino with residual branches scaled by 0.5; heads of 7 and 8 prototypes, hidden 10, bottlenecks 6 and 5;
Sinkhorn-Knopp; AdamW, rate 2e-5 to 2e-6 after two steps of warm-up, weight decay 0.04 to 0.2, layer-wise decay 0.8,
patch embedding at 0.2, gradients of each network clipped to 0.5, teacher momentum from 0.9, temperature 0.04 to 0.07 in
three steps. Masks as in test_ibot.
"""

import pytest
import timm
import torch
from torch import Tensor

from src.callbacks.ema_teacher import EMATeacher
from src.callbacks.gradients import ClipEachPart
from src.models.joint_embedding.dinov2 import DINOv2
from src.optim import OptimizerRecipe, adamw
from src.schedules import Cosine, LinearWarmup, WarmupCosine
from tests.fidelity.rules import by_rule, fill
from tests.fidelity.runs import run, squares
from tests.fidelity.test_dino import batches

LOSSES = [
    6.330521225082245,
    6.268429147843166,
    6.369427597512855,
    6.298590081239144,
    6.30116204952572,
    6.348646545121765,
]
# squared norms of the weights after the steps: mask token, student, teacher
SQUARES = [
    0.5338010253131096,
    0.5610760529745074,
    9.18491797354691,
    25.910100232835163,
    12.813187757027269,
    11.07909988556815,
    12.544950317594248,
    19.46823596432615,
    37.65806229584462,
    6.490144126898258,
    13.322241262133055,
    13.729497885366627,
    11.431647195441773,
    11.629494681362598,
    25.892910609220074,
    50.620905435070725,
    25.92305956802982,
    12.31768113415382,
    14.124087568201826,
    12.254087442012224,
    11.125024394498626,
    19.396432050154807,
    37.67430919021473,
    6.46387855048721,
    11.472467043331227,
    13.775752285655303,
    13.260839626648579,
    11.17015547033425,
    25.91907651495433,
    51.76069608868861,
    25.88818473785792,
    11.085411300679187,
    12.87971631622775,
    13.993750596108931,
    11.754415009199025,
    5.40381576323277,
    10.45127328195856,
    4.544860339440894,
    10.212262236873444,
    2.712552021198542,
    7.3578726406293615,
    1.8724916859241105,
    0.3781348562917078,
    5.353200191110701,
    11.027028811570375,
    4.451623475427812,
    9.89064169409824,
    2.222569689927027,
    5.460210571846595,
    1.815390089783886,
    0.3281808603500487,
    0.09315071630259084,
    1.4438336069693756,
    4.09742059575588,
    12.134359761737434,
    12.68437452774166,
    11.867598345215342,
    3.0773236293229362,
    36.24592871005728,
    1.0260101799097308,
    11.623013312209629,
    11.754294422605383,
    12.639391378025657,
    12.263379671650108,
    4.094658249524954,
    48.32001632164102,
    4.099205314479554,
    11.953077587067508,
    11.520183518509903,
    12.350709520331884,
    12.591478203321149,
    3.0618706868587684,
    36.2334459329405,
    1.0203494430426538,
    12.349235869747261,
    11.519748070421148,
    11.954577494290819,
    12.699057863529184,
    4.087254644922665,
    47.74673990204754,
    4.08419696993408,
    12.638691594156612,
    11.753060115182969,
    11.624019248425746,
    12.53372326156289,
    0.8484843027125798,
    9.973285588055472,
    0.7136707409909357,
    10.216260354583909,
    0.4221954932823239,
    5.763418346358861,
    0.2905969956784597,
    0.06030406363594465,
    0.8486848986997146,
    9.836718813058633,
    0.7021728752231116,
    10.320509179739563,
    0.35068314961517544,
    5.168214772291086,
    0.28722742978860794,
    0.04996710443461428,
]


class Masked(DINOv2):
    """Masks patches by the rule."""

    step = 0

    def draw_masks(self, images: Tensor) -> Tensor:
        masks = [by_rule((3, 16), number + self.step, 1.0) > 0.4 for number in (50, 60)]
        masks[0][1] = False
        self.step += 1
        return torch.stack(masks, dim=1).flatten(0, 1)


def method() -> Masked:
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=12,
        depth=2,
        num_heads=2,
        num_classes=0,
        init_values=0.5,
    )
    sizes = {"prototypes": 7, "patch_prototypes": 8, "hidden_dim": 10, "bottleneck_dim": 6, "patch_bottleneck_dim": 5}
    recipe = OptimizerRecipe(adamw, lr=2e-5, weight_decay=0.04)
    made = Masked(vit, recipe, layer_decay=0.8, **sizes).double()
    fill(made.parameters())
    return made


def test_six_steps_are_the_authors():
    trained = method()
    parts = [r"^student\.encoder\.|^mask_token$", r"^student\.class_head\.", r"^student\.patch_head\."]
    schedules = {
        "optimizer": {
            "lr": WarmupCosine(peak=2e-5, end=2e-6, warmup=2, inclusive=True),
            "weight_decay": Cosine(start=0.04, end=0.2),
        },
        "teacher_momentum": Cosine(start=0.9, end=1.0),
        "teacher_temperature": LinearWarmup(0.04, 0.07, 3, inclusive=True),
    }
    callbacks = (ClipEachPart(0.5, parts), EMATeacher("after"))
    losses = run(trained, batches(), schedules, *callbacks, epochs=1)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(trained.parameters()) == pytest.approx(SQUARES, rel=1e-12)
