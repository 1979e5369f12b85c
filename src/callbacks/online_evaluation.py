"""Evaluation while training runs: the same protocol, the same code and the same numbers as afterwards."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import cast

import lightning as L

from src.callbacks.online_probe import OnlineProbe
from src.collectives import rank
from src.datamodules.datamodule import DataModule
from src.evaluation.features import NoLabels
from src.evaluation.knn import KNN
from src.evaluation.run import BANK_SAMPLES, QUERY_SAMPLES, EncoderEvaluation, Evaluator, feature_sets, named, score
from src.models.logging import publish
from src.models.pretrain_module import PretrainModule
from src.sharding import unsharded

log = logging.getLogger(__name__)


class OnlineEvaluation(L.Callback):
    """Evaluates the method's encoders at the end of epochs and at the end of training, as ``eval/<name>``.

    Bank and queries are read once, whatever the number of encoders and evaluators; an `OnlineProbe` among the callbacks
    is judged on the same features (``eval/probe_top1``). Weights, gradients, optimizers, modes and random numbers of
    the training are left alone: with and without this callback training gives the same bits. ``eval/seconds`` is what
    the evaluation took. Without labels it says so once and rests.

    The defaults cost under 1 % of an epoch of MAE ViT-B on ImageNet (see `src.evaluation.cost`).

    Args:
        evaluators: of frozen features; the default is `KNN` with k = 20.
        every_n_epochs: epochs between evaluations.
        bank_samples, query_samples: images at most, a fixed random choice; None for all.
        at_start: evaluate before the first step too, what training starts from.
        of_positions: further evaluations, of what encoders say of positions, such as `LabelPropagation`.
    """

    def __init__(
        self,
        evaluators: Sequence[Evaluator] | None = None,
        *,
        every_n_epochs: int = 5,
        bank_samples: int | None = BANK_SAMPLES,
        query_samples: int | None = QUERY_SAMPLES,
        at_start: bool = False,
        of_positions: Sequence[EncoderEvaluation] = (),
    ) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"OnlineEvaluation: every_n_epochs must be at least 1, got {every_n_epochs}")
        self.evaluators: list[Evaluator] = [KNN()] if evaluators is None else list(evaluators)
        self.every_n_epochs = every_n_epochs
        self.bank_samples = bank_samples
        self.query_samples = query_samples
        self.at_start = at_start
        self.of_positions = list(of_positions)
        self._evaluated_at = -1
        self._unlabelled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluated_at = -1
        if self.at_start and trainer.global_step == 0:
            publish(trainer, self._evaluate(trainer, pl_module))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.received_sigterm:
            return
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0 or ends_training(trainer):
            # all processes hold the same numbers; the reduction only says so to Lightning
            pl_module.log_dict(self._evaluate(trainer, pl_module), batch_size=1, sync_dist=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # where training was stopped by what ran after this callback
        if self._evaluated_at != trainer.global_step and not trainer.received_sigterm:
            publish(trainer, self._evaluate(trainer, pl_module))

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        self._evaluated_at = trainer.global_step
        datamodule = cast(DataModule, trainer.datamodule)  # type: ignore[attr-defined]
        if self._unlabelled or len(datamodule.classes) == 0:
            self._rest()
            return {}
        begin = time.perf_counter()
        try:
            with unsharded(pl_module):
                encoders = cast(PretrainModule, pl_module).encoders()
                sets = feature_sets(
                    encoders,
                    datamodule,
                    pl_module.device,
                    bank_samples=self.bank_samples,
                    query_samples=self.query_samples,
                    precision=str(trainer.precision),
                    evaluators=self.evaluators,
                )
                of_positions = [
                    evaluation(encoders, datamodule, pl_module.device, precision=str(trainer.precision))
                    for evaluation in self.of_positions
                ]
        except NoLabels:
            self._rest()
            return {}
        scores = score(sets, self.evaluators, pl_module.device)
        for each in of_positions:
            scores |= named(each)
        first = next(iter(sets))
        for probe in (callback for callback in trainer.callbacks if isinstance(callback, OnlineProbe)):  # type: ignore[attr-defined]
            scores |= score({first: sets[first]}, [probe], pl_module.device)
        return {f"eval/{name}": value for name, value in scores.items()} | {"eval/seconds": time.perf_counter() - begin}

    def _rest(self) -> None:
        if not self._unlabelled and rank() == 0:
            log.warning("the data has no labels: no online evaluation")
        self._unlabelled = True


def ends_training(trainer: L.Trainer) -> bool:
    """Whether the epoch that ends is the last, as far as can be known now."""
    by_steps = 0 <= trainer.max_steps <= trainer.global_step
    by_epochs = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
    return by_steps or by_epochs or trainer.should_stop
