"""What supervised heads share that have an output a class: the classes come from the data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from src.datamodules.batches.base import BatchError
from src.models.pretrain_module import PretrainModule
from src.optim import OptimizerRecipe


class ClassHeadModule(PretrainModule):
    """A method whose head is made once the classes are known: from ``num_classes``, else from the DataModule when
    training starts, else from the checkpoint that is loaded.

    Args:
        optimizer: of whatever takes a gradient.
        num_classes: None for as many as the data has.
    """

    def __init__(self, optimizer: OptimizerRecipe, num_classes: int | None = None) -> None:
        super().__init__(optimizer)
        self.num_classes: int | None = None
        self.classes: list[str] = []
        self._wanted_classes = num_classes

    @abstractmethod
    def make_head(self, num_classes: int) -> None:
        """Make what turns features into logits, and what measures them."""

    @abstractmethod
    def names_of(self, datamodule: Any) -> Sequence[str]:
        """The data's classes; empty where there are none."""

    def build(self, num_classes: int) -> None:
        """Make the head for ``num_classes``.

        Raises:
            BatchError: it was built for another number.
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
        names = list(self.names_of(self.trainer.datamodule))  # type: ignore[attr-defined]
        if not names:
            raise BatchError(f"{type(self).__name__} learns from labels, and the data has none")
        self.classes = names
        if self.num_classes is None:
            self.build(self._wanted_classes or len(names))
        if self.num_classes is not None and len(names) > self.num_classes:
            raise BatchError(f"the classifier has {self.num_classes} classes, the data {len(names)}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["classes"] = self.classes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.classes = list(checkpoint["classes"])
        if self.num_classes is None:
            self.build(self._wanted_classes or len(self.classes))
