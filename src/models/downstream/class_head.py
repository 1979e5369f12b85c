"""The base of supervised methods with one output a class, whose classes come from the data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from src.datamodules.batches.base import BatchError
from src.models.pretrain_module import PretrainModule
from src.optim import OptimizerRecipe


class ClassHeadModule(PretrainModule):
    """A method that creates its head when the number of classes is known: from ``num_classes``, from the DataModule
    when training starts, or from the loaded checkpoint.

    Args:
        optimizer: for all parameters that require a gradient.
        num_classes: number of outputs; None for the number of classes in the data.
    """

    def __init__(self, optimizer: OptimizerRecipe, num_classes: int | None = None) -> None:
        super().__init__(optimizer)
        self.num_classes: int | None = None
        self.classes: list[str] = []
        self._requested_classes = num_classes

    @abstractmethod
    def make_head(self, num_classes: int) -> None:
        """Creates the layers that compute logits, and the metrics."""

    @abstractmethod
    def class_names(self, datamodule: Any) -> Sequence[str]:
        """The names of the data's classes, empty for data without classes."""

    def build(self, num_classes: int) -> None:
        """Creates the head, unless it exists.

        Raises:
            BatchError: the head exists with another number of classes.
        """
        if self.num_classes is not None:
            if num_classes != self.num_classes:
                raise BatchError(f"the classifier has {self.num_classes} classes, the data or checkpoint {num_classes}")
            return
        self.make_head(num_classes)
        self.num_classes = num_classes

    def configure_model(self) -> None:
        if self._trainer is None:
            return
        names = list(self.class_names(self.trainer.datamodule))  # type: ignore[attr-defined]
        if not names and self._requested_classes:  # of labels without names, such as those of streamed shards
            names = [str(number) for number in range(self._requested_classes)]
        if not names:
            raise BatchError(
                f"{type(self).__name__} learns from labels, and the data has no classes: choose data with labels, or "
                "set model.num_classes to the number of classes"
            )
        self.classes = names
        if self.num_classes is None:
            self.build(self._requested_classes or len(names))
        if self.num_classes is not None and len(names) > self.num_classes:
            raise BatchError(f"the classifier has {self.num_classes} classes, the data {len(names)}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["classes"] = self.classes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.classes = list(checkpoint["classes"])
        if self.num_classes is None:
            self.build(self._requested_classes or len(self.classes))
