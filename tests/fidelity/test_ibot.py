"""iBOT against numbers of the authors' code.

Made with bytedance/ibot, main_ibot.py (train_one_epoch, iBOTLoss), models/vision_transformer.py, models/head.py and
utils.py, commit da316d8, with the settings of test_dino, a shared head whose norms are fixed, and a temperature of
patches from 0.04 to 0.06. A patch of an image's crop v is masked where `by_rule` of number 50 + step or 60 + step is
above 0.4; the first crop of the second image is not masked.
"""

import pytest
import torch
from torch import Tensor

from src.models.joint_embedding.ibot import iBOT
from src.optim import OptimizerRecipe, adamw
from tests.fidelity.rules import by_rule, fill
from tests.fidelity.runs import run, squares
from tests.fidelity.test_dino import batches, callbacks, schedules, vit

LOSSES = [
    3.657370423788231,
    3.5839365609134317,
    3.80619360495593,
    3.54171189825035,
    3.601716181437604,
    3.5736987481550138,
]
# squared norms of the weights after the steps: student, teacher, mask token
SQUARES = [
    0.45715673648559313,
    0.6685708813336023,
    8.351884603295394,
    25.75504312780101,
    13.014962174170615,
    11.580279229598954,
    12.316418889102078,
    19.928755710712352,
    37.74529141160596,
    6.524925182706787,
    13.18405922405504,
    13.517747397520804,
    11.57744763864516,
    26.23673244240581,
    52.38174142691068,
    26.12846830211357,
    11.20779796225737,
    12.380049346616264,
    14.509232761820936,
    19.564941379454638,
    37.181962071023264,
    6.504597106419144,
    13.692629001521244,
    11.393710910507615,
    11.530821752765519,
    26.7260038275897,
    51.44194034595202,
    26.228504713039122,
    12.136642470907283,
    13.861569419611829,
    12.162032734765155,
    5.4293653359067555,
    10.257128132544349,
    4.470306188585775,
    10.609275916036587,
    2.727030906679881,
    7.531319245138914,
    1.9279712822191655,
    0.3246252432421466,
    0.2772332640863374,
    4.530572637597965,
    12.789964431259877,
    11.33505341761882,
    11.962893760932374,
    13.346534386003128,
    9.525796474921012,
    36.81251213720153,
    3.1975955729630012,
    13.275187519700472,
    11.759571280743955,
    11.383372656067575,
    12.776878667745557,
    49.830449330235794,
    12.750497803176312,
    11.751657589881209,
    13.301574555719803,
    12.528425029225524,
    9.581010340749938,
    36.72263640702583,
    3.1949785495368426,
    11.920261476011648,
    11.297776516540063,
    12.804755338355054,
    12.754017248498222,
    48.333514760016314,
    12.791621842985112,
    13.191475855233918,
    12.609475459771005,
    11.239358374096028,
    2.636589856750157,
    10.575613356121458,
    2.218352074608753,
    9.850287836899403,
    1.2842008649850514,
    6.129769292167179,
    0.9044586940642119,
    0.166602815332084,
]
CENTER = [
    0.035873239046580796,
    0.020593551728730876,
    0.008419932755388767,
    -0.021210289828432455,
    -0.04197088145250817,
    0.06267674919550241,
    -0.00998977550805027,
]
PATCH_CENTER = [
    0.037047347338528464,
    0.018559290393399656,
    0.008132807302567657,
    -0.02235064315767509,
    -0.03814225079255884,
    0.06035601236103269,
    -0.01017062435977064,
]


class Masked(iBOT):
    """Masks patches by the rule."""

    step = 0

    def draw_masks(self, images: Tensor) -> Tensor:
        masks = [by_rule((3, 16), number + self.step, 1.0) > 0.4 for number in (50, 60)]
        masks[0][1] = False
        self.step += 1
        return torch.stack(masks, dim=1).flatten(0, 1)


def test_six_steps_are_the_authors():
    sizes = {"prototypes": 7, "hidden_dim": 10, "bottleneck_dim": 6}
    method = Masked(vit(), OptimizerRecipe(adamw, lr=0.02, weight_decay=0.04), **sizes).double()
    fill(method.parameters())
    temperatures = schedules(teacher_temperature=0.07, patch_teacher_temperature=0.06)
    losses = run(method, batches(), temperatures, *callbacks(), epochs=3)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(method.parameters()) == pytest.approx(SQUARES, rel=1e-12)
    assert method.center.value.tolist() == pytest.approx(CENTER, rel=1e-12)
    assert method.patch_center.value.tolist() == pytest.approx(PATCH_CENTER, rel=1e-12)
