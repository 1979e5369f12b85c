"""The DataModule: one source, a view to train on, a view to evaluate with, and optional texts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from src.datamodules.batches.base import Field, ListField, fields_of
from src.datamodules.dataset import (
    EvalSampler,
    OrderedSource,
    ResumableLoader,
    TrainSampler,
    ViewedDataset,
    ignore_stop_signals,
)
from src.datamodules.extras.class_names import class_names, class_texts, read_class_names
from src.datamodules.extras.extras import Extras
from src.datamodules.sources.source import Source, Split
from src.datamodules.sources.splits import of_each_class
from src.datamodules.text.tokenizing import TokenizerSettings
from src.datamodules.views.video import VideoView
from src.datamodules.views.view import ImageView, View
from src.errors import SettingError

if TYPE_CHECKING:
    from src.datamodules.text.tokenizer import Tokenizer

# Keys of `data` that belong to a method: they stay as they are when a run is evaluated on other data, and are the
# experiment's own when an encoder is fine-tuned on the data of another run.
METHOD_KEYS = (
    "train_view",
    "batch_size",
    "tokenizer",
    "tokenizer_file",
    "tokenizer_from",
    "vocabulary",
    "text_length",
    "extras",
)
# Keys of `data` that an encoder was trained with, whatever data it is evaluated or fine-tuned on.
NORMALIZATION_KEYS = ("mean", "std", "channels")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@runtime_checkable
class SegmentedSource(Protocol):
    """A source that knows the class of each pixel."""

    classes: Sequence[str]

    def segmentation(self, index: int) -> Tensor:
        """Returns the mask of an image in its size, uint8 [H, W]: 0 for background, else 1 + class."""
        ...


@runtime_checkable
class TaggedSource(Protocol):
    """A source that knows all classes in its images, not only the one that is their label."""

    def tags(self, index: int) -> Tensor:
        """Returns which classes the image contains, bool [K], the same every time."""
        ...


class DataModule(L.LightningDataModule):
    """Makes batches of a source.

    The views decide what the batches are: images, clips, or images with ground truth.

    ``batch_size`` is the batch of one optimizer step over all processes and micro-batches, so a recipe stays the same
    on any hardware. It counts clips if the training view makes several of a video; fewer videos are then drawn for a
    step, and an epoch is still every video once. An evaluation batch holds whole videos.

    Args:
        source: makes the source of a split, e.g. ``partial(ImageFolderSource, root=…)``.
        train_view: turns training samples into rows of a batch; its batch type must be the method's.
        eval_view: turns samples into rows for evaluation.
        batch_size: images or clips of an optimizer step.
        eval_batch_size: images or clips of a forward pass in evaluation, in each process.
        seed: of order and augmentation.
        extras: texts of the samples, such as `Captions`; None for none.
        text_filter: drops samples of the training split by their texts, such as `TextFilter`; None for none. Evaluation
            data stays as it is.
        tokenizer: name of a tokenizer on the Hugging Face hub, or its folder; None to learn one from the training
        texts. tokenizer_file: where a learned tokenizer is stored, with the run. tokenizer_from: folder or checkpoint
        of another run, whose learned tokenizer is copied instead of learning one,
            for towers that start from that run.
        vocabulary: largest number of token ids, the size of the text tower's embedding.
        text_length: tokens of a text, start and end included.
        class_names: file with the names of the classes that prompts are made of, see `read_class_names`; None for the
            data's own.
        train_samples, eval_samples: number of samples used, a fixed random choice (of an `OrderedSource` the first);
            None for all.
        train_shots: number of training samples of each class, another choice with each seed; None for all.
        eval_split: split that ``val_dataloader`` reads; "test" once nothing is chosen by it any more.
        num_workers: loader processes; None for as many as the cores leave, at most 8.
        mean, std: normalization of each channel, for values in [0, 1].
        channels: of the images and videos that encoders read: 1 for grayscale, 3 for RGB, 4 for RGBA. Sources of
            decoded images, uint8 tensors, may have any number.
        white: value of white in image files of 16 bits, such as 4095 for values of 12 bits; None for 65535.
        max_bad_share: the run stops once more than this share of the samples had to be replaced.
        bad_log: file that lists replaced samples.

    Raises:
        SettingError: an argument is out of range, a view has an operator that needs RGB and ``channels`` are others, or
            extras lack both a tokenizer's name and a file for a learned one.
    """

    def __init__(
        self,
        *,
        source: Callable[[Split], Source],
        train_view: View,
        eval_view: View,
        batch_size: int,
        eval_batch_size: int = 256,
        seed: int = 0,
        extras: Extras | None = None,
        text_filter: Callable[[Source], Source] | None = None,
        tokenizer: str | None = None,
        tokenizer_file: str | Path | None = None,
        tokenizer_from: str | Path | None = None,
        vocabulary: int = 1024,
        text_length: int = 77,
        class_names: str | Path | None = None,
        train_samples: int | None = None,
        eval_samples: int | None = None,
        train_shots: int | None = None,
        eval_split: Split = "val",
        num_workers: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        channels: int = 3,
        white: int | None = None,
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
        if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
            raise SettingError(f"data.channels must be a whole number, at least 1; got {channels}")
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise SettingError(
                f"data.channels={channels}: data.mean and data.std need as many numbers, std above 0; got {list(mean)} "
                f"and {list(std)}" + (", ImageNet has data.mean=[0.449] data.std=[0.226]" if channels == 1 else "")
            )
        for limit_name, limit in (("train_samples", train_samples), ("eval_samples", eval_samples)):
            if limit is not None and (not isinstance(limit, int) or limit < 1):
                raise SettingError(f"data.{limit_name} must be at least 1, or null for all samples; got {limit}")
        for view in (train_view, eval_view):
            view.check_channels(channels)
        if extras is not None and tokenizer is None and tokenizer_file is None:
            raise SettingError("data.tokenizer: name a tokenizer, or set data.tokenizer_file to store a learned one")
        self.make_source = source
        self.train_view = train_view
        self.eval_view = eval_view
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.extras = extras
        self.text_filter = text_filter
        self.tokenizer_settings = TokenizerSettings(
            name=tokenizer,
            file=None if tokenizer_file is None else Path(tokenizer_file),
            other_run=None if tokenizer_from is None else Path(tokenizer_from),
            vocabulary=vocabulary,
            length=text_length,
        )
        self.class_names_file = None if class_names is None else Path(class_names)
        self.train_samples = train_samples
        self.eval_samples = eval_samples
        self.train_shots = train_shots
        self.eval_split = eval_split
        self.num_workers = default_workers() if num_workers is None else num_workers
        self.channels = channels
        self.white = white
        self.mean = torch.tensor(tuple(mean)).view(channels, 1, 1)
        self.std = torch.tensor(tuple(std)).view(channels, 1, 1)
        self.max_bad_share = max_bad_share
        self.bad_log = Path(bad_log) if bad_log is not None else None

    @property
    def input_key(self) -> Literal["image", "video"]:
        """Field of a batch that encoders read."""
        return _input_key(self.eval_view)

    @property
    def batch_type(self) -> type:
        """The TypedDict of training batches on the device.

        Raises:
            SettingError: the views do not go together, or not with the extras.
        """
        train, evaluation = self.train_view, self.eval_view
        if _input_key(train) != _input_key(evaluation):
            raise SettingError(
                f"data.train_view: {type(train).__name__} is a view of {_input_key(train)}s, but data.eval_view, "
                f"{type(evaluation).__name__}, is one of {_input_key(evaluation)}s: choose data of {_input_key(train)}s"
            )
        if train.fields and not evaluation.fields:
            raise SettingError(
                f"data.train_view: {type(train).__name__} needs the ground truth {', '.join(train.fields)}, and "
                f"data.eval_view, {type(evaluation).__name__}, reads none: choose annotated data such as data=scenes_…"
            )
        if evaluation.fields and not train.fields:
            raise SettingError(
                f"data.train_view: annotated data needs a view that also moves its ground truth, such as "
                f"{type(evaluation).__name__}, not {type(train).__name__}"
            )
        return train.batch_type if self.extras is None else self.extras.batch_type(train, evaluation)

    @cached_property
    def train_source(self) -> Source:
        source = self.make_source("train")
        source = source if self.text_filter is None else self.text_filter(source)
        if self.class_names_file is not None:
            source.class_names = read_class_names(self.class_names_file, source.classes)
        return source

    @cached_property
    def val_source(self) -> Source:
        return self.make_source("val")

    @cached_property
    def test_source(self) -> Source:
        return self.make_source("test")

    def source(self, split: Split) -> Source:
        return self.test_source if split == "test" else self.val_source if split == "val" else self.train_source

    @property
    def classes(self) -> Sequence[str]:
        """Class names by label; empty if there are none."""
        return self.train_source.classes

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in words, by label; see `src.datamodules.extras.class_names.class_names`."""
        return class_names(self.train_source)

    @property
    def mask_classes(self) -> Sequence[str]:
        """Names of the classes of segmentation masks.

        Raises:
            SettingError: the source has no segmentation masks.
        """
        if not self.train_source.mask_classes:
            raise SettingError(f"data.source: {type(self.train_source).__name__} has no classes of pixels")
        return self.train_source.mask_classes

    @property
    def held_out(self) -> Sequence[int]:
        """Labels of classes that the training split does not contain."""
        return self.train_source.held_out

    def class_texts(self, template: str | None = "{}") -> list[str]:
        """Returns the prompt of each class, by label; see `src.datamodules.extras.class_names.class_texts`."""
        return class_texts(self.train_source, template)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the texts, loaded or learned when it is first asked for.

        Raises:
            SettingError: there is none to load, and no extras whose texts one could be learned from.
        """
        extras = self.extras
        if extras is None and self.tokenizer_settings.name is None:
            raise SettingError(
                "data.extras: without texts no tokenizer can be learned; name extras: Captions for captions of images, "
                "ClassNames for a method that compares with the names of classes, or name a tokenizer in data.tokenizer"
            )
        settings = self.tokenizer_settings
        return settings.load(
            lambda: [] if extras is None else extras.vocabulary_texts(self.train_source, settings.samples)
        )

    def prepare_data(self) -> None:
        """Builds caches, downloads, and learns the tokenizer, in one process before the others read them."""
        self.train_source, self.source(self.eval_split)
        if self.extras is not None:
            self.tokenizer  # noqa: B018

    def train_dataloader(self) -> ResumableLoader:
        """Loads the training split in the training view, this process's share.

        Raises:
            SettingError: the source lacks what the view or the extras need, or the batch is no whole number of videos.
        """
        rank, world_size, micro_batches = self._launch()
        dataset = self._dataset(self.train_source, self.train_view, self.train_samples, self.extras)
        rows = self.train_view.rows
        if self.batch_size % rows:
            raise SettingError(
                f"data.batch_size={self.batch_size} clips are no whole number of videos with {rows} clips each "
                "(data.train_view.repeats)"
            )
        sampler = TrainSampler(
            len(dataset),
            batch_size=self.batch_size // rows,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            micro_batches=micro_batches,
            order=self.train_source.order if isinstance(self.train_source, OrderedSource) else None,
        )
        return ResumableLoader(dataset, sampler, num_workers=self.num_workers, pin_memory=torch.cuda.is_available())

    def val_dataloader(self, samples: int | None = None) -> DataLoader[dict[str, Any]]:
        """Loads the validation split (or ``eval_split``) in the evaluation view, this process's share.

        Args:
            samples: at most this many, a fixed random choice.
        """
        limits = [limit for limit in (samples, self.eval_samples) if limit is not None]
        return self._eval_loader(self.source(self.eval_split), min(limits, default=None))

    def test_dataloader(self, samples: int | None = None) -> DataLoader[dict[str, Any]]:
        """Loads the test split, by which nothing may be chosen; argument as for `val_dataloader`."""
        limits = [limit for limit in (samples, self.eval_samples) if limit is not None]
        return self._eval_loader(self.test_source, min(limits, default=None))

    def bank_dataloader(self, samples: int | None = None) -> DataLoader[dict[str, Any]]:
        """Loads training samples in the evaluation view, for kNN and probes, this process's share.

        Args:
            samples: at most this many, a fixed random choice of those trained on.
        """
        limits = [limit for limit in (samples, self.train_samples) if limit is not None]
        return self._eval_loader(self.train_source, min(limits, default=None))

    def class_shares(self, split: Split, index: Tensor) -> Tensor:
        """Returns the share of each class in each pixel of evaluation images: float32 [B, 1 + K, H, W] in [0, 1],
        background first. Masks are cropped and resized as their images are.

        Args:
            split: of the images.
            index: positions of the images in the source, int64 [B].

        Raises:
            SettingError: the source has no masks.
        """
        source = self.source(split)
        if not isinstance(source, SegmentedSource):
            raise SettingError(f"data.source: {type(source).__name__} has no masks; scenes have")
        classes = torch.arange(1 + len(source.classes))[:, None, None]
        return torch.stack([self.view_masks(source.segmentation(image) == classes) for image in index.tolist()])

    def tags(self, split: Split, index: Tensor) -> Tensor:
        """Returns all classes that images contain: bool [B, K]; arguments as for `class_shares`.

        Raises:
            SettingError: the source knows at most one class an image.
        """
        source = self.source(split)
        if not isinstance(source, TaggedSource):
            raise SettingError(
                f"data.source: {type(source).__name__} knows at most one class an image; scenes know all"
            )
        return torch.stack([source.tags(image) for image in index.tolist()])

    def as_input(self, images: Tensor) -> Tensor:
        """Returns images [B, C, H, W] as encoders read them: unchanged, or as clips [B, T, C, H, W] without motion."""
        if not isinstance(self.eval_view, VideoView):
            return images
        return images[:, None].expand(-1, self.eval_view.clip.frames, -1, -1, -1)

    def view_masks(self, masks: Tensor) -> Tensor:
        """Crops and resizes masks as the evaluation view does their image: bool [K, H, W] -> covered share of each
        pixel, float32 [K, h, w] in [0, 1].

        Raises:
            SettingError: the evaluation view is not one of images.
        """
        if not isinstance(self.eval_view, ImageView):
            raise SettingError(f"data.eval_view: masks need a view of images, not a {type(self.eval_view).__name__}")
        as_images = (masks.to(torch.uint8) * 255)[:, None].expand(-1, self.channels, -1, -1).contiguous()
        uniform = np.zeros((len(as_images), self.eval_view.num_uniforms), np.float32)
        return self.eval_view.from_decoded(as_images, uniform)["image"][:, 0].to(torch.float32) / 255

    def seconds_per_frame(self, index: int) -> float:
        """Returns the mean time between frames of the evaluation view's clip of validation video ``index``; of a clip
        of one frame the length of the video."""
        assert isinstance(self.eval_view, VideoView)
        video: Any = self.source(self.eval_split)[index]["image"]
        clip = self.eval_view.clip
        times = clip.times(video.duration, video.rate, np.full(clip.num_uniforms, 0.5))
        return float(np.diff(times).mean()) if len(times) > 1 else float(video.duration)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Brings a batch on the device to the dtypes of its type: uint8 images become normalized floats in the
        trainer's precision, uint8 classes int64, and exact fields stay float32."""
        return {name: self._as_declared(self._fields.get(name), value) for name, value in batch.items()}

    def denormalize(self, image: Tensor) -> Tensor:
        """Undoes `normalize`: [..., C, H, W] -> values in [0, 1]."""
        return (image * self.std.to(image) + self.mean.to(image)).clamp(0, 1)

    def normalize(self, image: Tensor) -> Tensor:
        """Normalizes uint8 images [..., C, H, W] to float32.

        Raises:
            SettingError: they have another number of channels than the DataModule.
        """
        if image.shape[-3] != self.channels:
            raise SettingError(f"data.channels is {self.channels}, and the images of a view have {image.shape[-3]}")
        # in place: on a CPU a clip of 16 frames would otherwise be written four times
        copy = image.to(torch.float32, copy=True)
        return copy.div_(255).sub_(self.mean.to(image.device)).div_(self.std.to(image.device))

    @cached_property
    def _fields(self) -> dict[str, Field | ListField]:
        return fields_of(self.eval_view.batch_type) | fields_of(self.train_view.batch_type)

    def _as_declared(self, declared: Field | ListField | None, value: Any) -> Any:
        if isinstance(value, list):
            field = declared.field if isinstance(declared, ListField) else None
            return [self._as_declared(field, part) for part in value]
        assert not isinstance(declared, ListField)
        if value.dtype == torch.uint8:
            # classes come from the loader in an eighth of their size
            value = value.long() if declared is not None and declared.dtype == torch.int64 else self.normalize(value)
        trainer: Any = self.trainer
        if trainer is None or (declared is not None and declared.exact):
            return value
        return trainer.precision_plugin.convert_input(value)

    def _dataset(self, source: Source, view: View, limit: int | None, extras: Extras | None) -> ViewedDataset:
        self._check(source, view, extras)
        subset = self._subset(source, limit)
        if subset is None and not len(source):
            raise SettingError(
                f"data.source: {type(source).__name__} has no sample in a split: check its files and "
                "data.source.val_share"
            )
        return ViewedDataset(
            source,
            view,
            seed=self.seed,
            extras=extras,
            tokenizer=None if extras is None else self.tokenizer,
            subset=subset,
            bad_log=self.bad_log,
            channels=self.channels,
            white=self.white,
        )

    def _check(self, source: Source, view: View, extras: Extras | None) -> None:
        """Checks that the source gives what the view and the extras read."""
        name = type(source).__name__
        if source.input_key != _input_key(view):
            raise SettingError(
                f"data.source: {name} holds {source.input_key}s, and {type(view).__name__} is a view of "
                f"{_input_key(view)}s"
            )
        missing = [field for field in view.fields if field not in source.fields]
        if missing:
            has = f"gives {', '.join(source.fields)}" if source.fields else "gives none"
            raise SettingError(
                f"data.source.fields: {type(view).__name__} needs the ground truth {', '.join(missing)}; {name} {has}"
            )
        if view.needs_flow and not source.has_flow:
            raise SettingError(
                f"data.train_view: {type(view).__name__} needs the optical flow of videos, which {name} does not have: "
                "choose data=films, or a source whose videos are FlowFilmReaders"
            )
        if extras is not None:
            extras.check(source)

    def _subset(self, source: Source, limit: int | None) -> np.ndarray | None:
        if self.train_shots is not None and source is self.train_source:
            return self._shots(source, self.train_shots)[:limit]
        if limit is None or limit >= len(source):
            return None
        if isinstance(source, OrderedSource):
            return np.arange(limit)  # samples that are stored together
        # independent of the run's seed: all seeds of a comparison train on the same images
        return np.sort(np.random.default_rng(len(source)).permutation(len(source))[:limit])

    def _shots(self, source: Source, shots: int) -> np.ndarray:
        labels = source.labels
        if labels is None:
            raise SettingError(
                f"data.train_shots: the labels of {type(source).__name__} are unknown before it is read; films and "
                "scenes know theirs with data.source.cache_dir"
            )
        counts = np.unique(labels[labels >= 0], return_counts=True)[1]
        fewest = int(counts.min(initial=len(labels)))
        if shots < 1 or fewest < shots:
            raise SettingError(
                f"data.train_shots={shots} must be at least 1 and at most {fewest}, the samples of the smallest class"
            )
        return of_each_class(np.asarray(labels), lambda _: shots, self.seed)

    def _eval_loader(self, source: Source, limit: int | None) -> DataLoader[dict[str, Any]]:
        rank, world_size, _ = self._launch()
        # zero-shot classification needs images and labels, but no texts of the images
        extras = self.extras if self.extras is not None and self.extras.available(source) else None
        dataset = self._dataset(source, self.eval_view, limit, extras)
        batch_size = max(1, self.eval_batch_size // self.eval_view.rows)
        sampler = EvalSampler(len(dataset), batch_size=batch_size, rank=rank, world_size=world_size)
        return DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=ignore_stop_signals,
        )

    def _launch(self) -> tuple[int, int, int]:
        trainer: Any = self.trainer
        if trainer is None:
            return 0, 1, 1
        return trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches


def default_workers() -> int:
    """Returns the loader processes for one training process: the cores it leaves, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = max(1, torch.cuda.device_count())
    return max(0, min(8, cores // processes - 1))


def _input_key(view: View) -> Literal["image", "video"]:
    return "video" if "video" in fields_of(view.batch_type) else "image"
