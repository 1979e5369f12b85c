"""ResNets with convolutions over space and time: R3D and R(2+1)D, torchvision's blocks in any depth and width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, Conv3DSimple, VideoResNet

from src.errors import SettingError
from src.models.functional import at_least_float32


class TimeConv3d(nn.Conv3d):
    """A convolution over time that a CPU computes in float32 at least.

    On CPUs PyTorch 2.14 leaves parts of the weight's gradient uninitialized, often NaN, for a bfloat16 kernel of three
    frames on clips of two, under autocast as well.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else at_least_float32(self.bias)
            output = self._conv_forward(at_least_float32(x), at_least_float32(self.weight), bias)
        return output.to(x.dtype)


class VideoConvNet(VideoResNet):
    """A ResNet of A Closer Look at Spatiotemporal Convolutions for Action Recognition (Tran et al., 2018), with the
    interface of timm's models. Its parameters have the names and, with a width of 64, the shapes of torchvision's.

    Args:
        convolution: `Conv3DSimple` for R3D, `Conv2Plus1D` for R(2+1)D.
        layers: number of blocks in each of the four stages.
        width: channels of the first stage; each further one has twice as many.
        num_classes: number of classes of the classifier; 0 for none.
        in_chans: channels of a frame.

    Raises:
        SettingError: there are not four stages.
    """

    reads_clips = True

    def __init__(
        self,
        convolution: type[Conv3DSimple] | type[Conv2Plus1D],
        *,
        layers: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        num_classes: int = 0,
        in_chans: int = 3,
    ) -> None:
        nn.Module.__init__(self)
        if len(layers) != 4 or min(layers) < 1 or width < 1:
            raise SettingError(
                f"backbone.layers={list(layers)} must be the numbers of blocks in four stages, and "
                f"backbone.width={width} at least 1"
            )
        self.inplanes = width
        self.stem = _stem(width, in_chans, factored=convolution is Conv2Plus1D)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            self._make_layer(BasicBlock, convolution, width * 2**stage, count, stride=1 if stage == 0 else 2)
            for stage, count in enumerate(layers)
        )
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.num_features = width * 8
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.kernel_size[0] > 1:
                    module.__class__ = TimeConv3d

    def forward_features(self, video: Tensor) -> Tensor:
        """[B, T, C, H, W] -> [B, D, T / 8, H / 16, W / 16]."""
        x = self.stem(video.transpose(1, 2))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        embedding = self.avgpool(features).flatten(1)
        return embedding if pre_logits else self.fc(embedding)

    def forward(self, video: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(video))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters for layer-wise learning-rate decay: the stem, then each block."""
        return {"stem": r"^stem", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


def _stem(width: int, in_chans: int, *, factored: bool) -> nn.Sequential:
    if not factored:
        first = nn.Conv3d(in_chans, width, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False)
        return nn.Sequential(first, nn.BatchNorm3d(width), nn.ReLU(inplace=True))
    middle = 45 * width // 64
    return nn.Sequential(
        nn.Conv3d(in_chans, middle, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False),
        nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True),
        nn.Conv3d(middle, width, (3, 1, 1), padding=(1, 0, 0), bias=False),
        nn.BatchNorm3d(width),
        nn.ReLU(inplace=True),
    )


def r3d(**options: Any) -> VideoConvNet:
    """R3D: `VideoConvNet` with 3D convolutions."""
    return VideoConvNet(Conv3DSimple, **options)


def r2plus1d(**options: Any) -> VideoConvNet:
    """R(2+1)D: `VideoConvNet` with convolutions over space, then over time."""
    return VideoConvNet(Conv2Plus1D, **options)
