"""The method at work on the same few images, over the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid

from src.datamodules.dataset import ViewedDataset
from src.errors import SettingError
from src.models.backbones.image_encoder import inference
from src.models.pretrain_module import PretrainModule
from src.randomness import fold, seeded
from src.sharding import gathered


class Pictures(L.Callback):
    """Logs what ``pl_module.pictures`` makes of the first validation images, as ``pictures/<name>``: at the start,
    every so many epochs, and at the end.

    They are cropped as for evaluation, or augmented as in training where the method takes several views.
    Random masks and views are the same every time, so that only the method changes from picture to picture. Modes and
    generators are left as they were.

    Args:
        count: images, one row each.
        every_n_epochs: how often.
        seed: of masks and views.
    """

    def __init__(self, count: int = 8, every_n_epochs: int = 1, seed: int = 0) -> None:
        if count < 1 or every_n_epochs < 1:
            raise SettingError(f"Pictures: count and every_n_epochs must be at least 1, got {count}, {every_n_epochs}")
        self.count = count
        self.every_n_epochs = every_n_epochs
        self.seed = seed
        self._batch: dict[str, Tensor] | None = None
        self._shown = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self._show(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show(trainer, pl_module)

    def _show(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._shown == trainer.global_step or not _draws_pictures(pl_module):
            return
        self._shown = trainer.global_step
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        # every process draws, one logs: a sharded module needs them all for a forward pass
        for name, rows in self._draw(pl_module, datamodule).items():
            grid = make_grid(datamodule.denormalise(rows.float()).flatten(0, 1).cpu(), nrow=rows.shape[1])
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                    logger.experiment.add_image(f"pictures/{name}", grid, trainer.global_step)
                    logger.experiment.flush()

    def _draw(self, pl_module: L.LightningModule, datamodule: Any) -> dict[str, Tensor]:
        batch = {name: value.to(pl_module.device) for name, value in self._fixed_batch(datamodule).items()}
        batch = datamodule.on_after_batch_transfer(batch, 0)
        trainer = pl_module.trainer
        with (
            inference(pl_module),
            _seeded_everywhere(self.seed, pl_module.device),
            trainer.precision_plugin.forward_context(),
            gathered(pl_module),
        ):
            return dict(pl_module.pictures(batch))  # type: ignore[operator]

    def _fixed_batch(self, datamodule: Any) -> dict[str, Tensor]:
        if self._batch is None:
            loader = datamodule.val_dataloader()
            # straight from the data set: the loader would start workers and decode a whole evaluation batch
            draws = next(iter(loader.sampler))[: self.count]
            dataset, view = loader.dataset, datamodule.train_view
            if view.batch_type is not datamodule.eval_view.batch_type:
                dataset = ViewedDataset(dataset.source, view, seed=self.seed, subset=dataset.subset)
            self._batch = dataset[draws]
        return self._batch


def _draws_pictures(pl_module: L.LightningModule) -> bool:
    """Whether the module has a ``pictures`` of its own: the base's draws none, and no batch is made for it."""
    return getattr(type(pl_module), "pictures", PretrainModule.pictures) is not PretrainModule.pictures


@contextmanager
def _seeded_everywhere(seed: int, device: torch.device) -> Iterator[None]:
    """`seeded`, and the generator of ``device`` with it."""
    on_gpu = device.type == "cuda"
    with seeded(seed), torch.random.fork_rng([device] if on_gpu else [], enabled=on_gpu):
        if on_gpu:
            torch.cuda.manual_seed(fold(seed))
        yield
