"""The base class of every method: it builds the optimizers, logs what a step returns, and states the contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import lightning as L
from lightning.pytorch.core.optimizer import LightningOptimizer, do_nothing_closure
from torch import Tensor

from src.models.backbones.encoder import Encoder
from src.models.backbones.weights import Weights, grid_of, load_into
from src.models.logging import logs_now
from src.models.teacher import TeacherPair
from src.optim import OptimizerRecipe, build_optimizers
from src.sharding import FullySharded


class StepOutput(TypedDict):
    """The output of ``training_step``. Callbacks read this and ``encoders()``, nothing else of a method."""

    loss: Tensor  # scalar to minimize
    logs: NotRequired[Mapping[str, Tensor | float]]  # further scalars by name, logged as ``loss/<name>``
    # [B, D], detached, one row for each sample of the batch; online probes pair it with the batch's labels, if any
    embedding: NotRequired[Tensor]
    targets: NotRequired[Tensor]  # [..., K], detached: the distributions over prototypes that the student has to match


class PretrainModule(L.LightningModule, ABC):
    """A pretraining method.

    A subclass annotates the batch type that its ``training_step`` takes (checked against the DataModule before training
    starts) and names its encoders, student before teacher.

    Args:
        optimizer: the recipe of the optimizer, or a recipe by name for each of several optimizers, which then say which
            parameters they update (``OptimizerRecipe.parameters``). A method with several updates each of them in its
            ``training_step`` (Lightning's manual optimization). The first takes a step for every batch: the steps of a
            run are its steps.

    Attributes:
        new_parameters: prefixes of the names of a backbone's parameters that begin anew where training starts from
            weights, such as a norm that belongs to the head.
    """

    new_parameters: Sequence[str] = ()

    def __init__(self, optimizer: OptimizerRecipe | Mapping[str, OptimizerRecipe]) -> None:
        super().__init__()
        self.optimizer_recipes = dict(optimizer) if isinstance(optimizer, Mapping) else {"optimizer": optimizer}
        self.automatic_optimization = len(self.optimizer_recipes) == 1

    @property
    def optimizer_recipe(self) -> OptimizerRecipe:
        """The recipe, for methods with one optimizer."""
        (recipe,) = self.optimizer_recipes.values()
        return recipe

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> StepOutput: ...

    @abstractmethod
    def encoders(self) -> dict[str, Encoder]:
        """The encoders to evaluate, export and fine-tune, by name. The first is the default."""

    def teacher_pairs(self) -> list[TeacherPair]:
        """The teachers, with their students; the callback `EMATeacher` moves them. None by default."""
        return []

    def load_start(self, weights: Weights) -> str:
        """Starts from pretrained weights, in place, and returns one line that says what was loaded. Called once, before
        training (the configuration's ``checkpoint``).

        Every encoder takes the weights, and every teacher begins as a copy of its student. Heads, queues and centers
        begin anew.

        Raises:
            WeightsError: the weights do not fit the encoders.
        """
        pairs = self.teacher_pairs()
        copies = {id(module) for pair in pairs for module in pair.teacher.modules()}
        backbones = {id(encoder.backbone): encoder.backbone for encoder in self.encoders().values()}
        lines = [
            load_into(backbone, weights, self.new_parameters)
            for key, backbone in backbones.items()
            if key not in copies
        ]
        for pair in pairs:
            pair.teacher.load_state_dict(pair.student.state_dict())
        return "; ".join(dict.fromkeys(lines))

    def visualize(self, batch: Any) -> Mapping[str, Tensor]:
        """Images that show the method at work on ``batch``: name -> [n, columns, 3, H, W], a row of columns for each
        image, normalized as the batch is. Called without gradients, in evaluation mode. None by default."""
        return {}

    def visualize_video(self, batch: Any) -> Mapping[str, Tensor]:
        """Videos that show the method at work: name -> [n, columns, T, 3, H, W], a row of columns for each video.
        Called as `visualize` is. None by default."""
        return {}

    def configure_optimizers(self) -> Any:
        optimizers = build_optimizers(self, self.optimizer_recipes)
        return optimizers if len(optimizers) > 1 else optimizers[0]

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """As Lightning's, but only the first optimizer's steps count in ``trainer.global_step``: schedules and the
        run's length would otherwise count each batch once for each optimizer."""
        optimizers = super().optimizers(use_pl_optimizer)
        for other in optimizers[1:] if isinstance(optimizers, list) else []:
            if isinstance(other, LightningOptimizer):
                other._on_before_step = other._on_after_step = do_nothing_closure
        return optimizers

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, FullySharded):
            self.trainer.strategy.shard(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes the prefix of each encoder's weights and the grid of its patches, so that an encoder can be loaded
        without its method and its positional embedding interpolated."""
        names = {id(module): name for name, module in self.named_modules()}
        encoders = self.encoders()
        checkpoint["encoders"] = {name: f"{names[id(encoder.backbone)]}." for name, encoder in encoders.items()}
        grids = {name: grid_of(encoder.backbone) for name, encoder in encoders.items()}
        checkpoint["grids"] = {name: list(grid) for name, grid in grids.items() if grid is not None}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not logs_now(self.trainer):
            return
        # Lightning has divided the loss by the number of micro-batches
        self.log("loss/total", outputs["loss"] * self.trainer.accumulate_grad_batches)
        self.log_dict({f"loss/{name}": value for name, value in outputs.get("logs", {}).items()})
