"""Evaluation during training, by the same code and with the same numbers as afterwards."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import cast

import lightning as L

from src.callbacks.online_probe import OnlineProbe
from src.collectives import rank
from src.datamodules.datamodule import DataModule
from src.errors import SettingError
from src.evaluation.errors import NotApplicable
from src.evaluation.evaluation import Evaluation, FeatureEvaluation, joined_needs, score_exactly
from src.evaluation.subject import BANK_SAMPLES, QUERY_SAMPLES, Subject
from src.models.logging import publish
from src.sharding import unsharded

log = logging.getLogger(__name__)


class OnlineEvaluation(L.Callback):
    """Runs evaluations at the end of epochs and at the end of training, and logs their numbers as ``eval/<name>``.

    Data is read once for all encoders and evaluations. If there are evaluations of features, an `OnlineProbe` among the
    callbacks is evaluated on the same features (``eval/probe_top1``). Weights, gradients, optimizers, modes and random
    numbers of the training are not changed: training gives the same bits with and without this callback. An evaluation
    that is not applicable to the data or the method is logged once and skipped from then on.

    The defaults cost under 1 % of an epoch of MAE ViT-B on ImageNet (see `src.evaluation.cost`).

    Args:
        evaluations: by name, as in configs/evaluation; an entry that is None is left out.
        every_n_epochs: epochs between evaluations.
        bank_samples, query_samples: number of images at most, a fixed random choice; None for all.
        at_start: also evaluate before the first step.
        seconds: name under which the duration is logged.
    """

    def __init__(
        self,
        evaluations: Mapping[str, Evaluation | None],
        *,
        every_n_epochs: int = 5,
        bank_samples: int | None = BANK_SAMPLES,
        query_samples: int | None = QUERY_SAMPLES,
        at_start: bool = False,
        seconds: str = "seconds",
    ) -> None:
        if every_n_epochs < 1:
            raise SettingError(f"OnlineEvaluation: every_n_epochs must be at least 1, got {every_n_epochs}")
        self.evaluations = {name: evaluation for name, evaluation in evaluations.items() if evaluation is not None}
        self.every_n_epochs = every_n_epochs
        self.bank_samples = bank_samples
        self.query_samples = query_samples
        self.at_start = at_start
        self.seconds = seconds
        self._evaluated_at = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluated_at = -1
        if self.at_start and trainer.global_step == 0:
            publish(trainer, self._evaluate(trainer, pl_module))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.received_sigterm:
            return
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0 or ends_training(trainer):
            # all processes have the same numbers; sync_dist only tells Lightning so
            pl_module.log_dict(self._evaluate(trainer, pl_module), batch_size=1, sync_dist=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # a callback after this one may have stopped the training
        if self._evaluated_at != trainer.global_step and not trainer.received_sigterm:
            publish(trainer, self._evaluate(trainer, pl_module))

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        self._evaluated_at = trainer.global_step
        if not self.evaluations:
            return {}
        begin = time.perf_counter()
        subject = Subject(
            cast(DataModule, trainer.datamodule),  # type: ignore[attr-defined]
            pl_module.device,
            module=pl_module,
            precision=str(trainer.precision),
            bank_samples=self.bank_samples,
            query_samples=self.query_samples,
            needs=joined_needs(list(self.evaluations.values())),
        )
        scores: dict[str, float] = {}
        with unsharded(pl_module):
            for name, evaluation in list(self.evaluations.items()):
                try:
                    scores |= evaluation(subject)
                except NotApplicable as problem:
                    self._skip(name, problem)
            if any(isinstance(evaluation, FeatureEvaluation) for evaluation in self.evaluations.values()):
                scores |= self._probes(trainer, subject)
        if not scores:
            return {}
        return {f"eval/{name}": value for name, value in scores.items()} | {
            f"eval/{self.seconds}": time.perf_counter() - begin
        }

    def _probes(self, trainer: L.Trainer, subject: Subject) -> dict[str, float]:
        scores: dict[str, float] = {}
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for probe in (callback for callback in callbacks if isinstance(callback, OnlineProbe)):
            sets = next(iter(subject.features().values()))
            scores |= score_exactly(probe, sets, subject.device)
        return scores

    def _skip(self, name: str, problem: NotApplicable) -> None:
        del self.evaluations[name]
        if rank() == 0:
            log.warning("no online evaluation '%s': %s", name, problem)


def ends_training(trainer: L.Trainer) -> bool:
    """Returns True if the current epoch is the last, as far as it can be known now."""
    by_steps = 0 <= trainer.max_steps <= trainer.global_step
    by_epochs = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
    return by_steps or by_epochs or trainer.should_stop
