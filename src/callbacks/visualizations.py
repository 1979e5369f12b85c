"""The method at work on the same few images, over the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torchvision.utils import make_grid

from src.callbacks.drawing import animation
from src.datamodules.dataset import ViewedDataset
from src.errors import SettingError
from src.models.functional import inference
from src.models.pretrain_module import PretrainModule
from src.randomness import fold, seeded
from src.sharding import gathered


class VisualizationCallback(L.Callback, ABC):
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


class Visualizations(VisualizationCallback):
    """Logs what ``pl_module.visualize`` makes of the first validation images, as ``pictures/<name>``, and what
    ``pl_module.visualize_video`` makes of them, as ``clips/<name>``: at the start, every so many epochs, and at the end. Clips
    play as fast as the first video's frames were taken.

    They are cropped as for evaluation, or augmented as in training where the method takes several views.
    Random masks and views are the same every time, so that only the method changes from image to image. Modes and
    generators are left as they were.

    Args:
        count: images, one row each.
        every_n_epochs: how often.
        seed: of masks and views.
    """

    def __init__(self, count: int = 8, every_n_epochs: int = 1, seed: int = 0) -> None:
        super().__init__(every_n_epochs)
        if count < 1:
            raise SettingError(f"Visualizations: count must be at least 1, got {count}")
        self.count = count
        self.seed = seed
        self._batch: dict[str, Tensor] | None = None

    def show(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not _shows(pl_module):
            return
        module, datamodule = cast(PretrainModule, pl_module), cast(Any, trainer.datamodule)  # type: ignore[attr-defined]
        stills, clips = self._draw(module, datamodule)
        for name, rows in stills.items():
            grid = make_grid(datamodule.denormalize(rows.float()).flatten(0, 1).cpu(), nrow=rows.shape[1])
            for writer in writers(trainer):
                writer.add_image(f"pictures/{name}", grid, trainer.global_step)
                writer.flush()
        for name, rows in clips.items():
            shown = datamodule.denormalize(rows.float()).transpose(0, 2).cpu()  # [T, columns, n, 3, H, W]
            frames = [make_grid(each.transpose(0, 1).flatten(0, 1), nrow=rows.shape[1]) for each in shown]
            batch = self._fixed_batch(datamodule)
            readable = batch["index"][~batch["replaced"]].tolist()
            for writer in writers(trainer) if readable else ():
                seconds = datamodule.seconds_a_frame(readable[0])
                add_animation(writer, f"clips/{name}", frames, seconds, trainer.global_step)

    def _draw(self, pl_module: PretrainModule, datamodule: Any) -> list[dict[str, Tensor]]:
        """Its images and its clips."""
        batch = datamodule.transfer_batch_to_device(self._fixed_batch(datamodule), pl_module.device, 0)
        batch = datamodule.on_after_batch_transfer(batch, 0)
        shown = []
        with inference(pl_module), pl_module.trainer.precision_plugin.forward_context(), gathered(pl_module):
            for draw in (pl_module.visualize, pl_module.visualize_video):
                with seeded_everywhere(self.seed, pl_module.device):
                    shown.append(dict(draw(batch)))
        return shown

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
    """Where images are written: TensorBoard's, in the process that logs."""
    found = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment for logger in found] if trainer.is_global_zero else []


def add_animation(writer: Any, name: str, frames: Sequence[Tensor], seconds: float, step: int) -> None:
    """What the writer's ``add_video`` does with a further library: an image that happens to be an animated GIF.

    Args:
        writer: TensorBoard's.
        frames: [3, H, W] each, in [0, 1].
        seconds: from one frame to the next.
    """
    pictures = [Image.fromarray((each * 255).round().byte().permute(1, 2, 0).numpy()) for each in frames]
    width, height = pictures[0].size
    shown = Summary.Image(
        height=height, width=width, colorspace=3, encoded_image_string=animation(pictures, seconds=seconds)
    )
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=shown)]), step)
    writer.flush()


def _shows(pl_module: L.LightningModule) -> bool:
    """Whether the module has ``pictures`` or ``clips`` of its own: the base's draw none, and no batch is made for
    them."""
    own = type(pl_module)
    return issubclass(own, PretrainModule) and (
        own.visualize is not PretrainModule.visualize or own.visualize_video is not PretrainModule.visualize_video
    )


@contextmanager
def seeded_everywhere(seed: int, device: torch.device) -> Iterator[None]:
    """`seeded`, and the generator of ``device`` with it."""
    on_gpu = device.type == "cuda"
    with seeded(seed), torch.random.fork_rng([device] if on_gpu else [], enabled=on_gpu):
        if on_gpu:
            torch.cuda.manual_seed(fold(seed))
        yield
