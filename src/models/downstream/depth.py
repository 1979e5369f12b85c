"""Monocular depth estimation with the head of the dense prediction transformer (DPT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from src.datamodules.batches.dense import DepthBatch
from src.errors import SettingError
from src.models.downstream.colormaps import beside_image, color_depth
from src.models.downstream.dpt import DensePrediction
from src.models.logging import log_metrics
from src.models.losses.depth import silog
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe


class DepthEstimator(DensePrediction):
    """Predicts metric depth with the head of Vision Transformers for Dense Prediction (Ranftl et al., 2021).

    Validated by the mean over images of ``eval/abs_rel`` |prediction - depth| / depth, ``eval/rmse`` in meters and
    ``eval/delta1``, the share of pixels with max(prediction / depth, depth / prediction) < 1.25. Images are predicted
    without cropping, and predictions are resized to the ground truth.

    Deviations: trained on metric depth from the start, with `silog` (the paper first trains on ten datasets, with a
    loss that ignores scale and shift); the loss is a mean over images, where BTS pools the pixels of a batch, so that
    several processes have the gradient of one; the output is a sigmoid scaled to ``nearest`` and ``farthest``, the
    paper's a ReLU.

    Args:
        backbone, optimizer: see `DensePrediction`.
        nearest, farthest: range of predictions in meters.
        focus: see `silog`.
        loss_scale: factor of the loss, 10 in BTS (Lee et al., 2019).
        options: further arguments of `DensePrediction`.

    Raises:
        SettingError: a value is out of range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        nearest: float = 1e-3,
        farthest: float = 10.0,
        focus: float = 0.85,
        loss_scale: float = 10.0,
        **options: Any,
    ) -> None:
        super().__init__(backbone, optimizer, outputs=1, **options)
        if not 0 < nearest < farthest or not 0 <= focus <= 1:
            raise SettingError(
                "model.nearest, model.farthest, model.focus: 0 < nearest < farthest and focus in [0, 1] are needed, "
                f"got {nearest}, {farthest} and {focus}"
            )
        self.nearest, self.farthest = nearest, farthest
        self.focus, self.loss_scale = focus, loss_scale
        self.metrics = nn.ModuleDict({name: MeanMetric() for name in ("abs_rel", "rmse", "delta1")})

    def training_step(self, batch: DepthBatch, batch_idx: int) -> StepOutput:
        loss = silog(self(batch["image"]), batch["depth"], batch["valid"], focus=self.focus)
        return {"loss": self.loss_scale * loss}

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> depth in meters, float32 [B, H, W]."""
        share = self.predict_pixels(image)[:, 0].sigmoid()
        return self.nearest + (self.farthest - self.nearest) * share

    def validation_step(self, batch: DepthBatch, batch_idx: int) -> None:
        log_metrics(self, self.metrics)
        keep = ~batch["replaced"] & batch["valid"].flatten(1).any(dim=1)
        image, depth, valid = (batch[name][keep] for name in ("image", "depth", "valid"))
        if len(image) == 0:
            return
        predicted = self(image)
        if predicted.shape != depth.shape:
            predicted = F.interpolate(predicted[:, None], size=depth.shape[-2:], mode="bilinear")[:, 0]
        for name, values in depth_errors(predicted, depth, valid).items():
            self.metrics[name].update(values)  # type: ignore[operator]

    def visualize(self, batch: DepthBatch) -> Mapping[str, Tensor]:
        """Image, prediction and ground truth, colored from light (near) to dark (far, or unknown) over the range of the
        ground truth."""
        image, depth, valid = batch["image"], batch["depth"], batch["valid"]
        nearest = depth.masked_fill(~valid, self.farthest).flatten(1).amin(dim=1)
        farthest = depth.masked_fill(~valid, self.nearest).flatten(1).amax(dim=1)
        maps = [self(image), depth.masked_fill(~valid, self.farthest)]
        colored = [color_depth(values, nearest, farthest) for values in maps]
        return {"depth": beside_image(image, colored, self.trainer.datamodule.normalize)}  # type: ignore[attr-defined]


def depth_errors(predicted: Tensor, depth: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Errors of each image by name: ``abs_rel``, ``rmse`` and ``delta1``, [B].

    Args:
        predicted, depth: meters, [B, H, W].
        valid: bool [B, H, W], pixels with known depth, at least one in each image.
    """
    predicted, depth = predicted.float(), torch.where(valid, depth, 1.0)
    count = valid.flatten(1).sum(dim=1)

    def mean(values: Tensor) -> Tensor:
        return torch.where(valid, values, 0.0).flatten(1).sum(dim=1) / count

    ratio = torch.maximum(predicted / depth, depth / predicted)
    return {
        "abs_rel": mean((predicted - depth).abs() / depth),
        "rmse": mean((predicted - depth).square()).sqrt(),
        "delta1": mean((ratio < 1.25).float()),
    }
