"""DINO against numbers of the authors' code.

Made with facebookresearch/dino, main_dino.py (train_one_epoch, DINOLoss), vision_transformer.py and utils.py, commit
7c446df: three epochs of two steps in float64 on one process. A ViT of 4 x 4 patches of 4 pixels, width 12, two blocks
of 2 heads; a head of 7 prototypes, hidden 10, bottleneck 6, whose norms are learned; 3 images with 2 crops of 16 and
2 of 8 pixels; AdamW, rate 0.02 to 0.001 after an epoch of warm-up, weight decay 0.04 to 0.4, teacher momentum from
0.9, temperature 0.04 to 0.07 in two epochs, gradients clipped to 0.05, last layer frozen for an epoch; weights and
crops as in `rules` and `runs`.
"""

import pytest
import timm
from torch import nn

from src.callbacks.ema_teacher import EMATeacher
from src.callbacks.gradients import ClipEachParameter, FreezeAtFirst
from src.models.joint_embedding.dino import DINO
from src.optim import OptimizerRecipe, adamw
from src.schedules import Cosine, LinearWarmup, WarmupCosine
from tests.fidelity.rules import fill
from tests.fidelity.runs import Batch, batch, run, squares, views

LOSSES = [
    2.2288927958779716,
    2.3428665445380616,
    2.164010563974743,
    2.0665762398124476,
    1.9902957400146344,
    1.9480211100935547,
]
# squared norms of the weights after the steps: student, teacher
SQUARES = [
    0.48592851586970787,
    9.01649142584655,
    26.467646506142767,
    14.151327205639781,
    13.251207912008772,
    11.003691088180368,
    20.944018162327666,
    37.78055579842382,
    6.758940765964686,
    11.165418948780184,
    13.317628890249344,
    13.474813839601735,
    27.006833368454288,
    50.16489530570378,
    26.667752148600027,
    12.882228224905273,
    10.906243964150242,
    12.197485767067512,
    19.842427906384806,
    38.08879063501657,
    7.008197343743759,
    13.330802234355843,
    14.291312862549173,
    11.204039069323741,
    26.295497496255297,
    52.380140034749104,
    26.682920681106012,
    10.983189639454856,
    11.8526146616718,
    14.070881152730704,
    5.297627048659408,
    9.715564368653947,
    4.298463587747457,
    11.159850810835655,
    2.5884534896468256,
    6.6048309810525385,
    1.926189328809982,
    0.20827959507997257,
    0.2310501791113917,
    4.545385190936393,
    12.775100713848275,
    12.875528947066044,
    11.385582699958203,
    11.862813696091767,
    9.610530346553993,
    36.88009950818815,
    3.1987503488815436,
    12.456410178919086,
    13.293724122958505,
    11.739955756785573,
    12.776470916112158,
    49.76442363158719,
    12.796347763225285,
    11.374095039459991,
    11.70518538731705,
    13.312075549273867,
    9.589503474852116,
    36.87600127894069,
    3.2072693959683605,
    13.355016010755264,
    11.994040357790123,
    11.256848717306225,
    12.743108658676523,
    49.88137237577908,
    12.76518084526128,
    11.633336394422495,
    13.190128469992537,
    12.615850540059276,
    2.703186332655221,
    9.891785627419978,
    2.2218154504419276,
    10.461876450649468,
    1.357055504711512,
    7.141463017994855,
    0.9633634557878975,
    0.13488747468096687,
]
CENTER = [
    0.006672316237555692,
    -0.04091484964129748,
    0.011782667039691051,
    0.026766224310196915,
    -0.011323865434360737,
    -0.002915008358129222,
    -0.03526758230822298,
]


def vit() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def batches() -> list[Batch]:
    sides = {"views": (16, (10, 20)), "local": (8, (30, 40))}
    return [batch(*(views(step, 3, side, first) for side, first in sides.values())) for step in range(6)]


def schedules(**temperatures: float) -> dict[str, object]:
    warm = {
        name: LinearWarmup(0.04, end, "2 epochs", per_epoch=True, inclusive=True) for name, end in temperatures.items()
    }
    return {
        "optimizer": {
            "lr": WarmupCosine(peak=0.02, end=0.001, warmup="1 epoch", inclusive=True),
            "weight_decay": Cosine(start=0.04, end=0.4),
        },
        "teacher_momentum": Cosine(start=0.9, end=1.0),
        **warm,
    }


def callbacks() -> tuple[ClipEachParameter, FreezeAtFirst, EMATeacher]:
    return ClipEachParameter(0.05), FreezeAtFirst(r"student\.head\.last_layer", "1 epoch"), EMATeacher("after")


def test_six_steps_are_the_authors():
    sizes = {"prototypes": 7, "hidden_dim": 10, "bottleneck_dim": 6}
    method = DINO(vit(), OptimizerRecipe(adamw, lr=0.02, weight_decay=0.04), train_gain=True, **sizes).double()
    fill(method.parameters())
    losses = run(method, batches(), schedules(teacher_temperature=0.07), *callbacks(), epochs=3)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(method.parameters()) == pytest.approx(SQUARES, rel=1e-12)
    assert method.center.value.tolist() == pytest.approx(CENTER, rel=1e-12)
