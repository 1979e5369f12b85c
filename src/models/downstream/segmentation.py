"""Semantic segmentation on a pretrained backbone: a linear head on patch tokens, and UPerNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from src.collectives import is_distributed
from src.datamodules.batches.base import IGNORED
from src.datamodules.batches.dense import SegmentationBatch
from src.errors import SettingError
from src.image_size import Size, height_and_width
from src.models.backbones.encoder import Encoder
from src.models.backbones.feature_maps import FeatureMaps
from src.models.backbones.image_encoder import ImageEncoder, cls_token_or_mean
from src.models.downstream.class_head import ClassHeadModule
from src.models.downstream.colormaps import beside_image, color_classes
from src.models.downstream.finetune import layer_rules_below
from src.models.functional import at_least_float32
from src.models.logging import log_metrics
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe

Head = Callable[[Sequence[int], Sequence[int], int], nn.Module]
"""Creates a head from the channels and strides of the maps and the number of classes; it maps a list of feature maps to
logits [B, K, h, w]."""


class Segmenter(ClassHeadModule):
    """Predicts a class for every pixel. Validated by ``eval/miou``, the mean intersection over union over all pixels of
    the split and the classes that occur or are predicted, and by ``eval/pixel_accuracy``.

    The loss is the cross-entropy after bilinear upsampling, averaged over all pixels. Ignored pixels count as 0, as in
    the code of BEiT and MAE, which makes the loss of several processes equal to that of one. Images larger than
    ``crop`` are predicted with a sliding window. Predictions are resized to the ground truth before evaluation.

    Args:
        backbone: a timm model, pretrained.
        optimizer: its rules come before those of the layer decay.
        head: creates the head.
        auxiliary: creates a second head for an auxiliary training loss; None for no auxiliary loss.
        auxiliary_weight: weight of the auxiliary loss.
        maps: number of the backbone's maps that the heads read.
        blocks, norm, frozen: see `FeatureMaps`.
        layer_decay: factor of the learning rate from the head to the last layer of the backbone, and from each of its
            layers to the one below; 1 for none.
        decay_tokens: weight decay for class token and positional embedding too, as in mmsegmentation.
        new_layer_scale: the backbone's LayerScale begins anew where training starts from weights; mmsegmentation adds
            it to MAE's encoder, which has none.
        crop: side of the training crops and of the sliding window in pixels, or its height and width.
        stride: stride of the sliding window as a share of its sides.
        num_classes: number of classes; None for the number of classes in the data's masks.

    Raises:
        SettingError: a value is out of range.
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
        decay_tokens: bool = False,
        new_layer_scale: bool = False,
        crop: Size = 512,
        stride: float = 2 / 3,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(optimizer, num_classes)
        if not 0 < layer_decay <= 1 or not 0 < stride <= 1:
            raise SettingError(f"model.layer_decay and model.stride must lie in (0, 1], got {layer_decay} and {stride}")
        self.features = FeatureMaps(backbone, count=maps, blocks=blocks, norm=norm, frozen=frozen)
        self.layer_decay, self.decay_tokens = layer_decay, decay_tokens
        scales = [name for name, module in backbone.named_modules() if isinstance(module, LayerScale)]
        if new_layer_scale and not scales:
            raise SettingError("model.new_layer_scale: the backbone has no LayerScale; set backbone.init_values too")
        self.new_parameters = [f"{name}." for name in scales] if new_layer_scale else []
        self.crop = height_and_width(crop)
        self.stride = max(1, int(self.crop[0] * stride)), max(1, int(self.crop[1] * stride))
        self.auxiliary_weight = auxiliary_weight
        self.metrics = nn.ModuleDict()
        self._make_head, self._make_auxiliary = head, auxiliary
        self.encoders()  # refuses a backbone whose features evaluation could not read

    def class_names(self, datamodule: Any) -> Sequence[str]:
        return datamodule.mask_classes

    def make_head(self, num_classes: int) -> None:
        if not 2 <= num_classes <= IGNORED:
            raise SettingError(f"model.num_classes must be 2 to {IGNORED}, got {num_classes}")
        shape = (self.features.channels, self.features.strides, num_classes)
        self.head = self._make_head(*shape)
        self.auxiliary = None if self._make_auxiliary is None else self._make_auxiliary(*shape)
        options: dict[str, Any] = {"num_classes": num_classes, "ignore_index": IGNORED, "validate_args": False}
        self.metrics["miou"] = MulticlassJaccardIndex(average="macro", **options)
        self.metrics["pixel_accuracy"] = MulticlassAccuracy(average="micro", **options)

    def training_step(self, batch: SegmentationBatch, batch_idx: int) -> StepOutput:
        maps, mask = self.features(batch["image"]), batch["mask"]
        loss = pixel_loss(self.head(maps), mask)
        if self.auxiliary is None:
            return {"loss": loss}
        auxiliary_loss = pixel_loss(self.auxiliary(maps), mask)
        return {
            "loss": loss + self.auxiliary_weight * auxiliary_loss,
            "logs": {"main": loss.detach(), "auxiliary": auxiliary_loss.detach()},
        }

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> logits [B, K, H, W]."""
        return resize(self.head(self.features(image)), image.shape[-2:])

    def predict(self, image: Tensor) -> Tensor:
        """`forward`, with a sliding window for images larger than ``crop``."""
        assert self.num_classes is not None
        if image.shape[-2] <= self.crop[0] and image.shape[-1] <= self.crop[1]:
            return self(image)
        return sliding_window(self, image, self.crop, self.stride)

    def validation_step(self, batch: SegmentationBatch, batch_idx: int) -> None:
        log_metrics(self, self.metrics)
        keep = ~batch["replaced"]
        image, mask = batch["image"][keep], batch["mask"][keep]
        if len(image) == 0:
            return
        predicted = resize(self.predict(image), mask.shape[-2:]).argmax(dim=1)
        for metric in self.metrics.values():
            metric.update(predicted, mask)  # type: ignore[operator]

    def visualize(self, batch: SegmentationBatch) -> Mapping[str, Tensor]:
        """Image, prediction and ground truth."""
        image = batch["image"]
        predicted = self.predict(image).argmax(dim=1)
        colored = [color_classes(classes) for classes in (predicted, batch["mask"])]
        return {"segmentation": beside_image(image, colored, self.trainer.datamodule.normalize)}  # type: ignore[attr-defined]

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": ImageEncoder(self.features.backbone, pool=cls_token_or_mean)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.layer_decay == 1 or self.features.frozen:
            return super().configure_optimizers()
        rules = layer_rules_below(
            self.features.backbone, self.layer_decay, prefix="features.backbone.", decay_tokens=self.decay_tokens
        )
        return self.optimizer_recipe.build(self, extra_rules=rules)


class LinearHead(nn.Module):
    """A batch norm and a linear classifier at each position of the last map, the segmentation probe of iBOT and DINOv2.
    Its arguments are those of a `Head`."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels[-1])
        self.classifier = _classifier(channels[-1], num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classifier(self.norm(maps[-1]))


class FCNHead(nn.Module):
    """One 3x3 convolution and a classifier on one map, the auxiliary head of UPerNet.

    Args:
        channels, strides, num_classes: see `Head`.
        width: channels of the convolution.
        level: index of the map; 2 is the map of stride 16 of a ConvNet.
        dropout: probability of dropping a channel.
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
    on the coarsest map, a feature pyramid down to the finest, and a classifier on the concatenated levels.

    Maps of a ViT are first resized by 4, 2, 1 and 1/2, as in BEiT and MAE.

    Args:
        channels, strides, num_classes: see `Head`; four maps of the same stride, or any number with increasing strides.
        width: channels of the head.
        bins: sides of the pooled maps.
        dropout: probability of dropping a channel before the classifier.
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
        self.rescale = nn.ModuleList(pyramid_layers(channels, strides))
        self.pool = PyramidPooling(channels[-1], width, bins)
        self.lateral = nn.ModuleList(ConvNormAct(map_channels, width, 1) for map_channels in channels[:-1])
        self.smooth = nn.ModuleList(ConvNormAct(width, width, 3) for _ in channels[:-1])
        self.fuse = ConvNormAct(len(channels) * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(width, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        maps = [rescale(x) for rescale, x in zip(self.rescale, maps, strict=True)]
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps[:-1], strict=True)]
        levels.append(self.pool(maps[-1]))
        for level in range(len(levels) - 1, 0, -1):
            levels[level - 1] = levels[level - 1] + resize(levels[level], levels[level - 1].shape[-2:])
        smoothed = [smooth(x) for smooth, x in zip(self.smooth, levels[:-1], strict=True)]
        size = smoothed[0].shape[-2:]
        fused = self.fuse(torch.cat([resize(level, size) for level in (*smoothed, levels[-1])], dim=1))
        return self.classifier(self.dropout(fused))


class PyramidPooling(nn.Module):
    """The pyramid pooling module of PSPNet (Zhao et al., 2017): concatenates a map with its averages over grids of
    several sizes.

    Args:
        channels: of the map.
        width: channels of each average and of the output.
        bins: sides of the grids.
    """

    def __init__(self, channels: int, width: int, bins: Sequence[int]) -> None:
        super().__init__()
        self.needs_two_images = min(bins) == 1  # batch norm of a 1 x 1 map
        self.parts = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvNormAct(channels, width, 1)) for side in bins
        )
        self.fuse = ConvNormAct(channels + len(bins) * width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, width, h, w].

        Raises:
            SettingError: training on a single image, for which batch norm of a 1 x 1 map is undefined.
        """
        if self.training and self.needs_two_images and len(x) == 1 and not is_distributed():
            raise SettingError("data.batch_size: each process and micro-batch needs at least 2 images, got 1")
        return self.fuse(torch.cat([x, *(resize(part(x), x.shape[-2:]) for part in self.parts)], dim=1))


class ConvNormAct(nn.Sequential):
    """A convolution without bias that keeps the resolution, batch norm and ReLU."""

    def __init__(self, channels: int, width: int, kernel: int) -> None:
        convolution = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        super().__init__(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def pyramid_layers(channels: Sequence[int], strides: Sequence[int]) -> list[nn.Module]:
    """The layers that resize four maps of the same stride by 4, 2, 1 and 1/2; identities for maps of different strides.

    Raises:
        SettingError: there are not four maps of the same stride.
    """
    if len(strides) > 1 and len(set(strides)) > 1:
        return [nn.Identity() for _ in channels]
    if len(channels) != 4:
        raise SettingError(f"model.blocks: UPerNet needs four maps of a ViT, got {len(channels)}")
    first, second, *_ = channels
    return [
        nn.Sequential(_double_resolution(first), nn.BatchNorm2d(first), nn.GELU(), _double_resolution(first)),
        _double_resolution(second),
        nn.Identity(),
        nn.MaxPool2d(2),
    ]


def pixel_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of logits [B, K, h, w], resized to the mask [B, H, W]: the mean over all pixels, with 0 for ignored
    ones."""
    logits = resize(at_least_float32(logits), mask.shape[-2:])
    return F.cross_entropy(logits, mask, ignore_index=IGNORED, reduction="none").mean()


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, h, w] -> [B, C, H, W], bilinear, without aligned corners."""
    return (
        x if x.shape[-2:] == tuple(size) else F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
    )


def sliding_window(
    network: Callable[[Tensor], Tensor], image: Tensor, crop: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """Predicts an image window by window and averages the logits where windows overlap. The last windows are moved back
    into the image, and sides shorter than a window are padded.

    Args:
        network: [B, 3, *crop] -> logits [B, K, *crop].
        image: [B, 3, H, W].
        crop, stride: of the windows, down and across, pixels.

    Returns:
        logits, float32 [B, K, H, W].
    """
    height, width = image.shape[-2:]
    image = F.pad(image, (0, max(0, crop[1] - width), 0, max(0, crop[0] - height)))
    total, count = None, image.new_zeros(image.shape[-2:], dtype=torch.float32)
    for top in _window_starts(image.shape[-2], crop[0], stride[0]):
        for left in _window_starts(image.shape[-1], crop[1], stride[1]):
            rows, columns = slice(top, top + crop[0]), slice(left, left + crop[1])
            logits = network(image[..., rows, columns]).float()
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *image.shape[-2:])
            total[..., rows, columns] += logits
            count[rows, columns] += 1
    assert total is not None
    return (total / count)[..., :height, :width]


def _window_starts(length: int, crop: int, stride: int) -> list[int]:
    number = max(0, -(-(length - crop) // stride)) + 1
    return [min(index * stride, length - crop) for index in range(number)]


def _double_resolution(channels: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
