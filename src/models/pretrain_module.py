"""The small base every method stands on: it wires the optimizer, logs what a step reports, and states the contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

import lightning as L
import torch
from torch import Tensor, nn

from src.callbacks.ema_teacher import EMATeacher
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.logging import logs_now
from src.optim import OptimizerRecipe
from src.sharding import FullySharded


class StepOutput(TypedDict):
    """What ``training_step`` returns; callbacks read this and ``encoders()``, nothing else of a method."""

    loss: Tensor  # scalar, what is differentiated
    logs: NotRequired[Mapping[str, Tensor | float]]  # further scalars by name, written as ``loss/<name>``
    embedding: NotRequired[Tensor]  # [B, D], detached, one row for each label of the batch
    patches: NotRequired[Tensor]  # [B, N, D], detached
    targets: NotRequired[Tensor]  # [..., K], detached: distributions over prototypes that a teacher or a code sets


class PretrainModule(L.LightningModule, ABC):
    """A pretraining method.

    A subclass annotates the batch type its ``training_step`` takes (checked against the DataModule before training
    starts) and names its encoders, student before teacher. Labels may be in the batch; no method here reads them in its
    loss.
    """

    def __init__(self, optimizer: OptimizerRecipe) -> None:
        super().__init__()
        self.optimizer_recipe = optimizer

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> StepOutput: ...

    @abstractmethod
    def encoders(self) -> dict[str, Encoder]:
        """The encoders to evaluate, export and look at, the first being the one a user would take away."""

    def teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Students and the teachers that follow them with ``self.teacher_momentum``; `EMATeacher` moves them. The
        parameters of a pair have the same names. None by default."""
        return []

    def visualize(self, batch: Any) -> Mapping[str, Tensor]:
        """Visualizations that show the method at work on ``batch``: name -> [n, columns, 3, H, W], a row of columns an image,
        in the batch's normalization. Called without gradients, in evaluation mode. None by default."""
        return {}

    def visualize_video(self, batch: Any) -> Mapping[str, Tensor]:
        """What moves of it: name -> [n, columns, T, 3, H, W], a row of columns a video, all of which play at once.
        Called as `pictures` is. None by default."""
        return {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer_recipe.build(self)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, FullySharded):
            self.trainer.strategy.shard(self)

    def on_fit_start(self) -> None:
        """
        Raises:
            SettingError: there is a teacher, and no callback that moves it.
        """
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.teacher_pairs() and not any(isinstance(each, EMATeacher) for each in callbacks):
            raise SettingError(
                f"{type(self).__name__} has a teacher and nothing moves it: callbacks.teacher must be an EMATeacher"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes where each encoder's backbone lies among the weights, so that others can take it without the method."""
        names = {id(module): name for name, module in self.named_modules()}
        checkpoint["encoders"] = {name: f"{names[id(each.backbone)]}." for name, each in self.encoders().items()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not logs_now(self.trainer):
            return
        # Lightning hands on the loss as it is differentiated, already divided by the number of micro-batches
        self.log("loss/total", outputs["loss"] * self.trainer.accumulate_grad_batches)
        self.log_dict({f"loss/{name}": value for name, value in outputs.get("logs", {}).items()})
