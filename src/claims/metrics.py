"""What a claim can be judged by: anything that makes one number of a trained run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Protocol, cast

import torch
from omegaconf import DictConfig
from torch import nn

from src import configuration, evaluate, runs, trained
from src.configuration import UserError, nearest
from src.datamodules.image import ImageDataModule
from src.datamodules.image_text import ImageTextDataModule
from src.datamodules.sources.source import Split
from src.errors import SettingError
from src.evaluation.features import FeatureSets
from src.evaluation.image_text import ImageTextEvaluation
from src.evaluation.localisation import Localisation
from src.evaluation.patch_knn import BANK_IMAGES, BANK_PATCHES, QUERY_IMAGES, PatchKNN, PatchSegmentation
from src.evaluation.run import EncoderEvaluation, Evaluator, feature_sets, score
from src.models.pretrain_module import PretrainModule

HELD_OUT: tuple[Split, ...] = ("test", "val")


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, and where it is to be judged.

    Args:
        run: its folder.
        split: what is judged on.
    """

    run: runs.Run
    split: Split

    @cached_property
    def config(self) -> DictConfig:
        return self.run.config()

    @cached_property
    def module(self) -> PretrainModule:
        """With the last weights: the best ones were chosen by their score on the validation split."""
        return trained.load(self.config, self.run.last).to(self.device)

    @cached_property
    def datamodule(self) -> ImageDataModule:
        datamodule: ImageDataModule = configuration.instantiate(self.config.data)
        datamodule.prepare_data()
        return datamodule

    @property
    def device(self) -> torch.device:
        return evaluate.device_of(self.config)

    @property
    def precision(self) -> str:
        return evaluate.precision_of(self.config, self.device)

    def encoder(self, name: str | None = None) -> nn.Module:
        """By name; None for the one a user would take away.

        Raises:
            UserError: the method has no such encoder.
        """
        encoders = self.module.encoders()
        if name is not None and name not in encoders:
            raise UserError(f"{type(self.module).__name__} has no encoder '{name}'{nearest(name, list(encoders))}")
        return next(iter(encoders.values())) if name is None else encoders[name]


class Metric(Protocol):
    """One number of a trained run."""

    @property
    def splits(self) -> Sequence[Split]:
        """What it can judge on."""
        ...

    def __call__(self, trained: TrainedRun) -> float: ...


@dataclass(frozen=True)
class Logged:
    """The last value of what training logged, such as ``health/effective_rank``.

    Args:
        name: as in the run's ``metrics.json``.

    Raises:
        UserError: it was not logged, or is not finite.
    """

    name: str

    @property
    def splits(self) -> Sequence[Split]:
        return ("val",) if self.name.startswith("eval/") else ("train",)

    def __call__(self, trained: TrainedRun) -> float:
        logged = trained.run.metrics().get("train", {})
        if self.name not in logged:
            raise UserError(f"training logged no '{self.name}'{nearest(self.name, list(logged))}")
        return _finite(self.name, logged[self.name])


@dataclass(frozen=True)
class OnEmbeddings:
    """An evaluator's number for image embeddings: the bank is the whole training split.

    Args:
        evaluator: such as `KNN` or `LinearProbe`.
        name: which of its numbers, such as ``knn_top1``.
        encoder: None for the first.
    """

    evaluator: Evaluator
    name: str
    encoder: str | None = None
    splits: ClassVar[Sequence[Split]] = HELD_OUT

    def __call__(self, trained: TrainedRun) -> float:
        sets = feature_sets(
            {"encoder": trained.encoder(self.encoder)},
            trained.datamodule,
            trained.device,
            bank_samples=None,
            query_samples=None,
            split=trained.split,
            precision=trained.precision,
            evaluators=[self.evaluator],
        )
        return _of(self.evaluator, sets, self.name, trained.device)


@dataclass(frozen=True)
class OnPatches:
    """An evaluator's number for patches, whose classes come from the scenes' masks; see `patch_sets`.

    Args:
        evaluator: of rows of features.
        name: which of its numbers.
        encoder: None for the first.
    """

    evaluator: Evaluator = field(default_factory=PatchKNN)
    name: str = "patch_miou"
    encoder: str | None = None
    bank_images: int = BANK_IMAGES
    query_images: int = QUERY_IMAGES
    bank_patches: int = BANK_PATCHES
    splits: ClassVar[Sequence[Split]] = HELD_OUT

    def __call__(self, trained: TrainedRun) -> float:
        evaluation = PatchSegmentation(
            self.evaluator,
            bank_images=self.bank_images,
            query_images=self.query_images,
            bank_patches=self.bank_patches,
        )
        return OnEncoder(evaluation, self.name, self.encoder)(trained)


@dataclass(frozen=True)
class OnEncoder:
    """A number of what judges an encoder by more than embeddings.

    Args:
        evaluation: such as `PatchSegmentation` or `LabelPropagation`.
        name: which of its numbers, such as ``labelpropagation_jf``.
        encoder: None for the first.
    """

    evaluation: EncoderEvaluation
    name: str
    encoder: str | None = None
    splits: ClassVar[Sequence[Split]] = HELD_OUT

    def __call__(self, trained: TrainedRun) -> float:
        encoders = {"encoder": trained.encoder(self.encoder)}
        scores = self.evaluation(
            encoders, trained.datamodule, trained.device, split=trained.split, precision=trained.precision
        )
        return _named(self.evaluation, scores["encoder"], self.name)


@dataclass(frozen=True)
class ImageText:
    """A number of an `ImageTextEvaluation`, or a `Localisation`, for a method with two towers.

    Args:
        name: which of its numbers, such as ``zeroshot_top1`` or ``retrieval_rsum``.
        evaluation: what is asked, of every image of the split unless it says otherwise; the split is the claim's.

    Raises:
        UserError: the method has no two towers, or the evaluation reports no such number.
    """

    name: str
    evaluation: ImageTextEvaluation | Localisation = field(default_factory=lambda: ImageTextEvaluation(samples=None))
    splits: ClassVar[Sequence[Split]] = HELD_OUT

    def __call__(self, trained: TrainedRun) -> float:
        evaluation = replace(self.evaluation, split=trained.split)
        datamodule = cast(ImageTextDataModule, trained.datamodule)
        try:
            scores = evaluation(trained.module, datamodule, trained.device, precision=trained.precision)
        except SettingError as problem:
            raise UserError(str(problem)) from problem
        return _named(self.evaluation, scores, self.name)


def _of(evaluator: Evaluator, sets: dict[str, FeatureSets], name: str, device: torch.device) -> float:
    return _named(evaluator, score(sets, [evaluator], device), name)


def _named(judge: object, scores: Mapping[str, float], name: str) -> float:
    if name not in scores:
        raise UserError(f"{type(judge).__name__} reports no '{name}'{nearest(name, list(scores))}")
    return _finite(name, scores[name])


def _finite(name: str, value: float | None) -> float:
    if value is None or not math.isfinite(value):
        raise UserError(f"{name} is not a finite number")
    return float(value)
