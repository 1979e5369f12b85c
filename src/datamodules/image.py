"""Images from any source, as the batches methods train on and the sets evaluations need."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from src.datamodules.dataset import EvalSampler, ResumableLoader, TrainSampler, ViewedDataset
from src.datamodules.sources.source import ImageSource, OrderedSource, SegmentedSource, Split, TaggedSource
from src.datamodules.sources.splits import of_each_class
from src.datamodules.views.view import View
from src.errors import SettingError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageDataModule(L.LightningDataModule):
    """One source, a view to train on and a view to evaluate with.

    ``batch_size`` is the batch of one optimizer step over all processes and micro-batches: the recipe stays the same on
    any hardware.

    Args:
        source: makes the source of a split, e.g. ``partial(ImageFolderSource, root=…)``.
        train_view: what a training sample becomes; its batch type must be the method's.
        eval_view: what a sample becomes for evaluation, an `ImageBatch`.
        batch_size: images per optimizer step.
        eval_batch_size: images per forward pass of an evaluation, in each process.
        seed: of order and augmentation.
        train_samples, eval_samples: use only so many (a fixed random choice; of an `OrderedSource` the first); None for
            all.
        train_shots: use only so many of each class, another choice with each seed; None for all.
        eval_split: what ``val_dataloader`` reads: "test" once everything is chosen.
        num_workers: loader processes; None for as many as the cores leave.
        mean, std: normalization, per channel, of values in [0, 1].
        max_bad_share: the run stops once more than this share of the samples seen had to be replaced.
        bad_log: file that lists what was replaced.
    """

    def __init__(
        self,
        *,
        source: Callable[[Split], ImageSource],
        train_view: View,
        eval_view: View,
        batch_size: int,
        eval_batch_size: int = 256,
        seed: int = 0,
        train_samples: int | None = None,
        eval_samples: int | None = None,
        train_shots: int | None = None,
        eval_split: Split = "val",
        num_workers: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        max_bad_share: float = 0.01,
        bad_log: str | Path | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("eval_batch_size", eval_batch_size, 1)):
            if not isinstance(value, int) or value < least:
                raise SettingError(f"data.{name} must be a whole number, at least {least}; got {value}")
        if num_workers is not None and num_workers < 0:
            raise SettingError(f"data.num_workers must be at least 0, or null for as many as fit; got {num_workers}")
        if eval_split not in ("val", "test"):
            raise SettingError(f"data.eval_split is val or test, not {eval_split!r}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise SettingError(f"data.mean and data.std are three numbers each, std above 0; got {mean} and {std}")
        self.make_source = source
        self.train_view = train_view
        self.eval_view = eval_view
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.train_samples = train_samples
        self.eval_samples = eval_samples
        self.train_shots = train_shots
        self.eval_split = eval_split
        self.num_workers = default_workers() if num_workers is None else num_workers
        self.mean = torch.tensor(tuple(mean)).view(3, 1, 1)
        self.std = torch.tensor(tuple(std)).view(3, 1, 1)
        self.max_bad_share = max_bad_share
        self.bad_log = Path(bad_log) if bad_log is not None else None

    @property
    def seen(self) -> str:
        """The field of a batch that encoders read."""
        return "image"

    @property
    def batch_type(self) -> type:
        """The TypedDict that ``train_dataloader`` yields once it is on the device.

        Raises:
            SettingError: a view needs more than an image.
        """
        for name, view in (("train_view", self.train_view), ("eval_view", self.eval_view)):
            if not hasattr(view, "encoded"):
                raise SettingError(
                    f"data.{name}: a {type(view).__name__} needs ground truth beside the picture, which data=scenes_… "
                    "and other annotated data have"
                )
        return self.train_view.batch_type

    @cached_property
    def train_source(self) -> ImageSource:
        return self.make_source("train")

    @cached_property
    def val_source(self) -> ImageSource:
        return self.make_source("val")

    @cached_property
    def test_source(self) -> ImageSource:
        return self.make_source("test")

    def source(self, split: Split) -> ImageSource:
        return self.test_source if split == "test" else self.val_source if split == "val" else self.train_source

    @property
    def classes(self) -> Sequence[str]:
        return self.train_source.classes

    def prepare_data(self) -> None:
        """Builds caches and downloads, in one process, before the others look."""
        self.train_source, self.source(self.eval_split)

    def train_dataloader(self) -> ResumableLoader:
        rank, world_size, micro_batches = self._launch()
        dataset = self._dataset(self.train_source, self.train_view, self.train_samples)
        sampler = TrainSampler(
            len(dataset),
            batch_size=self._samples("batch_size", self.train_view),
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            micro_batches=micro_batches,
            order=self.train_source.order if isinstance(self.train_source, OrderedSource) else None,
        )
        return ResumableLoader(dataset, sampler, num_workers=self.num_workers, pin_memory=torch.cuda.is_available())

    def val_dataloader(self, samples: int | None = None) -> DataLoader[dict[str, Tensor]]:
        """The validation split (or ``eval_split``) in the evaluation view, this process's share.

        Args:
            samples: at most so many, a fixed random choice.
        """
        limits = [limit for limit in (samples, self.eval_samples) if limit is not None]
        return self._eval_loader(self.source(self.eval_split), min(limits, default=None))

    def test_dataloader(self, samples: int | None = None) -> DataLoader[dict[str, Tensor]]:
        """As `val_dataloader`, of the test split: what nothing may be chosen by."""
        limits = [limit for limit in (samples, self.eval_samples) if limit is not None]
        return self._eval_loader(self.test_source, min(limits, default=None))

    def bank_dataloader(self, samples: int | None = None) -> DataLoader[dict[str, Tensor]]:
        """Training images in the evaluation view (what kNN looks up and probes learn from), this process's share.

        Args:
            samples: at most so many, a fixed random choice of those trained on.
        """
        limits = [limit for limit in (samples, self.train_samples) if limit is not None]
        return self._eval_loader(self.train_source, min(limits, default=None))

    def kind_shares(self, split: Split, index: Tensor) -> Tensor:
        """How much of each pixel of evaluation images shows what: float32 [B, 1 + K, H, W], background first, in
        [0, 1]. A mask goes through the evaluation view like its image, so it is cropped and resized alike.

        Args:
            split: where the images are from.
            index: their positions in the source, int64 [B].

        Raises:
            SettingError: the source knows no masks.
        """
        source = self.source(split)
        if not isinstance(source, SegmentedSource):
            raise SettingError(f"data.source: {type(source).__name__} has no masks; scenes have")
        kinds = torch.arange(1 + len(source.classes))[:, None, None]
        return torch.stack([self.as_viewed(source.segmentation(each) == kinds) for each in index.tolist()])

    def tags(self, split: Split, index: Tensor) -> Tensor:
        """Every class that images show: bool [B, K]; arguments as for `kind_shares`.

        Raises:
            SettingError: the source knows one class an image at most.
        """
        source = self.source(split)
        if not isinstance(source, TaggedSource):
            raise SettingError(f"data.source: {type(source).__name__} has no tags; scenes have")
        return torch.stack([source.tags(each) for each in index.tolist()])

    def as_seen(self, images: Tensor) -> Tensor:
        """Images as encoders read them: [B, 3, H, W], and of encoders of videos a clip in which nothing moves."""
        return images

    def as_viewed(self, masks: Tensor) -> Tensor:
        """Masks as the evaluation view shows their image: bool [K, H, W] -> how much of each pixel is covered,
        float32 [K, h, w] in [0, 1]."""
        pictures = (masks.to(torch.uint8) * 255)[:, None].expand(-1, 3, -1, -1).contiguous()
        no_numbers = np.zeros((len(pictures), self.eval_view.draws), np.float32)
        return self.eval_view.decoded(pictures, no_numbers)["image"][:, 0].to(torch.float32) / 255

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """uint8 images become normalized float32, or what the trainer's precision computes in, on the device."""
        batch = {name: self.normalize(value) if value.dtype == torch.uint8 else value for name, value in batch.items()}
        trainer: Any = self.trainer
        return batch if trainer is None else trainer.precision_plugin.convert_input(batch)

    def denormalize(self, image: Tensor) -> Tensor:
        """[..., 3, H, W] back to values in [0, 1], for images."""
        return (image * self.std.to(image) + self.mean.to(image)).clamp(0, 1)

    def normalize(self, image: Tensor) -> Tensor:
        """uint8 [..., 3, H, W] as methods see it: float32."""
        # in place: on a CPU a clip of 16 frames would else be written four times
        copy = image.to(torch.float32, copy=True)
        return copy.div_(255).sub_(self.mean.to(image.device)).div_(self.std.to(image.device))

    def _dataset(self, source: ImageSource, view: View, limit: int | None) -> ViewedDataset:
        return ViewedDataset(source, view, **self._of_all(source, limit))

    def _of_all(self, source: ImageSource, limit: int | None) -> dict[str, Any]:
        """What every dataset is given, whatever its samples are."""
        return {"seed": self.seed, "subset": self._subset(source, limit), "bad_log": self.bad_log}

    def _subset(self, source: ImageSource, limit: int | None) -> np.ndarray | None:
        if self.train_shots is not None and source is self.train_source:
            return self._shots(source, self.train_shots)[:limit]
        if limit is None or limit >= len(source):
            return None
        if isinstance(source, OrderedSource):
            return np.arange(limit)  # those that lie together
        # chosen without the run's seed: every seed of a comparison trains on the same images
        return np.sort(np.random.default_rng(len(source)).permutation(len(source))[:limit])

    def _shots(self, source: ImageSource, shots: int) -> np.ndarray:
        labels = getattr(source, "labels", None)
        if labels is None:
            raise SettingError(
                f"data.train_shots: {type(source).__name__} does not know its labels before it is read; films and "
                "scenes do with data.source.cache_dir"
            )
        known = np.unique(labels[labels >= 0], return_counts=True)
        fewest = int(known[1].min(initial=len(labels)))
        if shots < 1 or fewest < shots:
            raise SettingError(f"data.train_shots={shots}: there are {fewest} samples of a class, and 1 is the least")
        return of_each_class(np.asarray(labels), lambda _: shots, self.seed)

    def _eval_loader(self, source: ImageSource, limit: int | None) -> DataLoader[dict[str, Tensor]]:
        rank, world_size, _ = self._launch()
        dataset = self._dataset(source, self.eval_view, limit)
        batch_size = self._samples("eval_batch_size", self.eval_view)
        sampler = EvalSampler(len(dataset), batch_size=batch_size, rank=rank, world_size=world_size)
        return DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=self.num_workers)

    def _samples(self, key: str, view: View) -> int:
        """How many samples fill a batch of ``self.<key>`` rows."""
        return int(getattr(self, key))

    def _launch(self) -> tuple[int, int, int]:
        trainer: Any = self.trainer
        if trainer is None:
            return 0, 1, 1
        return trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches


def default_workers() -> int:
    """Loader processes for one training process: what the cores leave, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = max(1, torch.cuda.device_count())
    return max(0, min(8, cores // processes - 1))
