"""SiT against numbers of the authors' code.

Made with Sara-Ahmed/SiT, vision_transformer.py, utils.py and the loop of main.py, commit 7f22e9c, in one process and in
float64: three epochs of two steps of AdamW (rate 0.001, an epoch of warm-up, a cosine to 1e-5, weight decay from 0.04
to 0.1, each gradient clipped to a norm of 0.05, the teacher's momentum from 0.9 to 1). The reconstruction weighs 5. A
ViT of width 12 and depth 2 with two heads and a projector of widths 10 and 6 read two views of four images of 16 pixels
in patches of 4 a step. View v of a step is zero where `by_rule` of number (30, 40)[v] + step is above 0.1. Weights and
views are those of `rules`; of views the sine of 20 times the rule is taken, of matrices half the sine of 40 times it:
those of the rule have rank 2, and batch norm then enlarges rounding errors. Biases of keys and those before a batch
norm have a gradient of zero, which Adam makes something of, and are not compared.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.callbacks.ema_teacher import EMATeacher
from src.callbacks.gradients import ClipEachParameter
from src.models.masked.sit import SiT
from src.optim import OptimizerRecipe, adamw
from src.schedules import Cosine, WarmupCosine
from tests.fidelity.rules import ENLARGED, by_rule, fill
from tests.fidelity.runs import batch, run, squares, views
from tests.toys import small_vit

LOSSES = [7.720566047210524, 6.496589380508723, 7.14225427476258, 7.615262686868087, 7.455949543185431]
LOSSES += [6.11552237911393]
SQUARES = [1.7368707625709099, 26.796666051364998, 75.71317491822293, 14.011856344968766, 12.801093273114324]
SQUARES += [11.079686116218513, 57.025966640779814, 26.109228289741942, 19.018925891835867, 11.18324249069477]
SQUARES += [13.345963998966079, 13.746681244124893, 75.72547869359396, 49.281536027419754, 76.49102230513871]
SQUARES += [13.04229142901699, 11.11791419322241, 12.327058005665, 56.466127603202715, 26.277289830143587]
SQUARES += [18.63247345204618, 13.112362561199234, 13.873303624934872, 11.572695699040938, 76.20735897888011]
SQUARES += [51.51791195570011, 75.5589063585392, 11.172810941504686, 12.104682836650241, 14.090793875252263]
SQUARES += [15.489563962141734, 10.152514978427012, 11.074113675779548, 12.960575464762405, 10.450471939275]
SQUARES += [11.105132664987801, 8.915130039854422, 19.92895354917845, 12.69722972191273, 19.103016207279083]
SQUARES += [12.691095675932207, 18.171497217772462, 11.932538338658075, 76.25576124816645, 3.971429789982269]
SQUARES += [1.7390472754033253, 26.81097528039148, 75.73986768149743, 14.019448553406297, 12.81161511203176]
SQUARES += [11.07947642872514, 57.03956940141684, 26.12581366252911, 19.039010556262447, 11.191049519126253]
SQUARES += [13.326046204632574, 13.732244140353409, 75.7213238911575, 49.27453031249134, 76.47694517479184]
SQUARES += [13.041592772286373, 11.111750151397247, 12.31918894004929, 56.46329887362907, 26.284190967502994]
SQUARES += [18.62933780197025, 13.10710077862061, 13.876578075336152, 11.580335471198364, 76.23564150227286]
SQUARES += [51.461232804931804, 75.57442562268989, 11.170626567946734, 12.100953934550692, 14.107949969744483]
SQUARES += [15.497051091211237, 10.158268004550624, 11.071615941318623, 12.96067947815277, 10.451540421412599]
SQUARES += [11.094134163866205, 8.916353795960203]


class ByRule:
    """Drops pixels by the rule."""

    step = 0

    def __call__(self, views: Tensor) -> tuple[Tensor, Tensor]:
        masks = torch.stack([by_rule((4, 1, 16, 16), number + self.step, 1.0) > 0.1 for number in (30, 40)], dim=1)
        self.step += 1
        return torch.where(masks, 0.0, views), masks


def with_gradient(network: nn.Module) -> Iterator[Tensor]:
    """The parameters whose gradient is not zero."""
    for name, parameter in network.named_parameters():
        if name.endswith("qkv.bias"):
            query, _, value = parameter.chunk(3)
            yield torch.cat([query, value])
        elif name not in ("projector.0.bias", "projector.3.bias", "projector.6.bias"):
            yield parameter


def test_six_steps_are_the_authors() -> None:
    vit: Any = small_vit(patch_size=4, embed_dim=12, depth=2)
    recipe = OptimizerRecipe(adamw, lr=0.001, weight_decay=0.04)
    method = SiT(vit, recipe, hidden_dim=10, projection_dim=6, reconstruction_weight=5.0).double()
    method.corruption = ByRule()  # type: ignore[assignment]
    learned = [*method.student.parameters(), *method.pixels.parameters()]
    fill(learned)
    for parameter in learned:
        if parameter.ndim > 1:
            parameter.data.mul_(40).sin_().mul_(0.5)
    method.teacher.load_state_dict(method.student.state_dict())
    schedules = {
        "optimizer.lr": WarmupCosine(peak=0.001, warmup="1 epoch", end=1e-5, inclusive=True),
        "optimizer.weight_decay": Cosine(start=0.04, end=0.1),
        "teacher_momentum": Cosine(start=0.9, end=1.0),
    }
    batches = [batch(torch.sin(20 * views(step, count=4, side=16))) for step in range(6)]
    losses = run(method, batches, schedules, EMATeacher("after"), ClipEachParameter(0.05), epochs=3)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    compared = [*with_gradient(method.student), *method.pixels.parameters(), *with_gradient(method.teacher)]
    assert squares(compared) == pytest.approx(SQUARES, rel=ENLARGED)
