"""VideoMAE and VideoMAE V2 against numbers of the authors' code.

Made with modeling_pretrain.py, engine_for_pretraining.py, optim_factory.py and utils.cosine_scheduler of MCG-
NJU/VideoMAE, commit 14ef8d8, and of OpenGVLab/VideoMAEv2 with its running cells, commit 29eab1e, in float64: two
epochs of two steps of AdamW (betas 0.9 and 0.95, weight decay 0.05, a cosine from 0.01 to 0.001). A ViT of width 12
and depth 2 and a decoder of width 8 and depth 1, with two heads each, read three clips of 16 frames of 16 pixels in
tubelets of 2 frames of 4 pixels a step, 75 % of them masked. Weights, clips and the noise that masks by are those of
`rules`. The authors' keys have no bias: ours begins at 0, and no gradient reaches it.
"""

from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from src.models.video.masking import running_cell_masking
from src.models.video.videomae import VideoMAE
from src.optim import OptimizerRecipe, Rule
from src.schedules import WarmupCosine
from tests.fidelity.rules import by_rule, fill
from tests.fidelity.runs import run, squares
from tests.toys import small_video_vit

LOSSES = [2.2614242260097144, 1.8993301765927324, 1.6917050989944935, 1.5963626030715476]
SQUARES = [52.43445835852017, 11.223032987354996, 11.657465478626364, 14.237175013664547, 19.47233611632009]
SQUARES += [24.26436121855014, 6.579600189799731, 14.098551264567867, 12.020655596338079, 11.128884955349335]
SQUARES += [25.85644354009637, 50.888441462663344, 25.981971415948138, 11.491430294690016, 13.92968696718021]
SQUARES += [12.935878357008612, 19.5584220675129, 23.74358127519512, 6.4903614609006315, 12.240138653091103]
SQUARES += [11.120615797003087, 13.246602154782742, 26.15668988242723, 48.76994807457531, 25.900194631572788]
SQUARES += [13.773501437673314, 13.341211512910338, 11.286238330003702, 0.25708579473813087, 4.320983701079562]
SQUARES += [7.5704504100779095, 8.509974541055673, 8.15790546112465, 16.630169373625215, 2.7267583471954904]
SQUARES += [8.692006743606054, 9.006096795476363, 7.724925378623195, 12.49016636289573, 33.78760253518669]
SQUARES += [11.679878445671896, 7.684350950384157, 8.401361990789772, 8.928641252023391, 35.118496637232965]
SQUARES += [93.8900136993104]
V2_LOSSES = [2.257994939347863, 1.8991301533122042, 1.6911410223964087, 1.597396212575938]
V2_SQUARES = [52.16525378397887, 11.224995129455525, 11.653976242031785, 14.269173112856636, 19.48990757616413]
V2_SQUARES += [24.25755673761779, 6.595058984751793, 14.100086370790157, 11.96449248869119, 11.139868711197106]
V2_SQUARES += [25.855911029940504, 50.87262214489516, 25.9848237249234, 11.489763076780564, 13.927268864709195]
V2_SQUARES += [12.956117947866737, 19.561330416373828, 23.74689556934384, 6.480330845986724, 12.247719992390511]
V2_SQUARES += [11.114365223102016, 13.285205685006666, 26.14928981633921, 48.765851397466534, 25.91427800439913]
V2_SQUARES += [13.776464578614016, 13.346348318559706, 11.283287427803387, 0.2584964248092132, 4.335634524854358]
V2_SQUARES += [7.610907732173681, 8.50505629713053, 8.122924128017448, 16.67420269293411, 2.7220452751549438]
V2_SQUARES += [8.695632226015128, 9.008439162529333, 7.723329812397402, 12.502944851649673, 33.77821040707054]
V2_SQUARES += [11.670648004036693, 7.687250237492788, 8.400684798223525, 8.931330120127086, 35.111107226756566]
V2_SQUARES += [93.8916798107796]


def method(**options: Any) -> VideoMAE:
    vit: Any = small_video_vit(frames=16, patch_size=4, embed_dim=12, depth=2, fc_norm=False)
    rules = [Rule(r"^decoder\.mask_token$", weight_decay=0.0)]  # as in the recipe
    recipe = OptimizerRecipe(partial(torch.optim.AdamW, betas=(0.9, 0.95)), lr=0.01, weight_decay=0.05, rules=rules)
    options |= {"mask_ratio": 0.75, "pixel_std": (0.229, 0.224, 0.225)}
    return VideoMAE(vit, recipe, decoder_dim=8, decoder_depth=1, decoder_heads=2, **options).double()


def four_steps(ours: VideoMAE, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[float]]:
    """The losses, and the squared norms of the weights without the biases of keys."""
    learned = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    fill(learned.values())
    biases = [parameter.data.chunk(3)[1].zero_() for name, parameter in learned.items() if name.endswith("qkv.bias")]
    noise, cells = count(51), count()

    def first_of_cells(limit: int, shape: tuple[int, int], device: Any) -> Tensor:
        step = next(cells)  # the authors' first map is that of their pointer 0, which moves before it is read
        return torch.tensor([[step], [step + 1], [step + 3]]).add(1) % limit

    monkeypatch.setattr(torch, "rand", lambda *shape, device: by_rule(shape, next(noise)))
    monkeypatch.setattr(torch, "randint", first_of_cells)
    batches = [{"video": by_rule((3, 16, 3, 16, 16), 10 + step, 1.0), "index": torch.arange(3)} for step in range(4)]
    losses = run(ours, batches, {"optimizer.lr": WarmupCosine(peak=0.01, end=0.001)}, epochs=2)
    assert max(bias.abs().max() for bias in biases) < 1e-9
    return losses, squares(learned.values())


def test_four_steps_are_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, weights = four_steps(method(), monkeypatch)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert weights == pytest.approx(SQUARES, rel=1e-12)


def test_four_steps_with_dual_masking_are_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, weights = four_steps(method(decoder_masking=running_cell_masking), monkeypatch)
    assert losses == pytest.approx(V2_LOSSES, rel=1e-12)
    assert weights == pytest.approx(V2_SQUARES, rel=1e-12)
