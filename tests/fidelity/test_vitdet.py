"""ViTDet's pyramid and Detectron2's pooling of regions against numbers of the authors' code.

Made with facebookresearch/detectron2, modeling/backbone/vit.py and utils.py, layers/batch_norm.py and wrappers.py,
and modeling/poolers.py, commit 02b5c4e, in float64: the maps of a ViT of width 12, depth 2, two heads and patches of
16 pixels, pretrained on 64 pixels, with windows of 4 patches in its first block, for two images of 96 x 160 pixels;
three steps of SGD on their weighted sum, with a rate of 0.000001. Regions of several sizes, pooled from four maps to
7 x 7: the sum of the squares of each. Weights, images and maps are those of `rules`.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from src.models.heads.mask_rcnn import RegionPool
from src.models.heads.pyramid import POOLED, SimplePyramid
from tests.fidelity.rules import by_rule, fill
from tests.fidelity.runs import squares
from tests.toys import small_vit

LOSSES = [-47.88352913790156, -54.14475352612146, -38.32452142635267]
SQUARES = [9.2181261325653, 414.70322250133415, 11.808077281041575, 14.020913381760746, 12.813226201577164]
SQUARES += [19.444378714853556, 37.57285581262596, 6.481223109479536, 12.039418856600832, 11.192511220423793]
SQUARES += [13.322478730866006, 25.97804615980231, 48.99977009456516, 25.960469640988826, 13.914661981930246]
SQUARES += [13.04128514955542, 11.110584808059901, 19.437678243568563, 37.64965334186923, 6.479539309190595]
SQUARES += [11.124925828921768, 13.106135711479556, 13.877542500124473, 25.8611718359536, 49.10736120013614]
SQUARES += [25.877697412750116, 13.261104672208166, 12.934809794711825, 7.337208173594478, 7.207955161343192]
SQUARES += [4.93510391004836, 3.2384541089755707, 3.459774930546624, 1.1401188579048247, 7.898942447156065]
SQUARES += [8.785083053069235, 25.866891050391256, 7.8197595853824335, 8.18360246480728, 12.98625758698137]
SQUARES += [7.357838219389642, 2.10439314513107, 8.490712361466445, 8.885851581020189, 25.972339400907074]
SQUARES += [7.836411742914725, 8.733563881794268, 4.258548099808669, 7.878856198233668, 8.094232502409934]
SQUARES += [25.953866225124713, 8.546959376158835, 7.735881851807394, 4.342137776667972, 8.898529079707455]
SQUARES += [8.247188726689064, 25.869402154502996, 8.673218304250705, 8.815320841849363]
REGIONS = [47.41671470902483, 17.429272157047652, 1.2583836611115855, 1.2892834614545283, 58.07327899672929]

BOXES = torch.tensor(
    [[3.0, 5.0, 40.5, 61.0], [0.0, 0.0, 255.0, 250.0], [100.2, 90.7, 230.0, 200.0], [17.0, 3.0, 18.0, 5.0]],
    dtype=torch.float64,
)


def method() -> SimplePyramid:
    vit: Any = small_vit(img_size=64, patch_size=16, embed_dim=12, depth=2, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    return SimplePyramid(vit, channels=8, window=4, global_blocks=1).double()


def test_three_steps_are_the_authors() -> None:
    ours = method()
    learned = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    fill(learned)
    optimizer = torch.optim.SGD(learned, lr=1e-6)
    losses = []
    for step in range(3):
        maps = ours(by_rule((2, 3, 96, 160), 10 + step, 1.0))
        del maps[POOLED]
        loss = torch.stack([(values * by_rule(values.shape, 20, 1.0)).sum() for values in maps.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(learned) == pytest.approx(SQUARES, rel=1e-12)


def test_regions_are_detectron2s() -> None:
    maps = {str(level): by_rule((2, 3, 64 >> level, 64 >> level), 20 + level, 1.0) for level in range(4)}
    pooled = RegionPool((4, 8, 16, 32), 7)(maps, [BOXES[:3], BOXES[2:]], [(256, 256)] * 2)
    assert pooled.square().sum(dim=(1, 2, 3)).tolist() == pytest.approx(REGIONS, rel=1e-12)
