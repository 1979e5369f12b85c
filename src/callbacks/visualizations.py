"""Logs images and clips that show the method on the same validation samples during the run."""

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
from src.sharding import unsharded


class VisualizationCallback(L.Callback, ABC):
    """Calls `show` at the start of a run, every ``every_n_epochs`` epochs and at the end, once a step.

    Args:
        every_n_epochs: epochs between two calls.

    Raises:
        SettingError: ``every_n_epochs`` is below 1.
    """

    def __init__(self, every_n_epochs: int) -> None:
        if every_n_epochs < 1:
            raise SettingError(f"{type(self).__name__}: every_n_epochs must be at least 1, got {every_n_epochs}")
        self.every_n_epochs = every_n_epochs
        self._shown_step = -1

    @abstractmethod
    def show(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Computes and logs the images. Called in every process, because a sharded module needs all of them for a
        forward pass; process 0 logs."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self._show_once(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._show_once(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show_once(trainer, pl_module)

    def _show_once(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._shown_step != trainer.global_step:
            self._shown_step = trainer.global_step
            self.show(trainer, pl_module)


class Visualizations(VisualizationCallback):
    """Logs the images of ``pl_module.visualize`` as ``images/<name>`` and the clips of ``pl_module.visualize_video`` as
    ``clips/<name>``, for the first validation samples.

    The samples are center-cropped as for evaluation, or augmented as in training if the method takes several views.
    The seed fixes masks and augmentations, so that only the method changes over the run. Clips play at the frame rate
    of the first video. Modes of modules and states of random number generators are restored afterwards.

    Args:
        count: number of samples, one row each.
        every_n_epochs: epochs between two visualizations.
        seed: of masks and augmentations.

    Raises:
        SettingError: ``count`` or ``every_n_epochs`` is below 1.
    """

    def __init__(self, count: int = 8, every_n_epochs: int = 5, seed: int = 0) -> None:
        super().__init__(every_n_epochs)
        if count < 1:
            raise SettingError(f"callbacks.visualizations.count must be at least 1, got {count}")
        self.count = count
        self.seed = seed
        self._batch: dict[str, Tensor] | None = None

    def show(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not _has_visualizations(pl_module):
            return
        module, datamodule = cast(PretrainModule, pl_module), cast(Any, trainer.datamodule)  # type: ignore[attr-defined]
        images, clips = self._visualize(module, datamodule)
        for name, rows in images.items():
            grid = make_grid(datamodule.denormalize(rows.float()).flatten(0, 1).cpu(), nrow=rows.shape[1])
            for writer in writers(trainer):
                writer.add_image(f"images/{name}", grid, trainer.global_step)
                writer.flush()
        for name, rows in clips.items():
            shown = datamodule.denormalize(rows.float()).cpu()  # [n, columns, T, 3, H, W]
            frames = [make_grid(frame.flatten(0, 1), nrow=rows.shape[1]) for frame in shown.unbind(2)]
            batch = self._fixed_batch(datamodule)
            readable = batch["index"][~batch["replaced"]].tolist()
            for writer in writers(trainer) if readable else ():
                seconds = datamodule.seconds_per_frame(readable[0])
                add_animation(writer, f"clips/{name}", frames, seconds, trainer.global_step)

    def _visualize(self, pl_module: PretrainModule, datamodule: Any) -> list[dict[str, Tensor]]:
        """The results of ``visualize`` and ``visualize_video``."""
        batch = datamodule.transfer_batch_to_device(self._fixed_batch(datamodule), pl_module.device, 0)
        batch = datamodule.on_after_batch_transfer(batch, 0)
        results = []
        with inference(pl_module), pl_module.trainer.precision_plugin.forward_context(), unsharded(pl_module):
            for visualize in (pl_module.visualize, pl_module.visualize_video):
                with seeded_everywhere(self.seed, pl_module.device):
                    results.append(dict(visualize(batch)))
        return results

    def _fixed_batch(self, datamodule: Any) -> dict[str, Tensor]:
        if self._batch is None:
            loader = datamodule.val_dataloader()
            # read from the dataset itself: the loader would start workers and decode a whole evaluation batch
            keys = next(iter(loader.sampler))[: self.count]
            dataset, view = loader.dataset, datamodule.train_view
            if view.batch_type is not datamodule.eval_view.batch_type:
                dataset = ViewedDataset(dataset.source, view, seed=self.seed, subset=dataset.subset)
            self._batch = dataset[keys]
        return self._batch


def writers(trainer: L.Trainer) -> list[Any]:
    """The TensorBoard writers; none in processes other than 0."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment for logger in loggers] if trainer.is_global_zero else []


def add_animation(writer: Any, name: str, frames: Sequence[Tensor], seconds: float, step: int) -> None:
    """Logs an animated GIF as an image. The writer's own ``add_video`` needs moviepy.

    Args:
        writer: TensorBoard's.
        name: the tag.
        frames: images [3, H, W] in [0, 1].
        seconds: time from one frame to the next.
        step: optimizer step.
    """
    images = [Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).numpy()) for frame in frames]
    width, height = images[0].size
    encoded = animation(images, seconds=seconds)
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
    writer.flush()


def _has_visualizations(pl_module: L.LightningModule) -> bool:
    """True if the method overrides ``visualize`` or ``visualize_video``."""
    method = type(pl_module)
    return issubclass(method, PretrainModule) and (
        method.visualize is not PretrainModule.visualize or method.visualize_video is not PretrainModule.visualize_video
    )


@contextmanager
def seeded_everywhere(seed: int, device: torch.device) -> Iterator[None]:
    """`seeded`, including the generator of ``device``."""
    on_gpu = device.type == "cuda"
    with seeded(seed), torch.random.fork_rng([device] if on_gpu else [], enabled=on_gpu):
        if on_gpu:
            torch.cuda.manual_seed(fold(seed))
        yield
