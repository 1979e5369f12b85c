"""DropPos against numbers of the authors' code.

Made with Haochen-Wang409/DropPos, models_DropPos_mae.py and the loop of engine_pretrain.py with util/lr_sched.py,
commit 13f50a8, on today's timm, in float64: two epochs of two steps of AdamW (betas 0.9 and 0.95, rate 0.01, half an
epoch of warm-up, weight decay 0.05, each gradient clipped to a norm of 0.1), with attentive weights and sigma falling
from 1. A ViT of width 12 and depth 2 and a decoder of width 8 and depth 1, with two heads each, read five images of 16
pixels in patches of 4 a step; half of the patches are masked, and 70 % of the positions of the others. Weights, images
and the noise that masks by are those of `rules`.
"""

from functools import partial
from itertools import count
from typing import Any

import pytest
import torch

from src.callbacks.gradients import ClipEachParameter
from src.models.masked.droppos import DropPos
from src.optim import OptimizerRecipe
from src.schedules import LinearWarmup, WarmupCosine
from tests.fidelity.rules import by_rule, fill
from tests.fidelity.runs import Batch, run, squares
from tests.toys import small_vit

LOSSES = [2.902170165684438, 2.839398641318995, 2.7759539502764783, 2.780488947328037]
SQUARES = [0.49283990004668554, 0.5392812454681228, 26.013188023483657, 13.876770227065219, 13.095533284032665]
SQUARES += [11.103137611633056, 19.48962348976743, 37.7181179139455, 6.501220815066752, 11.197304760964874]
SQUARES += [13.362818677066919, 13.713695484307173, 25.81011936748765, 49.824894881026566, 25.942875364882298]
SQUARES += [12.962754006466533, 11.082596412103019, 12.300323291803316, 19.666232200777465, 37.57033579884078]
SQUARES += [6.600031230665206, 12.990260615776613, 13.8233924984512, 11.529895267086655, 25.879162281915015]
SQUARES += [51.90717604161368, 26.06526032473974, 11.186449033206745, 12.12388678549187, 13.957301730110181]
SQUARES += [4.287344769064438, 8.505544954070025, 8.757566804385725, 8.085636079610916, 8.611143425207734]
SQUARES += [25.426529565800116, 2.8821560941440243, 7.871906811922198, 8.26953438507647, 8.947539604998457]
SQUARES += [12.068041972063401, 32.27436460918002, 11.66367942749871, 8.809922082909083, 8.07654290513635]
SQUARES += [7.803572558276459, 5.598063962850069, 17.64012800691762]


def test_four_steps_are_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    vit: Any = small_vit(patch_size=4, embed_dim=12, depth=2)
    recipe = OptimizerRecipe(partial(torch.optim.AdamW, betas=(0.9, 0.95)), lr=0.01, weight_decay=0.05)
    sizes = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
    method = DropPos(vit, recipe, mask_ratio=0.5, position_mask_ratio=0.7, **sizes).double()
    learned = [parameter for parameter in method.parameters() if parameter.requires_grad]
    fill(learned)
    noise = count(51)
    monkeypatch.setattr(torch, "rand", lambda *shape, device: by_rule(shape, next(noise)))
    batches: list[Batch] = [
        {"image": by_rule((5, 3, 16, 16), 10 + step, 1.0), "index": torch.arange(5)} for step in range(4)
    ]
    schedules = {
        "optimizer.lr": WarmupCosine(peak=0.01, warmup="0.5 epochs"),
        "sigma": LinearWarmup(start=1.0, end=0.0, warmup="100%", per_epoch=True),
    }
    losses = run(method, batches, schedules, ClipEachParameter(0.1), epochs=2)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(learned) == pytest.approx(SQUARES, rel=1e-12)
