"""What supervised heads on a pretrained backbone share: the number of classes from the data, and the validation."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from src.datamodules.batch import BatchError, ImageBatch
from src.models.pretrain_module import PretrainModule
from src.optim import OptimizerRecipe


class Classifier(PretrainModule):
    """A classifier of images, validated by ``eval/top1``, ``eval/top5`` and ``eval/loss``.

    The head is made once the classes are known: from ``num_classes``, else from the DataModule when training starts,
    else from the checkpoint that is loaded.

    Args:
        optimizer: of whatever takes a gradient.
        num_classes: None for as many as the data has.
    """

    def __init__(self, optimizer: OptimizerRecipe, num_classes: int | None = None) -> None:
        super().__init__(optimizer)
        self.num_classes: int | None = None
        self.classes: list[str] = []
        self.metrics = nn.ModuleDict()
        self._wanted_classes = num_classes

    @abstractmethod
    def make_head(self, num_classes: int) -> None:
        """Make what turns features into logits."""

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> logits [B, K]."""

    def build(self, num_classes: int) -> None:
        """Make the head and metrics for ``num_classes``.

        Raises:
            BatchError: it was built for another number.
        """
        if self.num_classes is not None:
            if num_classes != self.num_classes:
                raise BatchError(f"the classifier has {self.num_classes} classes, the data or checkpoint {num_classes}")
            return
        self.make_head(num_classes)
        self.num_classes = num_classes
        for name, k in (("top1", 1), ("top5", min(5, num_classes))):
            self.metrics[name] = MulticlassAccuracy(num_classes, top_k=k, average="micro", validate_args=False)

    def configure_model(self) -> None:
        if self._trainer is None:
            return
        names = list(self.trainer.datamodule.classes)  # type: ignore[attr-defined]
        if not names:
            raise BatchError(f"{type(self).__name__} learns from labels, and the data has none")
        self.classes = names
        if self.num_classes is None:
            self.build(self._wanted_classes or len(names))
        if self.num_classes is not None and len(names) > self.num_classes:
            raise BatchError(f"the classifier has {self.num_classes} classes, the data {len(names)}")

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        keep = (batch["label"] >= 0) & ~batch["replaced"]
        label = batch["label"][keep]
        if len(label) == 0:
            return
        logits = self(batch["image"][keep]).float()
        for name, metric in self.metrics.items():
            metric.update(logits, label)  # type: ignore[operator]
            self.log(f"eval/{name}", metric, batch_size=len(label))  # type: ignore[arg-type]
        self.log("eval/loss", F.cross_entropy(logits, label), batch_size=len(label), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["classes"] = self.classes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.classes = list(checkpoint["classes"])
        if self.num_classes is None:
            self.build(self._wanted_classes or len(self.classes))

    def labels_of(self, batch: ImageBatch) -> Tensor:
        """The batch's labels, all of which must be there.

        Raises:
            BatchError: a sample has none.
        """
        label = batch["label"]
        if (label < 0).any():
            raise BatchError(f"{type(self).__name__} learns from labels; {int((label < 0).sum())} of a batch have none")
        return label


def truncated_normal(linear: nn.Linear, std: float) -> None:
    """Weights from a normal distribution cut at two, zero biases."""
    nn.init.trunc_normal_(linear.weight, std=std, a=-2.0, b=2.0)
    with torch.no_grad():
        linear.bias.zero_()
