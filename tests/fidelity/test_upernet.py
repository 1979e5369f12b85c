"""UPerNet on a ViT's maps against numbers of the authors' code.

Made with open-mmlab/mmsegmentation 1.2.2, as MAE's configuration has it: models/necks/featurepyramid.py,
decode_heads/uper_head.py, psp_head.py and fcn_head.py and losses/cross_entropy_loss.py, in float64, without mmcv: a
`ConvModule` is a convolution without bias, batch norm and ReLU, and the number of pixels is not increased by 1e-7.
Four maps of 6 channels, 6 x 6 positions and two images, heads of width 5 and 4 without dropout, masks of 12 x 12
pixels, an eighth of them ignored: three steps of SGD with a rate of 0.01 on the loss of both heads. Weights, maps and
masks are those of `rules`.
"""

import pytest
import torch
from torch import Tensor, nn

from src.datamodules.batches.base import IGNORED
from src.models.downstream.segmentation import FCNHead, UPerNetHead, pixel_loss
from tests.fidelity.rules import by_rule, fill
from tests.fidelity.runs import squares

CLASSES = 3
SHAPE = ((6,) * 4, (16,) * 4, CLASSES)

LOSSES = [1.5944380276775891, 1.5394010321388065, 1.5270559954172198]
SQUARES = [6.498291355222561, 4.862881884113485, 7.106811248169249, 7.418278880577528, 6.492098613149907]
SQUARES += [5.417041781882938, 6.483562914083631, 6.845142041776683, 1.3029329602903583, 4.4920126571860255]
SQUARES += [6.839524382304876, 1.359371875181251, 3.4822237730998076, 5.364995013119935, 1.383678873903074]
SQUARES += [4.693624925986605, 3.6632534179871037, 1.2925168032587038, 6.523536706285931, 3.937251610287009]
SQUARES += [52.69612122820224, 6.745757873460916, 5.819353986884204, 1.3382884379551543, 5.107561037283517]
SQUARES += [6.920506146082991, 1.3182944241505803, 3.5627760807866893, 5.965641886710099, 1.407006519442988]
SQUARES += [4.129633451765107, 4.054840523933631, 10.114061357216976, 6.049612422741483, 3.595790442750137]
SQUARES += [10.151236697031663, 6.913751622121936, 5.203694451089919, 10.098458717038087, 5.729587738161901]
SQUARES += [6.784550640819101, 40.448349773478704, 3.8705908535532756, 6.454357827431837, 0.7178888784696579]
SQUARES += [2.5514032440225893, 9.740664219277214, 5.603266433695594, 4.945377501774763, 0.5393141355218073]
SQUARES += [2.296850814327222]


def inputs(step: int) -> tuple[list[Tensor], Tensor]:
    numbers = range(10 + 4 * step, 14 + 4 * step)
    maps = [by_rule((2, 6, 6, 6), number, 1.0) + by_rule((2, 6, 1, 1), 20 + number, 1.0) for number in numbers]
    noise = by_rule((2, 12, 12), 50 + step, 1.0)
    mask = noise.mul(50).long().abs() % CLASSES
    return maps, mask.masked_fill(noise > 0.92, IGNORED)


def method() -> nn.ModuleList:
    heads = [UPerNetHead(*SHAPE, width=5, dropout=0.0), FCNHead(*SHAPE, width=4, level=2, dropout=0.0)]
    return nn.ModuleList(heads).double().train()


def test_three_steps_are_mmsegmentations() -> None:
    ours = method()
    fill(ours.parameters())
    head, auxiliary = ours
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.01)
    losses = []
    for step in range(3):
        maps, mask = inputs(step)
        loss = pixel_loss(head(maps), mask) + 0.4 * pixel_loss(auxiliary(maps), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(ours.parameters()) == pytest.approx(SQUARES, rel=1e-12)
