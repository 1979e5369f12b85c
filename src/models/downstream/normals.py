"""Which way surfaces face, from single images, on the maps of a pretrained backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from src.datamodules.batches.dense import NormalsBatch
from src.models.downstream import colormaps as colors
from src.models.downstream.dpt import DensePrediction
from src.models.losses.normals import angles, angular_nll
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe

WITHIN = {"within_11": 11.25, "within_22": 22.5, "within_30": 30.0}  # degrees


class SurfaceNormals(DensePrediction):
    """A direction for every pixel and how sure it is, by DPT's head and the loss of Estimating and Exploiting the
    Aleatoric Uncertainty in Surface Normal Estimation (Bae et al., 2021); so probes of pretrained encoders do it too
    (El Banani et al., 2024).

    Validated by what the literature reports over all known pixels of a split: the mean angle to the truth in degrees,
    ``eval/normals_mean``, and the shares of pixels within 11.25, 22.5 and 30 degrees of it.

    Deviations: all pixels are trained on; the paper chooses those it is unsure of and refines them by a small network.

    Args:
        backbone, optimizer, options: see `DensePrediction`.
    """

    def __init__(self, backbone: nn.Module, optimizer: OptimizerRecipe, **options: Any) -> None:
        super().__init__(backbone, optimizer, outputs=4, **options)
        self.metrics = nn.ModuleDict({name: MeanMetric() for name in ("normals_mean", *WITHIN)})

    def training_step(self, batch: NormalsBatch, batch_idx: int) -> StepOutput:
        normals, concentration = self.believed(batch["image"])
        return {"loss": angular_nll(normals, concentration, batch["normals"], batch["valid"])}

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> unit vectors, float32 [B, 3, H, W]."""
        return self.believed(image)[0]

    def believed(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors, float32 [B, 3, H, W], and how concentrated around them belief is, [B, H, W], above 0."""
        said = self.predicted(image)
        return F.normalize(said[:, :3], dim=1), F.elu(said[:, 3]) + 1.01

    def validation_step(self, batch: NormalsBatch, batch_idx: int) -> None:
        keep = ~batch["replaced"] & batch["valid"].flatten(1).any(dim=1)
        image, normals, valid = (batch[name][keep] for name in ("image", "normals", "valid"))
        if len(image) == 0:
            return
        predicted = self(image)
        if predicted.shape != normals.shape:
            predicted = F.interpolate(predicted, size=normals.shape[-2:], mode="bilinear")
        wrong = angles(predicted, normals)[valid] * (180 / math.pi)
        self.metrics["normals_mean"].update(wrong)  # type: ignore[operator]
        for name, limit in WITHIN.items():
            self.metrics[name].update((wrong < limit).float())  # type: ignore[operator]
        for name, metric in self.metrics.items():
            self.log(f"eval/{name}", metric, batch_size=len(image))  # type: ignore[arg-type]

    def visualize(self, batch: NormalsBatch) -> Mapping[str, Tensor]:
        """The image, what is predicted, and what is true; grey where it is not known."""
        image = batch["image"]
        drawn = [
            F.interpolate(colors.of_normals(each), size=image.shape[-2:], mode="nearest-exact")
            for each in (self(image), batch["normals"] * batch["valid"][:, None])
        ]
        return {"normals": torch.stack([image, *(self.trainer.datamodule.normalize(each) for each in drawn)], dim=1)}  # type: ignore[attr-defined]
