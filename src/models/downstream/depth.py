"""Depth from single images on the maps of a pretrained backbone: the head of the dense prediction transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from src.datamodules.batches.dense import DepthBatch
from src.errors import SettingError
from src.models.downstream import colormaps as colors
from src.models.downstream.dpt import DensePrediction
from src.models.losses.depth import silog
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe


class DepthEstimator(DensePrediction):
    """Metres for every pixel, by the head of Vision Transformers for Dense Prediction (Ranftl et al., 2021).

    Validated by what the literature reports, the mean over images of: ``eval/abs_rel`` |prediction - depth| / depth,
    ``eval/rmse`` in metres and ``eval/delta1``, the share of pixels that are wrong by a factor below 1.25. Visualizations are
    taken whole, predictions brought to the size of the ground truth.

    Deviations: trained for metres from the start, by `silog` (the paper trains on ten data sets for depths that are
    known up to scale and shift first); the output is a sigmoid between ``nearest`` and ``farthest``, where the paper's
    is a ReLU.

    Args:
        backbone, optimizer: see `DensePrediction`.
        nearest, farthest: metres, what can be answered.
        focus: see `silog`.
        loss_scale: factor on the loss, 10 in BTS.
        options: of `DensePrediction`.
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
                f"{type(self).__name__}: 0 < nearest < farthest and focus in [0, 1] are needed, got {nearest}, "
                f"{farthest} and {focus}"
            )
        self.nearest, self.farthest = nearest, farthest
        self.focus, self.loss_scale = focus, loss_scale
        self.metrics = nn.ModuleDict({name: MeanMetric() for name in ("abs_rel", "rmse", "delta1")})

    def training_step(self, batch: DepthBatch, batch_idx: int) -> StepOutput:
        loss = silog(self(batch["image"]), batch["depth"], batch["valid"], focus=self.focus)
        return {"loss": self.loss_scale * loss}

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> metres, float32 [B, H, W]."""
        share = self.predicted(image)[:, 0].sigmoid()
        return self.nearest + (self.farthest - self.nearest) * share

    def validation_step(self, batch: DepthBatch, batch_idx: int) -> None:
        keep = ~batch["replaced"] & batch["valid"].flatten(1).any(dim=1)
        image, depth, valid = (batch[name][keep] for name in ("image", "depth", "valid"))
        if len(image) == 0:
            return
        predicted = self(image)
        if predicted.shape != depth.shape:
            predicted = F.interpolate(predicted[:, None], size=depth.shape[-2:], mode="bilinear")[:, 0]
        for name, values in depth_errors(predicted, depth, valid).items():
            metric = self.metrics[name]
            metric.update(values)  # type: ignore[operator]
            self.log(f"eval/{name}", metric, batch_size=len(image))  # type: ignore[arg-type]

    def visualize(self, batch: DepthBatch) -> Mapping[str, Tensor]:
        """The image, what is predicted, and what is true, in the colors of the truth's range; dark where it is far,
        or not known."""
        image, depth, valid = batch["image"], batch["depth"], batch["valid"]
        nearest = depth.masked_fill(~valid, self.farthest).flatten(1).amin(dim=1)
        farthest = depth.masked_fill(~valid, self.nearest).flatten(1).amax(dim=1)
        shown = [self(image), depth.masked_fill(~valid, self.farthest)]
        drawn = [colors.of_depths(each, nearest, farthest) for each in shown]
        drawn = [F.interpolate(each, size=image.shape[-2:], mode="nearest-exact") for each in drawn]
        return {"depth": torch.stack([image, *(self.trainer.datamodule.normalize(each) for each in drawn)], dim=1)}  # type: ignore[attr-defined]


def depth_errors(predicted: Tensor, depth: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """``abs_rel``, ``rmse`` and ``delta1`` of each image: [B, H, W] metres, with something known of each -> [B]."""
    predicted, depth = predicted.float(), torch.where(valid, depth, 1.0)
    count = valid.flatten(1).sum(dim=1)

    def mean(of: Tensor) -> Tensor:
        return torch.where(valid, of, 0.0).flatten(1).sum(dim=1) / count

    ratio = torch.maximum(predicted / depth, depth / predicted)
    return {
        "abs_rel": mean((predicted - depth).abs() / depth),
        "rmse": mean((predicted - depth).square()).sqrt(),
        "delta1": mean((ratio < 1.25).float()),
    }
