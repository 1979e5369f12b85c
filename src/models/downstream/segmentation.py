"""Semantic segmentation on the maps of a pretrained backbone: a linear head on patches, and UPerNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from src.collectives import is_distributed
from src.datamodules.batches.base import IGNORED
from src.datamodules.batches.dense import SegmentationBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.feature_maps import FeatureMaps
from src.models.backbones.image_encoder import ImageEncoder, cls_token_or_mean
from src.models.downstream import colormaps as colors
from src.models.downstream.class_head import ClassHeadModule
from src.models.downstream.finetune import layer_rules_below
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe

Head = Callable[[Sequence[int], Sequence[int], int], nn.Module]
"""Of the maps' widths, their strides and the number of classes: maps -> logits [B, K, h, w]."""


class Segmenter(ClassHeadModule):
    """A class for every pixel. Validated by ``eval/miou``, the mean over the classes that occur or are predicted of
    intersection over union in all pixels of the split, and ``eval/pixel_accuracy``.

    The loss is the cross-entropy of all pixels after bilinear upsampling; one that counts for nothing adds 0 to the
    mean, as in BEiT's and MAE's code, so that the loss of several processes is that of one. Visualizations larger than
    ``crop`` are predicted window by window, logits averaged where windows overlap. Predictions are brought to the size
    of the ground truth before they are judged.

    Args:
        backbone: a timm model, pretrained.
        optimizer: its rules come before those of the layer decay.
        head: makes the head.
        auxiliary: makes a second head that helps in training, None for none.
        auxiliary_weight: of its loss.
        maps: how many of the backbone's maps the heads are given.
        blocks, norm, frozen: see `FeatureMaps`.
        layer_decay: of the learning rate from the head to the last layer of the backbone, and from each of its layers
            to the one below; 1 for none.
        crop: side of a window, what training images are cropped to.
        stride: of the windows, over their side.
        num_classes: None for as many as the data's masks have.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        head: Head,
        auxiliary: Head | None = None,
        auxiliary_weight: float = 0.4,
        maps: int = 4,
        blocks: Sequence[int] | None = None,
        norm: bool = False,
        frozen: bool = False,
        layer_decay: float = 1.0,
        crop: int = 512,
        stride: float = 2 / 3,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(optimizer, num_classes)
        if not 0 < layer_decay <= 1 or not 0 < stride <= 1 or crop < 1:
            raise SettingError(
                f"{type(self).__name__}: layer_decay and stride in (0, 1] and crop >= 1 are needed, got {layer_decay}, "
                f"{stride} and {crop}"
            )
        self.features = FeatureMaps(backbone, count=maps, blocks=blocks, norm=norm, frozen=frozen)
        self.layer_decay = layer_decay
        self.crop, self.stride = crop, max(1, int(crop * stride))
        self.auxiliary_weight = auxiliary_weight
        self.metrics = nn.ModuleDict()
        self._make_head, self._make_auxiliary = head, auxiliary

    def names_of(self, datamodule: Any) -> Sequence[str]:
        return datamodule.mask_classes

    def make_head(self, num_classes: int) -> None:
        if not 2 <= num_classes <= IGNORED:
            raise SettingError(f"model.num_classes: 2 to {IGNORED} classes can be told apart, got {num_classes}")
        of_maps = (self.features.channels, self.features.strides, num_classes)
        self.head = self._make_head(*of_maps)
        self.auxiliary = None if self._make_auxiliary is None else self._make_auxiliary(*of_maps)
        judged: dict[str, Any] = {"num_classes": num_classes, "ignore_index": IGNORED, "validate_args": False}
        self.metrics["miou"] = MulticlassJaccardIndex(average="macro", **judged)
        self.metrics["pixel_accuracy"] = MulticlassAccuracy(average="micro", **judged)

    def training_step(self, batch: SegmentationBatch, batch_idx: int) -> StepOutput:
        maps, mask = self.features(batch["image"]), batch["mask"]
        loss = pixel_loss(self.head(maps), mask)
        if self.auxiliary is None:
            return {"loss": loss}
        helped = pixel_loss(self.auxiliary(maps), mask)
        return {
            "loss": loss + self.auxiliary_weight * helped,
            "logs": {"main": loss.detach(), "auxiliary": helped.detach()},
        }

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> logits [B, K, H, W]."""
        return resized(self.head(self.features(image)), image.shape[-2:])

    def predict(self, image: Tensor) -> Tensor:
        """As `forward`, by windows where the image is larger than ``crop``."""
        assert self.num_classes is not None
        if max(image.shape[-2:]) <= self.crop:
            return self(image)
        return by_windows(self, image, self.crop, self.stride)

    def validation_step(self, batch: SegmentationBatch, batch_idx: int) -> None:
        keep = ~batch["replaced"]
        image, mask = batch["image"][keep], batch["mask"][keep]
        if len(image) == 0:
            return
        predicted = resized(self.predict(image), mask.shape[-2:]).argmax(dim=1)
        for name, metric in self.metrics.items():
            metric.update(predicted, mask)  # type: ignore[operator]
            self.log(f"eval/{name}", metric, batch_size=len(image))  # type: ignore[arg-type]

    def visualize(self, batch: SegmentationBatch) -> Mapping[str, Tensor]:
        """The image, what is predicted, and what is true."""
        image = batch["image"]
        predicted = self.predict(image).argmax(dim=1)
        mask = F.interpolate(batch["mask"][:, None].float(), size=image.shape[-2:], mode="nearest-exact")[:, 0].long()
        colored = [self.trainer.datamodule.normalize(colors.of_classes(each)) for each in (predicted, mask)]  # type: ignore[attr-defined]
        return {"segmentation": torch.stack([image, *colored], dim=1)}

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": ImageEncoder(self.features.backbone, pool=cls_token_or_mean)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.layer_decay == 1 or self.features.frozen:
            return super().configure_optimizers()
        rules = layer_rules_below(self.features.backbone, self.layer_decay, prefix="features.backbone.")
        return self.optimizer_recipe.build(self, extra_rules=rules)


class LinearHead(nn.Module):
    """A batch norm and a linear classifier of each position of the last map: what frozen patches of DINO, iBOT and
    DINOv2 are judged by. Its arguments are those of a `Head`."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels[-1])
        self.classifier = _classifier(channels[-1], num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classifier(self.norm(maps[-1]))


class FCNHead(nn.Module):
    """One 3x3 convolution and a classifier on one map: the auxiliary head of UPerNet.

    Args:
        channels, strides, num_classes: see `Head`.
        width: of the convolution.
        level: which map; the third is the one of stride 16 of a ConvNet.
        dropout: of whole channels.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        *,
        width: int = 256,
        level: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.level = level
        self.layers = nn.Sequential(
            ConvNormAct(channels[level], width, 3), nn.Dropout2d(dropout), _classifier(width, num_classes)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.layers(maps[self.level])


class UPerNetHead(nn.Module):
    """The head of Unified Perceptual Parsing for Scene Understanding (Xiao et al., 2018) for one task: pyramid pooling
    on the coarsest map, a feature pyramid from it down to the finest, and a classifier on all levels together.

    Maps of a ViT are first brought to 4, 2, 1 and 1/2 times their size, as BEiT and MAE do.

    Args:
        channels, strides, num_classes: see `Head`; four maps of one stride, or any number of falling resolution.
        width: of all that is in the head.
        bins: rows and columns that the coarsest map is averaged to.
        dropout: of whole channels, before the classifier.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        *,
        width: int = 512,
        bins: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.rescale = nn.ModuleList(pyramid_of(channels, strides))
        self.pool = PyramidPooling(channels[-1], width, bins)
        self.lateral = nn.ModuleList(ConvNormAct(each, width, 1) for each in channels[:-1])
        self.smooth = nn.ModuleList(ConvNormAct(width, width, 3) for _ in channels[:-1])
        self.fuse = ConvNormAct(len(channels) * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(width, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        maps = [rescale(each) for rescale, each in zip(self.rescale, maps, strict=True)]
        levels = [lateral(each) for lateral, each in zip(self.lateral, maps[:-1], strict=True)]
        levels.append(self.pool(maps[-1]))
        for level in range(len(levels) - 1, 0, -1):
            levels[level - 1] = levels[level - 1] + resized(levels[level], levels[level - 1].shape[-2:])
        smoothed = [smooth(each) for smooth, each in zip(self.smooth, levels[:-1], strict=True)]
        size = smoothed[0].shape[-2:]
        together = torch.cat([resized(each, size) for each in (*smoothed, levels[-1])], dim=1)
        return self.classifier(self.dropout(self.fuse(together)))


class PyramidPooling(nn.Module):
    """The pyramid pooling module of PSPNet (Zhao et al., 2017): a map beside its own averages over 1, 2 x 2 ... parts.

    Args:
        channels: of the map.
        width: of each average and of the result.
        bins: rows and columns of the parts.
    """

    def __init__(self, channels: int, width: int, bins: Sequence[int]) -> None:
        super().__init__()
        self.needs_two = min(bins) == 1
        self.parts = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(each), ConvNormAct(channels, width, 1)) for each in bins
        )
        self.fuse = ConvNormAct(channels + len(bins) * width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, width, h, w].

        Raises:
            SettingError: training on a single image, whose average has nothing to be normalized with.
        """
        if self.training and self.needs_two and len(x) == 1 and not is_distributed():
            raise SettingError("data.batch_size: a process and micro-batch needs at least 2 pictures, got 1")
        return self.fuse(torch.cat([x, *(resized(part(x), x.shape[-2:]) for part in self.parts)], dim=1))


class ConvNormAct(nn.Sequential):
    """A convolution without bias that keeps the size, batch norm, ReLU."""

    def __init__(self, channels: int, width: int, kernel: int) -> None:
        convolution = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        super().__init__(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def pyramid_of(channels: Sequence[int], strides: Sequence[int]) -> list[nn.Module]:
    """What makes a pyramid of four maps of one stride: 4, 2, 1 and 1/2 times their size. Maps that are one already are
    left alone.

    Raises:
        SettingError: there are not four.
    """
    if len(strides) > 1 and len(set(strides)) > 1:
        return [nn.Identity() for _ in channels]
    if len(channels) != 4:
        raise SettingError(f"model.blocks: UPerNet needs four maps of a ViT, got {len(channels)}")
    first, second, *_ = channels
    return [
        nn.Sequential(_doubled(first), nn.BatchNorm2d(first), nn.GELU(), _doubled(first)),
        _doubled(second),
        nn.Identity(),
        nn.MaxPool2d(2),
    ]


def pixel_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of logits [B, K, h, w] brought to the size of the mask [B, H, W]: the mean over all pixels, of
    which those that count for nothing have 0."""
    logits = resized(logits.float(), mask.shape[-2:])
    return F.cross_entropy(logits, mask, ignore_index=IGNORED, reduction="none").mean()


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, h, w] -> [B, C, H, W], bilinear; corners are no fixed points."""
    return (
        x if x.shape[-2:] == tuple(size) else F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
    )


def by_windows(network: Callable[[Tensor], Tensor], image: Tensor, crop: int, stride: int) -> Tensor:
    """A network's logits for images larger than its own, averaged over windows of ``crop`` pixels every ``stride``;
    the last ones are moved back into the image. A side that is shorter than a window is filled up.

    Args:
        network: [B, 3, crop, crop] -> [B, K, crop, crop].
        image: [B, 3, H, W].
        crop, stride: pixels.

    Returns:
        float32 [B, K, H, W].
    """
    height, width = image.shape[-2:]
    image = F.pad(image, (0, max(0, crop - width), 0, max(0, crop - height)))
    total, count = None, image.new_zeros(image.shape[-2:], dtype=torch.float32)
    for top in _starts(image.shape[-2], crop, stride):
        for left in _starts(image.shape[-1], crop, stride):
            logits = network(image[..., top : top + crop, left : left + crop]).float()
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *image.shape[-2:])
            total[..., top : top + crop, left : left + crop] += logits
            count[top : top + crop, left : left + crop] += 1
    assert total is not None
    return (total / count)[..., :height, :width]


def _starts(length: int, crop: int, stride: int) -> list[int]:
    number = max(0, -(-(length - crop) // stride)) + 1
    return [min(each * stride, length - crop) for each in range(number)]


def _doubled(channels: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
