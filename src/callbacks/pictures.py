"""The method at work on the same few images, over the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
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


class Shown(L.Callback, ABC):
    """Something to look at: at the start, every so many epochs, and at the end, once each.

    Args:
        every_n_epochs: how often.
    """

    def __init__(self, every_n_epochs: int) -> None:
        if every_n_epochs < 1:
            raise SettingError(f"{type(self).__name__}: every_n_epochs must be at least 1, got {every_n_epochs}")
        self.every_n_epochs = every_n_epochs
        self._shown = -1

    @abstractmethod
    def show(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called in every process: a sharded module needs them all for a forward pass. One of them logs."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self._once(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._once(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._once(trainer, pl_module)

    def _once(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._shown != trainer.global_step:
            self._shown = trainer.global_step
            self.show(trainer, pl_module)


class Pictures(Shown):
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
        super().__init__(every_n_epochs)
        if count < 1:
            raise SettingError(f"Pictures: count must be at least 1, got {count}")
        self.count = count
        self.seed = seed
        self._batch: dict[str, Tensor] | None = None

    def show(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not _draws_pictures(pl_module):
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        for name, rows in self._draw(pl_module, datamodule).items():
            grid = make_grid(datamodule.denormalise(rows.float()).flatten(0, 1).cpu(), nrow=rows.shape[1])
            for writer in writers(trainer):
                writer.add_image(f"pictures/{name}", grid, trainer.global_step)
                writer.flush()

    def _draw(self, pl_module: L.LightningModule, datamodule: Any) -> dict[str, Tensor]:
        batch = datamodule.transfer_batch_to_device(self._fixed_batch(datamodule), pl_module.device, 0)
        batch = datamodule.on_after_batch_transfer(batch, 0)
        trainer = pl_module.trainer
        with (
            inference(pl_module),
            seeded_everywhere(self.seed, pl_module.device),
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


def writers(trainer: L.Trainer) -> list[Any]:
    """Where pictures are written: TensorBoard's, in the process that logs."""
    found = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment for logger in found] if trainer.is_global_zero else []


def _draws_pictures(pl_module: L.LightningModule) -> bool:
    """Whether the module has a ``pictures`` of its own: the base's draws none, and no batch is made for it."""
    return getattr(type(pl_module), "pictures", PretrainModule.pictures) is not PretrainModule.pictures


@contextmanager
def seeded_everywhere(seed: int, device: torch.device) -> Iterator[None]:
    """`seeded`, and the generator of ``device`` with it."""
    on_gpu = device.type == "cuda"
    with seeded(seed), torch.random.fork_rng([device] if on_gpu else [], enabled=on_gpu):
        if on_gpu:
            torch.cuda.manual_seed(fold(seed))
        yield
