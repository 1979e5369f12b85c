"""Surface normal estimation with the head of the dense prediction transformer (DPT)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from src.datamodules.batches.dense import NormalsBatch
from src.models.downstream.colormaps import beside_image, color_normals
from src.models.downstream.dpt import DensePrediction
from src.models.logging import log_metrics
from src.models.losses.normals import angles, angular_nll
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe

WITHIN = {"within_11": 11.25, "within_22": 22.5, "within_30": 30.0}  # degrees


class SurfaceNormals(DensePrediction):
    """Predicts surface normals and their concentration with DPT's head and the loss of Estimating and Exploiting the
    Aleatoric Uncertainty in Surface Normal Estimation (Bae et al., 2021). Probing the 3D Awareness of Visual Foundation
    Models (El Banani et al., 2024) uses the same loss.

    Validated over all known pixels of a split: ``eval/normals_mean``, the mean angular error in degrees, and
    ``eval/within_11``, ``_22`` and ``_30``, the shares of pixels with an error below 11.25, 22.5 and 30 degrees.

    Deviations: trained on all pixels; the paper samples uncertain ones and refines them with a small network. The loss
    is a mean over images, where the authors pool the pixels of a batch, so that several processes have the gradient of
    one. It counts pixels within 2.6 degrees of the truth (a dot product of 0.999) or of its opposite, which the authors
    leave out, because the gradient of their arc cosine has no limit there; `angles` has one.

    Args:
        backbone, optimizer, options: see `DensePrediction`.
    """

    def __init__(self, backbone: nn.Module, optimizer: OptimizerRecipe, **options: Any) -> None:
        super().__init__(backbone, optimizer, outputs=4, **options)
        self.metrics = nn.ModuleDict({name: MeanMetric() for name in ("normals_mean", *WITHIN)})

    def training_step(self, batch: NormalsBatch, batch_idx: int) -> StepOutput:
        normals, concentration = self.predict_normals(batch["image"])
        return {"loss": angular_nll(normals, concentration, batch["normals"], batch["valid"])}

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> unit vectors, float32 [B, 3, H, W]."""
        return self.predict_normals(image)[0]

    def predict_normals(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted distribution of normals: unit vectors, float32 [B, 3, H, W], and concentrations above 0,
        [B, H, W]."""
        output = self.predict_pixels(image)
        return F.normalize(output[:, :3], dim=1), F.elu(output[:, 3]) + 1.01

    def validation_step(self, batch: NormalsBatch, batch_idx: int) -> None:
        log_metrics(self, self.metrics)
        keep = ~batch["replaced"] & batch["valid"].flatten(1).any(dim=1)
        image, normals, valid = (batch[name][keep] for name in ("image", "normals", "valid"))
        if len(image) == 0:
            return
        predicted = self(image)
        if predicted.shape != normals.shape:
            predicted = F.interpolate(predicted, size=normals.shape[-2:], mode="bilinear")
        error = angles(predicted, normals)[valid] * (180 / math.pi)
        self.metrics["normals_mean"].update(error)  # type: ignore[operator]
        for name, limit in WITHIN.items():
            self.metrics[name].update((error < limit).float())  # type: ignore[operator]

    def visualize(self, batch: NormalsBatch) -> Mapping[str, Tensor]:
        """Image, prediction and ground truth; unknown pixels are gray."""
        image = batch["image"]
        colored = [color_normals(normals) for normals in (self(image), batch["normals"] * batch["valid"][:, None])]
        return {"normals": beside_image(image, colored, self.trainer.datamodule.normalize)}  # type: ignore[attr-defined]
