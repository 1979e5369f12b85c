"""X-CLIP against numbers of the authors' code.

Made with microsoft/VideoX, X-CLIP: models/, clip/model.py, utils/optimizer.py and train_one_epoch of main.py, commit
1744b21, with layer norms in float64 instead of float32: three epochs of two steps of AdamW with a frozen text tower
(rate 0.001, an epoch of warm-up, weight decay 0.1, label smoothing 0.1, no mixing). Towers of width 64 and depth 2,
one head as the authors count, read four clips of three frames of 16 pixels in patches of 8 a step, and names of four
classes. Weights and clips are those of `rules`. The authors set the rate of a step before its number is known: it is
that of the step before.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from src.models.text.text_tower import CLIPTextTower
from src.models.video.xclip import XCLIP
from src.optim import OptimizerRecipe, Rule
from src.schedules import CosineWithWarmup, Horizon
from tests.fidelity.rules import ENLARGED, by_rule, fill
from tests.fidelity.runs import run, squares
from tests.toys import small_vit

NAMES = torch.tensor([[1, 5, 19, 0, 0], [1, 6, 7, 19, 0], [1, 7, 5, 6, 19], [1, 8, 19, 0, 0]])

LOSSES = [
    1.3886717063171943,
    1.3893449901911745,
    1.3857532501863818,
    1.3924501534554972,
    1.3859727421219126,
    1.3864460533901806,
]
SQUARES = [1.6835048049375567, 2.8269010692968557, 14.461893757181727, 552.7445062328875, 67.43756072073407]
SQUARES += [66.35060371445, 66.49305545942116, 67.52563739734505, 552.5954556224549, 199.27152569784135]
SQUARES += [184.24066765835343, 67.62671467692657, 66.7031160740494, 66.23818261757528, 736.9904420853882]
SQUARES += [267.15948378779046, 737.0468871306339, 66.44349582972316, 67.46155577295403, 67.15714420695856]
SQUARES += [552.6372236997944, 201.4882362962831, 184.23699810466096, 66.80575865017889, 66.25602541431158]
SQUARES += [66.9938842033205, 736.9627132446742, 265.91409716951665, 736.9651151198865, 67.39894234911787]
SQUARES += [67.29214293678956, 66.30419965567143, 183.5289061593549, 67.59634495885199, 66.9219379307059]
SQUARES += [66.23532377129283, 550.754787956193, 201.4009699830429, 183.61002962128455, 66.30072641839178]
SQUARES += [184.03090981736233, 67.23943165192486, 66.32452637503117, 66.62573749640889, 551.6431797335946]
SQUARES += [199.71916098860748, 184.17399751584117, 66.9113901841881, 57.64201950733229, 14.353238264828718]
SQUARES += [184.29557123022363, 67.18197026691759, 184.27092175105727, 66.40113634521445, 184.25909175685322]
SQUARES += [67.49171501288252, 184.26317130147584, 66.25768636405573, 66.7128883502873, 67.62577457283001]
SQUARES += [737.265489748725, 267.30451871863033, 737.2981308859405, 67.52871032507505, 66.46725831255719]
SQUARES += [66.36810157789347, 184.38053864354833, 67.24092782689857, 184.37772884668388, 66.61929791312878]
SQUARES += [184.3598399853072, 66.87342312598595, 184.33154471979947, 66.96776082765015, 67.57997872315264]
SQUARES += [66.54380283108364, 737.2358049955126, 269.1427376245352, 737.2187766328452, 66.3244580451626]
SQUARES += [66.53423835135239, 67.57484462914678, 66.98051424015178, 66.23704195652131, 184.2404953565333]
SQUARES += [184.31824469127787, 8.836074310152853, 66.32684908052912, 67.25342859741701, 554.4646145410106]
SQUARES += [199.4420987823825, 184.53907229440472, 67.6084107762478, 66.93877591349585, 66.07953156931731]
SQUARES += [736.5076967941452, 268.7939580071928, 738.0957630259015, 66.39503279745023, 67.03160507788446]
SQUARES += [67.69917461378579, 66.42925496238081, 183.9363730904554, 67.53123422109724, 66.8424590515834]
SQUARES += [66.20998575217604, 66.57611573533431, 185.84188758377647, 367.7285411407682, 183.49972140900593]
SQUARES += [66.9250671921161, 67.54425309416568, 66.88514152978004, 737.7915894476557, 269.8122035733692]
SQUARES += [738.4094259965966, 66.82892804161872, 66.57619822416828, 67.41365034777948, 183.32444931772292]
SQUARES += [367.5561023947181, 182.89973292592643, 68.1425459867034, 66.55187553576218, 66.27241885817176]
SQUARES += [737.1846626063698, 267.1277450124194, 738.671005346243, 66.92585302314014]


class Tokenizer:
    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = NAMES[[int(text) for text in texts]]
        return rows, rows != 0


class AStepLater(CosineWithWarmup):
    def value_for(self, lr_multiplier: float, step: int, horizon: Horizon) -> float:
        return super().value_for(lr_multiplier, max(0, step - 1), horizon)


class Steps(XCLIP):
    """X-CLIP whose class names are set by the test, without a DataModule."""

    def on_fit_start(self) -> None:
        self.set_classes(Tokenizer(), ["0", "1", "2", "3"])  # type: ignore[arg-type]


def method() -> XCLIP:
    vit: Any = small_vit("vit_base_patch32_clip_quickgelu_224", embed_dim=64, depth=2, num_heads=1)
    text = CLIPTextTower(vocabulary=20, length=5, width=64, depth=2, heads=1, activation="quick_gelu")
    rules = [Rule("pos_embed|cls_token|position_embedding", weight_decay=0.0)]  # as in the recipe
    recipe = OptimizerRecipe(partial(torch.optim.AdamW, betas=(0.9, 0.98)), lr=0.001, weight_decay=0.1, rules=rules)
    options: dict[str, Any] = {"frames": 3, "embed_dim": 64, "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.1}
    return Steps(vit, text, recipe, **options).double()


def test_six_steps_are_the_authors() -> None:
    ours = method()
    fill(ours.parameters())
    batches = [
        {
            "video": by_rule((4, 3, 3, 16, 16), 10 + step, 1.0),
            "label": (torch.arange(4) + step) % 4,
            "index": torch.arange(4),
        }
        for step in range(6)
    ]
    schedules = {"optimizer.lr": AStepLater(peak=0.001, warmup="1 epoch", end=0.00001)}
    assert run(ours, batches, schedules, epochs=3) == pytest.approx(LOSSES, rel=1e-12)
    assert squares(ours.parameters()) == pytest.approx(SQUARES, rel=ENLARGED)
