"""I-JEPA against numbers of the authors' code.

Made with facebookresearch/ijepa, src/models/vision_transformer.py, src/utils/schedulers.py and the loop of
src/train.py, commit 52c1ae9, in float64: six steps of AdamW (rate from 0.001 to 0.01 in two steps, then to 0.0001,
weight decay from 0.04 to 0.4, momentum from 0.9 to 1). A ViT of width 12 and depth 2 without a class token and a
predictor of width 8 and depth 1, with two heads each, read three images of 16 pixels in patches of 4 a step. The blocks
are those of `blocks`. Weights and images are those of `rules`.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from src.callbacks.ema_teacher import EMATeacher
from src.models.masked.ijepa import IJEPA
from src.models.masked.multi_block import ContextAndTargets
from src.optim import OptimizerRecipe, adamw
from src.schedules import Cosine, Horizon, Linear, Schedule, WarmupCosine
from tests.fidelity.rules import ENLARGED, by_rule, fill
from tests.fidelity.runs import Batch, run, squares
from tests.toys import small_vit

LOSSES = [0.7767587222667988, 0.6942890536602591, 0.6147971440040819, 0.5855176671690889, 0.5628502983668452]
LOSSES += [0.5561595937270296]
SQUARES = [25.890842399492648, 11.271204007787514, 11.706457535552286, 14.368645840910668, 19.455591996631306]
SQUARES += [37.58444486972433, 6.581444543938195, 14.109689329010804, 12.10266386405274, 11.154946359828688]
SQUARES += [25.641148619199924, 51.65862348417509, 25.894165993658522, 11.463996146959534, 13.93375533287314]
SQUARES += [13.054627089344356, 19.28873320330942, 37.73088111633751, 6.471098928056893, 12.279353348386387]
SQUARES += [11.07990040058909, 13.174749079323927, 26.124266582625417, 49.24787488783139, 25.955759710046195]
SQUARES += [13.671268325284899, 13.156106675749252, 11.303289860939062, 0.27113135877073136, 4.307899826226244]
SQUARES += [7.81302974802496, 8.49509141055284, 8.753549010982635, 8.393361518308422, 23.55352071846622]
SQUARES += [2.8807018191173612, 8.733764785116628, 8.008727568666838, 8.117158900393692, 11.738761048994663]
SQUARES += [34.873824980054515, 11.442453926441393, 8.65548014332994, 8.750307420514368, 8.187474063773413]
SQUARES += [4.278112051627051, 10.76729266568811, 25.931831582509638, 11.29647508154414, 11.787708719951727]
SQUARES += [14.08632615025665, 19.435137896813785, 37.57664605472055, 6.49042066869342, 14.096866265805193]
SQUARES += [12.05625539530396, 11.184944587862791, 25.81244876288087, 51.41887566660498, 25.835843873926812]
SQUARES += [11.593490200671724, 13.92224270859687, 13.052637115509212, 19.387658457253924, 37.595980628343646]
SQUARES += [6.468573065541704, 12.255882918365419, 11.110542677884897, 13.112567889429137, 26.004880874710665]
SQUARES += [49.17118944544555, 25.935625072632988, 13.751444066702115, 13.239193830412352, 11.195609273522319]


def blocks(step: int) -> ContextAndTargets:
    context = torch.tensor([[0, 1, 4, 5, 8], [2, 3, 6, 7, 11], [1, 2, 9, 10, 15]])
    first = torch.tensor([[2, 3, 6, 7], [0, 1, 4, 5], [4, 5, 8, 9]])
    second = torch.tensor([[10, 11, 14, 15], [8, 9, 12, 13], [6, 7, 10, 11]])
    return ContextAndTargets((context + step) % 16, (torch.stack([first, second], dim=1) + 3 * step) % 16)


class WithBlocks(IJEPA):
    """Takes its blocks from `blocks`."""

    step = 0

    def draw_masks(self, image: Tensor) -> ContextAndTargets:
        self.step += 1
        return blocks(self.step - 1)


@dataclass(frozen=True)
class OneStepAhead(Schedule):
    """The authors' schedules, which are moved before the first step."""

    schedule: Schedule

    def value(self, step: int, horizon: Horizon) -> float:
        return self.schedule.value(step + 1, horizon)


def test_six_steps_are_the_authors() -> None:
    vit: Any = small_vit(patch_size=4, embed_dim=12, depth=2, class_token=False, global_pool="avg", fc_norm=False)
    sizes = {"predictor_dim": 8, "predictor_depth": 1, "predictor_heads": 2}
    method = WithBlocks(vit, OptimizerRecipe(adamw, lr=0.01, weight_decay=0.04), **sizes).double()
    learned = [parameter for parameter in method.parameters() if parameter.requires_grad]
    fill(learned)
    method.teacher.load_state_dict(method.backbone.state_dict())
    batches: list[Batch] = [
        {"image": by_rule((3, 3, 16, 16), 10 + step, 1.0), "index": torch.arange(3)} for step in range(6)
    ]
    schedules = {
        "optimizer.lr": OneStepAhead(WarmupCosine(peak=0.01, warmup=2, start=0.001, end=0.0001)),
        "optimizer.weight_decay": OneStepAhead(Cosine(start=0.04, end=0.4)),
        "teacher_momentum": Linear(start=0.9, end=1.0),
    }
    losses = run(method, batches, schedules, EMATeacher("after"), epochs=1)
    teacher = [value for name, value in method.teacher.named_parameters() if name != "pos_embed"]
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares([*learned, *teacher]) == pytest.approx(SQUARES, rel=ENLARGED)
