"""The base of supervised classifiers of images and videos: labels, validation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from src.datamodules.batches.base import labels_of, mean_of_samples, optional_labels
from src.datamodules.batches.image import ImageBatch
from src.datamodules.batches.video import VideoBatch
from src.models.downstream.class_head import ClassHeadModule
from src.models.logging import log_metrics
from src.optim import OptimizerRecipe


class Classifier(ClassHeadModule):
    """A classifier of images or videos, validated by ``eval/top1``, ``eval/top5`` and ``eval/loss``. The probabilities
    of several clips of a video are averaged.

    Args:
        optimizer: for all parameters that require a gradient.
        num_classes: number of outputs; None for the number of classes in the data.
    """

    input_field: ClassVar[str] = "image"  # the field of a batch that is classified

    def __init__(self, optimizer: OptimizerRecipe, num_classes: int | None = None) -> None:
        super().__init__(optimizer, num_classes)
        self.metrics = nn.ModuleDict()

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W], or clips [B, T, 3, H, W], -> logits [B, K]."""

    def class_names(self, datamodule: Any) -> Sequence[str]:
        return datamodule.classes

    def build(self, num_classes: int) -> None:
        super().build(num_classes)
        if not self.metrics:
            for name, k in (("top1", 1), ("top5", min(5, num_classes))):
                self.metrics[name] = MulticlassAccuracy(num_classes, top_k=k, average="micro", validate_args=False)
            # Lightning's mean over processes rounds their numbers of samples
            self.metrics["loss"] = MeanMetric()

    def validation_step(self, batch: ImageBatch | VideoBatch, batch_idx: int) -> None:
        log_metrics(self, self.metrics)
        labels = optional_labels(batch)
        keep = (labels >= 0) & ~batch["replaced"]
        label = labels[keep]
        if len(label) == 0:
            return
        logits = self(batch[self.input_field][keep]).float()  # type: ignore[literal-required]
        probabilities, first = mean_of_samples(logits.softmax(dim=1), batch["index"][keep])
        if len(first) < len(label):
            logits = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
            label = label[first]
        for name in ("top1", "top5"):
            self.metrics[name].update(logits, label)  # type: ignore[operator]
        self.metrics["loss"].update(F.cross_entropy(logits, label, reduction="none"))  # type: ignore[operator]

    def labels_of(self, batch: ImageBatch | VideoBatch) -> Tensor:
        """The labels of a batch.

        Raises:
            BatchError: a sample has no label.
        """
        return labels_of(batch, type(self).__name__)


def truncated_normal(linear: nn.Linear, std: float) -> None:
    """Initializes weights from a normal distribution truncated to [-2, 2], and biases with zeros."""
    nn.init.trunc_normal_(linear.weight, std=std, a=-2.0, b=2.0)
    with torch.no_grad():
        linear.bias.zero_()
