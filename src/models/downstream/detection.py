"""Detection and instance segmentation on a pretrained backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from src.collectives import reduce_sum
from src.datamodules.batches.base import BatchError
from src.datamodules.batches.dense import DetectionBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, mean_patch
from src.models.downstream.average_precision import AveragePrecision, require_pycocotools
from src.models.downstream.class_head import ClassHeadModule
from src.models.downstream.finetune import layer_rules_below
from src.models.heads.mask_rcnn import MaskRCNNOnMaps
from src.models.heads.pyramid import Pyramid
from src.models.logging import logs_now
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe

_MIN_WIDTH_FOR_NAMES = 256  # pixels: class names would hide the objects of a smaller image
_PALETTE = ["red", "blue", "lime", "yellow", "magenta", "cyan", "orange", "white"]


class Heads(Protocol):
    """Creates the heads for a number of classes, such as ``partial(MaskRCNNOnMaps, conv_heads=True)``."""

    def __call__(self, channels: int, strides: tuple[int, ...], num_classes: int) -> MaskRCNNOnMaps: ...


class Detection(ClassHeadModule):
    """Mask R-CNN (He et al., 2017) on any encoder. `SimplePyramid` and ``conv_heads`` make it ViTDet (Exploring Plain
    Vision Transformer Backbones for Object Detection, Li et al., 2022), `ConvPyramid` the detection benchmark of
    Momentum Contrast (He et al., 2019). Deviations: those of the two pyramids.

    Validated by ``eval/box_ap``, ``eval/mask_ap`` and both at IoU thresholds of 0.50 and 0.75, at the resolution of the
    evaluation view. Boxes without area are left out; ``health/dropped_boxes`` is their number
    in a batch.

    Args:
        pyramid: a backbone with a feature pyramid.
        optimizer: its rules come before those of the layer decay.
        heads: creates the heads for region proposals, boxes and masks.
        frozen: keeps the backbone in evaluation mode and without gradient.
        frozen_norms: keeps the backbone's batch norms in evaluation mode and without gradient; for batches of a few
            images a process, whose statistics are noisy.
        layer_decay: factor of the learning rate from each layer of the backbone to the one below; 1 for none.
        shown_score: score from which detections are drawn.
        num_classes: number of classes; None for the number of classes in the data.

    Raises:
        SettingError: ``layer_decay`` is out of range, or pycocotools is not installed.
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
            raise SettingError(f"model.layer_decay must lie in (0, 1], got {layer_decay}")
        require_pycocotools()
        self.pyramid = pyramid
        self.encoders()  # refuses a backbone whose features evaluation could not read
        self.make_heads = heads
        self.frozen, self.frozen_norms = frozen, frozen_norms
        self.layer_decay = layer_decay
        self.shown_score = shown_score
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def class_names(self, datamodule: Any) -> Sequence[str]:
        return datamodule.classes

    def on_fit_start(self) -> None:
        """
        Raises:
            SettingError: weights and boxes would be stored in half precision.
        """
        if self.trainer.precision in ("bf16-true", "16-true"):
            raise SettingError(
                f"trainer.precision={self.trainer.precision} rounds the coordinates of boxes to several pixels; "
                f"use {str(self.trainer.precision).replace('true', 'mixed')}"
            )
        super().on_fit_start()

    def make_head(self, num_classes: int) -> None:
        self.heads = self.make_heads(self.pyramid.channels, self.pyramid.strides, num_classes)
        self.average_precision = AveragePrecision(masks=self.heads.has_masks)

    def train(self, mode: bool = True) -> Detection:
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def training_step(self, batch: DetectionBatch, batch_idx: int) -> StepOutput:
        image, sizes = batch["image"], self.sizes(batch)
        objects = [self.without_crowds(image_objects) for image_objects in self.objects(batch)]
        targets = [
            {**image_objects, "labels": image_objects["labels"] + 1} for image_objects in objects
        ]  # 0: background
        losses = self.heads.losses(self.pyramid(image), sizes, targets)
        logs = {name: value.detach() for name, value in losses.items()}
        return {"loss": torch.stack(list(losses.values())).sum(), "logs": logs}

    def on_train_batch_end(self, outputs: Any, batch: DetectionBatch, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        if logs_now(self.trainer):
            dropped = torch.stack([(~_has_area(boxes)).sum() for boxes in batch["boxes"]]).sum().float()
            # of this batch: a sum over the epoch would be lost to a run that is resumed within it
            self.log("health/dropped_boxes", reduce_sum(dropped))

    def objects(self, batch: DetectionBatch) -> list[dict[str, Tensor]]:
        """The objects of each image whose boxes have an area: ``boxes``, ``labels`` from 0, ``masks`` if the heads
        predict masks, and ``iscrowd`` if the data has it.

        Raises:
            BatchError: the heads predict masks and the batch has none.
        """
        if self.heads.has_masks and "masks" not in batch:
            raise BatchError("the data has no masks: model.heads.masks=false learns from boxes alone")
        names = {"boxes": "boxes", "box_labels": "labels"}
        names |= {"masks": "masks"} if self.heads.has_masks else {}
        names |= {"crowd": "iscrowd"} if "crowd" in batch else {}
        objects = []
        for number, boxes in enumerate(batch["boxes"]):
            valid = _has_area(boxes)
            objects.append({name: batch[field][number][valid] for field, name in names.items()})  # type: ignore[literal-required]
        return objects

    @staticmethod
    def without_crowds(objects: dict[str, Tensor]) -> dict[str, Tensor]:
        """The objects of an image that are no crowds, without the field ``iscrowd``."""
        if "iscrowd" not in objects:
            return objects
        single = ~objects["iscrowd"]
        return {name: value[single] for name, value in objects.items() if name != "iscrowd"}

    def sizes(self, batch: DetectionBatch) -> list[tuple[int, int]]:
        """Rows and columns of each image without its padding."""
        return [(int(rows), int(columns)) for rows, columns in batch["size"].tolist()]

    def forward(self, image: Tensor, sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """The detections in images [B, 3, H, W], see `MaskRCNNOnMaps`; in evaluation mode only."""
        return self.heads(self.pyramid(image), sizes, (int(image.shape[-2]), int(image.shape[-1])))

    def validation_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        detections, objects = self(batch["image"], self.sizes(batch)), self.objects(batch)
        readable = [image for image, replaced in enumerate(batch["replaced"].tolist()) if not replaced]
        self.average_precision.update(
            [detections[number] for number in readable], [objects[number] for number in readable]
        )

    def on_validation_epoch_end(self) -> None:
        for name, value in self.average_precision.scores().items():
            self.log(f"eval/{name}", value.to(self.device))
        self.average_precision.reset()

    def visualize(self, batch: DetectionBatch) -> Mapping[str, Tensor]:
        """The objects and the detections of each image, drawn on it."""
        image, objects = batch["image"], self.objects(batch)
        detections = self(image, self.sizes(batch))
        for detection in detections:
            certain = detection.pop("scores") >= self.shown_score
            detection.update({name: value[certain] for name, value in detection.items()})
        low, high = image.amin().float(), image.amax().float()
        unit_range = (image.float() - low) / (high - low)
        rows = [
            torch.stack([self._draw(pixels, true), self._draw(pixels, predicted)])
            for pixels, true, predicted in zip(unit_range, objects, detections, strict=True)
        ]
        return {"detections": torch.stack(rows) * (high - low) + low}

    def _draw(self, image: Tensor, objects: dict[str, Tensor]) -> Tensor:
        """image: [3, H, W] in [0, 1]. Each class has a color."""
        labels = objects["labels"].tolist()
        if not labels:
            return image
        colors = [_PALETTE[label % len(_PALETTE)] for label in labels]
        if "masks" in objects:
            image = draw_segmentation_masks(image, objects["masks"], alpha=0.4, colors=colors)
        names = [self.classes[label] if label < len(self.classes) else str(label) for label in labels]
        shown_names = names if image.shape[-1] >= _MIN_WIDTH_FOR_NAMES else None
        return draw_bounding_boxes(image, objects["boxes"], labels=shown_names, colors=colors)

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

    def _frozen_modules(self) -> list[nn.Module]:
        """The modules of the backbone that are kept in evaluation mode and without gradient."""
        if self.frozen:
            return [self.pyramid.backbone]
        if not self.frozen_norms:
            return []
        return [module for module in self.pyramid.backbone.modules() if isinstance(module, _BatchNorm)]


def _has_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
