"""Detection and instance segmentation on a pretrained backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from src.datamodules.batches.base import BatchError
from src.datamodules.batches.dense import DetectionBatch
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, mean_patch
from src.models.downstream.average_precision import AveragePrecision, require_pycocotools
from src.models.downstream.class_head import ClassHeadModule
from src.models.downstream.finetune import layer_rules_below
from src.models.heads.mask_rcnn import MaskRCNNOnMaps
from src.models.heads.pyramid import Pyramid
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe

_LEGIBLE = 256  # pixels across: names would hide what a smaller image shows
_PALETTE = ["red", "blue", "lime", "yellow", "magenta", "cyan", "orange", "white"]


class Heads(Protocol):
    """What makes the heads once the classes are known, such as ``partial(MaskRCNNOnMaps, conv_heads=True)``."""

    def __call__(self, channels: int, strides: tuple[int, ...], num_classes: int) -> MaskRCNNOnMaps: ...


class Detection(ClassHeadModule):
    """Mask R-CNN (He et al., 2017) on any encoder: with `SimplePyramid` and ``conv_heads`` the ViTDet of Exploring
    Plain Vision Transformer Backbones for Object Detection (Li et al., 2022), with `ConvPyramid` the benchmark that
    ConvNets are judged by since Momentum Contrast (He et al., 2019). Deviations: those of the two pyramids.

    Validated by ``eval/box_ap``, ``eval/mask_ap`` and both at overlaps of 0.50 and 0.75, on the images as the
    evaluation view shows them. A box without area is no thing: it is left out and counted in ``health/dropped_boxes``.

    Args:
        pyramid: a backbone and what makes a feature pyramid of it.
        optimizer: its rules come before those of the layer decay.
        heads: makes region proposals, boxes and masks of the pyramid's maps.
        frozen: whether the backbone stays as it is: no gradient, evaluation mode.
        frozen_norms: whether the backbone's batch norms do, statistics, scale and shift; for batches of a few images
            a process.
        layer_decay: of the learning rate from each of the backbone's layers to the one below; 1 for none.
        shown_score: what is at least so certain is drawn.
        num_classes: None for as many as the data has.

    Raises:
        SettingError: pycocotools is not installed.
    """

    def __init__(
        self,
        pyramid: Pyramid,
        optimizer: OptimizerRecipe,
        *,
        heads: Heads = MaskRCNNOnMaps,
        frozen: bool = False,
        frozen_norms: bool = False,
        layer_decay: float = 1.0,
        shown_score: float = 0.5,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(optimizer, num_classes)
        if not 0 < layer_decay <= 1:
            raise ValueError(f"Detection: layer_decay must lie in (0, 1], got {layer_decay}")
        require_pycocotools()
        self.pyramid = pyramid
        self.make_heads = heads
        self.frozen, self.frozen_norms = frozen, frozen_norms
        self.layer_decay = layer_decay
        self.shown_score = shown_score
        for module in self._resting():
            module.requires_grad_(False)

    def names_of(self, datamodule: Any) -> Sequence[str]:
        return datamodule.classes

    def make_head(self, num_classes: int) -> None:
        self.heads = self.make_heads(self.pyramid.channels, self.pyramid.strides, num_classes)
        self.average_precision = AveragePrecision(masks=self.heads.has_masks)

    def train(self, mode: bool = True) -> Detection:
        super().train(mode)
        for module in self._resting():
            module.eval()
        return self

    def training_step(self, batch: DetectionBatch, batch_idx: int) -> StepOutput:
        image, sizes = batch["image"], self.sizes(batch)
        things = [self.taught(each) for each in self.things(batch)]
        targets = [{**each, "labels": each["labels"] + 1} for each in things]  # 0 is the background
        losses = self.heads.losses(self.pyramid(image), sizes, targets)
        dropped = torch.stack([(~_has_area(boxes)).sum() for boxes in batch["boxes"]]).sum().float()
        self.log("health/dropped_boxes", dropped, reduce_fx="sum", on_step=False, on_epoch=True)
        logs = {name: value.detach() for name, value in losses.items()}
        return {"loss": torch.stack(list(losses.values())).sum(), "logs": logs}

    def things(self, batch: DetectionBatch) -> list[dict[str, Tensor]]:
        """What there is in each image, where it has an area: ``boxes``, ``labels`` from 0, ``masks`` where they are
        learned, and ``iscrowd`` where it is known.

        Raises:
            BatchError: masks are to be learned, and there are none.
        """
        if self.heads.has_masks and "masks" not in batch:
            raise BatchError("the data has no masks to learn from: masks=false learns from boxes alone")
        names = {"boxes": "boxes", "box_labels": "labels"}
        names |= {"masks": "masks"} if self.heads.has_masks else {}
        names |= {"crowd": "iscrowd"} if "crowd" in batch else {}
        things = []
        for picture, boxes in enumerate(batch["boxes"]):
            kept = _has_area(boxes)
            things.append({name: batch[field][picture][kept] for field, name in names.items()})  # type: ignore[literal-required]
        return things

    @staticmethod
    def taught(things: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of a image's things is learned: no crowds."""
        if "iscrowd" not in things:
            return things
        single = ~things["iscrowd"]
        return {name: value[single] for name, value in things.items() if name != "iscrowd"}

    def sizes(self, batch: DetectionBatch) -> list[tuple[int, int]]:
        """Rows and columns of each image, without what fills it up."""
        return [(int(rows), int(columns)) for rows, columns in batch["size"].tolist()]

    def forward(self, image: Tensor, sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """What is found in images [B, 3, H, W], see `MaskRCNNOnMaps`; in evaluation mode only."""
        return self.heads(self.pyramid(image), sizes, (int(image.shape[-2]), int(image.shape[-1])))

    def validation_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        found, things = self(batch["image"], self.sizes(batch)), self.things(batch)
        kept = [number for number, replaced in enumerate(batch["replaced"].tolist()) if not replaced]
        self.average_precision.update([found[each] for each in kept], [things[each] for each in kept])

    def on_validation_epoch_end(self) -> None:
        for name, value in self.average_precision.scores().items():
            self.log(f"eval/{name}", value.to(self.device))
        self.average_precision.reset()

    def visualize(self, batch: DetectionBatch) -> Mapping[str, Tensor]:
        """What there is, and what is found."""
        image, things = batch["image"], self.things(batch)
        found = self(image, self.sizes(batch))
        for each in found:
            certain = each.pop("scores") >= self.shown_score
            each.update({name: value[certain] for name, value in each.items()})
        low, high = image.amin().float(), image.amax().float()
        drawn = [
            torch.stack([self._drawn((each.float() - low) / (high - low), what) for what in (there, seen)])
            for each, there, seen in zip(image, things, found, strict=True)
        ]
        return {"detections": torch.stack(drawn) * (high - low) + low}

    def _drawn(self, image: Tensor, things: dict[str, Tensor]) -> Tensor:
        """image: [3, H, W] in [0, 1], with a color a class."""
        labels = things["labels"].tolist()
        if not labels:
            return image
        colors = [_PALETTE[label % len(_PALETTE)] for label in labels]
        if "masks" in things:
            image = draw_segmentation_masks(image, things["masks"], alpha=0.4, colors=colors)
        names = [self.classes[label] if label < len(self.classes) else str(label) for label in labels]
        legible = image.shape[-1] >= _LEGIBLE
        return draw_bounding_boxes(image, things["boxes"], labels=names if legible else None, colors=colors)

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": ImageEncoder(self.pyramid.backbone, pool=mean_patch)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.layer_decay == 1 or self.frozen:
            return super().configure_optimizers()
        backbone = self.pyramid.backbone
        (name,) = (name for name, module in self.named_modules() if module is backbone)
        return self.optimizer_recipe.build(
            self, extra_rules=layer_rules_below(backbone, self.layer_decay, prefix=f"{name}.")
        )

    def _resting(self) -> list[nn.Module]:
        """What of the backbone stays as it is."""
        if self.frozen:
            return [self.pyramid.backbone]
        if not self.frozen_norms:
            return []
        return [module for module in self.pyramid.backbone.modules() if isinstance(module, _BatchNorm)]


def _has_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
