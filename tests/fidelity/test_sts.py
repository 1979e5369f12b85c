"""STS against numbers of the authors' code.

Made with laura-wang/video_repres_sts, sts/, and the loop of train.py with networks/r21d.py's groups of parameters,
commit e79986b, where OpenCV's functions are NumPy's (exact angles): the 27 statistics of clips of 16 frames of 112
pixels and their 16 flow fields; and three steps of SGD (rates 0.01 and twice that for biases, momentum 0.9, weight
decay 0.005) in float64 of a convolution and batch norm in the network's place, on clips of 4 frames of 16 pixels.
Clips and weights are those of `rules`. No clip is mirrored and none has its answer in the second ring, whose color
the authors count otherwise.
"""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from src.datamodules.views.statistics import appearance_statistics, motion_statistics
from src.models.video.sts import STS
from src.optim import OptimizerRecipe, Rule
from tests.fidelity.rules import by_rule, fill
from tests.fidelity.runs import run, squares

MOTION = [
    [2, 1, 9, 3, 2, 1, 1, 3, 2, 1, 5, 3, 5, 2],
    [14, 1, 9, 3, 1, 2, 2, 3, 6, 1, 5, 3, 4, 1],
    [15, 6, 9, 3, 2, 2, 1, 3, 7, 6, 5, 3, 3, 1],
]
APPEARANCE = [
    [11, 5, 6, 3, 1, 5, 4, 4, 1, 4, 4, 8, 4],
    [10, 3, 1, 5, 1, 4, 4, 5, 6, 6, 1, 5, 5],
    [9, 4, 1, 5, 1, 5, 4, 5, 5, 4, 7, 4, 5],
]
LOSSES = [25.945876259517426, 25.690367750628347, 24.61745039850897]
SQUARES = [21.906945872442535, 4.857427727655616, 7.070899532519287, 7.308158076850512, 3.7459674762945134]
SQUARES += [14.969866052804978, 3.458995263184806, 15.26656516408959]


def clip(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames, uint8 [16, 3, 112, 112], whose colors change more in some places; flow, float64 [16, 2, 112, 112]."""
    time, row, column = np.meshgrid(np.arange(16), np.arange(112), np.arange(112), indexing="ij")
    waves = [np.sin(0.05 * number * row * (1 + 0.02 * time) + c * 0.11 * column + number) for c in (1, 2, 3)]
    frames = np.stack([np.floor(127.5 * (1 + wave)).astype(np.uint8) for wave in waves], axis=1)
    u = np.sin(0.002 * number * row * column / 10 + 0.3 * time) * np.exp(-((column - 20 * number) ** 2) / 900)
    v = np.cos(0.003 * (row - 10 * number) ** 2 / 10 - 0.2 * time) * np.exp(-((row - 30) ** 2) / 700)
    return frames, np.stack([u, v], axis=1)


class TinyClipNet(nn.Module):
    """A convolution over space and time and a batch norm."""

    reads_clips = True
    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 6, 3, stride=2)
        self.norm = nn.BatchNorm3d(6)

    def forward_features(self, video: Tensor) -> Tensor:
        """[B, T, 3, H, W] -> [B, 6, t, h, w]."""
        return self.norm(self.conv(video.transpose(1, 2))).relu()


def method() -> STS:
    decay = 0.005  # the recipe's rules
    rules = [Rule(r"\.bias$", lr_multiplier=2.0, weight_decay=decay), Rule("", weight_decay=decay)]
    recipe = OptimizerRecipe(partial(torch.optim.SGD, momentum=0.9), lr=0.01, weight_decay=decay, rules=rules)
    return STS(TinyClipNet(), recipe).double()


def batches() -> list[dict[str, Tensor]]:
    return [
        {
            "video": by_rule((3, 4, 3, 16, 16), 10 + step, 1.0),
            "motion": by_rule((3, 14), 20 + step, 8.0).round().abs(),
            "appearance": by_rule((3, 13), 30 + step, 8.0).round().abs(),
            "index": torch.arange(3),
        }
        for step in range(3)
    ]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_statistics_are_the_authors(number: int) -> None:
    frames, flow = clip(number)
    motion = motion_statistics(flow.astype(np.float32), frames=15)
    assert motion.tolist() == MOTION[number - 1]
    assert appearance_statistics(frames).tolist() == APPEARANCE[number - 1]


def test_three_steps_are_the_authors() -> None:
    ours = method()
    fill(ours.parameters())
    assert run(ours, batches(), {}, epochs=1) == pytest.approx(LOSSES, rel=1e-12)
    assert squares(ours.parameters()) == pytest.approx(SQUARES, rel=1e-12)
