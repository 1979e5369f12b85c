"""Zero-shot accuracy, retrieval, localization and captions while training runs."""

from __future__ import annotations

import time
from typing import Any, cast

import lightning as L

from src.callbacks.online_evaluation import ends_training
from src.evaluation.captions import CaptionEvaluation
from src.evaluation.image_text import ImageTextEvaluation
from src.evaluation.localization import Localization
from src.models.pretrain_module import PretrainModule
from src.sharding import unsharded


class OnlineImageText(L.Callback):
    """Runs an `ImageTextEvaluation`, and what else is given, at the end of epochs and of training, as ``eval/<name>``.

    Args:
        evaluation: what is asked.
        localization: what is asked besides, of data that knows where things are; None for nothing.
        every_n_epochs: epochs between evaluations.
        captions: what is asked besides of a method that says what it sees.
    """

    def __init__(
        self,
        evaluation: ImageTextEvaluation | None = None,
        *,
        localization: Localization | None = None,
        every_n_epochs: int = 1,
        captions: CaptionEvaluation | None = None,
    ) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"OnlineImageText: every_n_epochs must be at least 1, got {every_n_epochs}")
        self.evaluation = evaluation or ImageTextEvaluation()
        self.localization = localization
        self.every_n_epochs = every_n_epochs
        self.captions = captions

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.received_sigterm:
            return
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0 or ends_training(trainer):
            begin = time.perf_counter()
            datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
            module, precision = cast(PretrainModule, pl_module), str(trainer.precision)
            with unsharded(pl_module):
                asked = [each for each in (self.evaluation, self.localization, self.captions) if each is not None]
                scores: dict[str, float] = {}
                for each in asked:
                    scores |= each(module, datamodule, pl_module.device, precision=precision)
            scores["image_text_seconds"] = time.perf_counter() - begin
            pl_module.log_dict({f"eval/{name}": value for name, value in scores.items()}, batch_size=1, sync_dist=True)
