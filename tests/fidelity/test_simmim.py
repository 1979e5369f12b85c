"""SimMIM against numbers of the authors' code.

Made with microsoft/SimMIM, models/simmim.py with models/vision_transformer.py or models/swin_transformer.py,
optimizer.py, lr_scheduler.py and the loop of main_simmim.py, commit d3e29bc, in float64: two epochs of three steps of
AdamW (rate 0.01, warm-up from 0.001 in 3 steps, a tenth from step 5, weight decay 0.05, gradients clipped to a norm of
0.5). A ViT of width 12 and depth 2 with patches of 4 pixels and a shared relative position bias, or a Swin transformer
of width 8, depths 1 and 2, with patches of 2 pixels and windows of 2, reads three images of 16 pixels a step. Each has
2 x 2 squares; a square is masked where `by_rule` of number 50 + step is above 0.2. Weights and images are those of
`rules`.
"""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from src.models.masked.simmim import SimMIM
from src.optim import OptimizerRecipe, Rule, adamw
from src.schedules import Horizon, WarmupDrops
from tests.fidelity.rules import by_rule, fill
from tests.fidelity.runs import Batch, run, squares

VIT_LOSSES = [1.2363839208944618, 1.2057526189105285, 1.174199473553306, 1.0515238717055486, 0.9454128867072497]
VIT_LOSSES += [0.8878338306246065]
VIT_SQUARES = [0.5183480572692816, 0.49764569265967185, 25.943995394973598, 14.135727882070055, 4.687697054063104]
VIT_SQUARES += [11.159257593903176, 12.585651102996799, 14.386321412257995, 12.125838559717648, 11.248577104577382]
VIT_SQUARES += [13.162800000277743, 19.639825212630928, 6.524853647041744, 11.58947358696944, 13.969768730879965]
VIT_SQUARES += [12.802692562084777, 25.48736944154227, 49.62049721219084, 26.186660887864534, 12.253281855406598]
VIT_SQUARES += [11.053089304335247, 13.103662326271126, 13.950143106214927, 11.645238999229434, 11.39949167473254]
VIT_SQUARES += [13.597390469786207, 19.74028237211453, 6.553200005576847, 11.970438291873123, 14.184887680784563]
VIT_SQUARES += [12.318946409553774, 26.051193543386532, 50.347378486861544, 26.219998223874967, 11.75824162570901]
VIT_SQUARES += [11.416181743367998, 13.39659605326666, 25.971576810084514, 46.178310066623496]
SWIN_LOSSES = [1.6869341768718338, 1.5760687831694906, 1.4456302751768995, 1.0909639419467758, 1.2461008020365325]
SWIN_LOSSES += [1.3014506451790162]
SWIN_SQUARES = [0.33198097590074893, 4.20567882338146, 8.898098299327003, 8.545187497993751, 7.731637939400854]
SWIN_SQUARES += [8.82156442016055, 8.778816298792599, 0.37507123495807426, 8.973868309651735, 25.004764558634328]
SWIN_SQUARES += [3.2483468157415407, 8.04433597302346, 7.662436147791926, 8.856972291761249, 10.835937073396666]
SWIN_SQUARES += [32.35999908415609, 11.613638518743775, 9.057719782991377, 34.76398342582979, 32.11019673183256]
SWIN_SQUARES += [23.171926222947484, 17.764401344854132, 16.42487789831801, 0.7984836478585243, 34.485348751483826]
SWIN_SQUARES += [51.590638725685324, 11.734307605058099, 16.090620416761183, 17.808488705067766, 17.18846058646978]
SWIN_SQUARES += [46.42764417011708, 65.74809675957735, 45.989227212249425, 16.632974405597242, 15.81709978071436]
SWIN_SQUARES += [17.55672140870142, 0.8013311048371821, 34.48758071251611, 49.05595049069433, 11.673387454142041]
SWIN_SQUARES += [17.337830266459253, 15.843377931966714, 16.56695622209393, 46.60275177173306, 67.05198932515032]
SWIN_SQUARES += [46.014595697512206, 17.094650868863194, 17.019546442360586, 16.202622963431754, 33.14381893737786]
SWIN_SQUARES += [47.74592789825496]


class Masked(SimMIM):
    """Masks squares by the rule."""

    step = 0

    def draw_masks(self, image: Tensor) -> Tensor:
        mask = by_rule((3, 2, 2), 50 + self.step, 1.0) > 0.2
        self.step += 1
        return mask.repeat_interleave(self.square[0], 1).repeat_interleave(self.square[1], 2).flatten(1)


class OneStepLate(WarmupDrops):
    """The authors' schedule, which is moved after the update by the number of the step before."""

    def value(self, step: int, horizon: Horizon) -> float:
        return super().value(max(0, step - 1), horizon)


def six_steps(backbone: nn.Module, *, not_decayed: str) -> tuple[list[float], list[float]]:
    rules = [Rule(not_decayed, weight_decay=0.0)]  # as in the experiments
    method = Masked(backbone, OptimizerRecipe(adamw, lr=0.01, weight_decay=0.05, rules=rules), mask_size=8).double()
    fill(method.parameters())
    batches: list[Batch] = [
        {"image": by_rule((3, 3, 16, 16), 10 + step, 1.0), "index": torch.arange(3)} for step in range(6)
    ]
    rate = OneStepLate(peak=0.01, drops=[5], warmup=3, start=0.001)
    losses = run(method, batches, {"optimizer.lr": rate}, epochs=2, gradient_clip_val=0.5)
    return losses, squares(method.parameters())


def test_six_steps_with_a_vit_are_the_authors() -> None:
    options: Any = {"use_abs_pos_emb": False, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
    options |= {"use_fc_norm": False, "init_values": 0.1, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
    vit = timm.create_model("beit_base_patch16_224", num_classes=0, img_size=16, **options)
    losses, weights = six_steps(vit, not_decayed="cls_token$")
    assert losses == pytest.approx(VIT_LOSSES, rel=1e-12)
    assert weights == pytest.approx(VIT_SQUARES, rel=1e-12)


def test_six_steps_with_a_swin_transformer_are_the_authors() -> None:
    options: Any = {"patch_size": 2, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "window_size": 2}
    options |= {"drop_path_rate": 0.0}
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=16, **options)
    losses, weights = six_steps(swin, not_decayed="^mask_token$")
    assert losses == pytest.approx(SWIN_LOSSES, rel=1e-12)
    assert weights == pytest.approx(SWIN_SQUARES, rel=1e-12)
