"""What a claim can be judged by: anything that makes one number of a trained run."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol, cast

import torch
from omegaconf import DictConfig
from torch import nn

from src import configuration, evaluate, runs, trained
from src.datamodules.datamodule import DataModule
from src.datamodules.sources.source import Split
from src.errors import SettingError, UserError, nearest
from src.evaluation.features import FeatureSets
from src.evaluation.image_text import ImageTextEvaluation
from src.evaluation.localization import Localization
from src.evaluation.patch_knn import BANK_IMAGES, BANK_PATCHES, QUERY_IMAGES, PatchKNN, PatchSegmentation
from src.evaluation.run import EncoderEvaluation, Evaluator, feature_sets, score
from src.models.pretrain_module import PretrainModule

HELD_OUT: tuple[Split, ...] = ("test", "val")


@dataclass(frozen=True)
class Subject:
    """A method with its weights, and the data to judge it on.

    Args:
        config: its run's.
        split: what is judged on.
        checkpoint: its weights; None for those before its first step, which are its floor.
        logged: the last values that training logged.
    """

    config: DictConfig
    split: Split
    checkpoint: Path | None = None
    logged: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, run: runs.Run, split: Split) -> Subject:
        """A finished run, with its last weights: the best ones were chosen by their score on the validation split."""
        return cls(run.config(), split, run.last, run.metrics().get("train", {}))

    @cached_property
    def module(self) -> PretrainModule:
        loaded = trained.fresh(self.config) if self.checkpoint is None else trained.load(self.config, self.checkpoint)
        return loaded.to(self.device)

    @cached_property
    def datamodule(self) -> DataModule:
        datamodule: DataModule = configuration.instantiate(self.config.data)
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

    @property
    def untrained(self) -> bool:
        """Whether it says something of a network before its first step as well."""
        ...

    def __call__(self, subject: Subject) -> float: ...


@dataclass(frozen=True)
class Logged:
    """The last value of what training logged, such as ``health/effective_rank``.

    Args:
        name: as in the run's ``metrics.json``.

    Raises:
        UserError: it was not logged, or is not finite.
    """

    name: str
    untrained: ClassVar[bool] = False

    @property
    def splits(self) -> Sequence[Split]:
        return ("val",) if self.name.startswith("eval/") else ("train",)

    def __call__(self, subject: Subject) -> float:
        logged = subject.logged
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
    untrained: ClassVar[bool] = True

    def __call__(self, subject: Subject) -> float:
        sets = feature_sets(
            {"encoder": subject.encoder(self.encoder)},
            subject.datamodule,
            subject.device,
            bank_samples=None,
            query_samples=None,
            split=subject.split,
            precision=subject.precision,
            evaluators=[self.evaluator],
        )
        return _of(self.evaluator, sets, self.name, subject.device)


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
    untrained: ClassVar[bool] = True

    def __call__(self, subject: Subject) -> float:
        evaluation = PatchSegmentation(
            self.evaluator,
            bank_images=self.bank_images,
            query_images=self.query_images,
            bank_patches=self.bank_patches,
        )
        return OnEncoder(evaluation, self.name, self.encoder)(subject)


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
    untrained: ClassVar[bool] = True

    def __call__(self, subject: Subject) -> float:
        encoders = {"encoder": subject.encoder(self.encoder)}
        scores = self.evaluation(
            encoders, subject.datamodule, subject.device, split=subject.split, precision=subject.precision
        )
        return _named(self.evaluation, scores["encoder"], self.name)


@dataclass(frozen=True)
class FineTuned:
    """The last value of what an experiment logs that goes on from the first encoder, as `make evaluate EVAL=finetune`
    does; the untrained one begins anew.

    Args:
        experiment: such as ``finetune_vitb``.
        name: such as ``eval/top1``.
        overrides: of its recipe.
    """

    experiment: str
    name: str = "eval/top1"
    overrides: Sequence[str] = ()
    splits: ClassVar[Sequence[Split]] = HELD_OUT
    untrained: ClassVar[bool] = True

    def __call__(self, subject: Subject) -> float:
        recipe = evaluate.finetune_config(
            subject.config, subject.checkpoint, self.overrides, experiment=self.experiment, split=subject.split
        )
        with tempfile.TemporaryDirectory() as folder:
            return _finite(self.name, evaluate.fine_tuned(recipe, Path(folder), self.name))


@dataclass(frozen=True)
class ImageText:
    """A number of an `ImageTextEvaluation`, or a `Localization`, for a method with two towers.

    Args:
        name: which of its numbers, such as ``zeroshot_top1`` or ``retrieval_rsum``.
        evaluation: what is asked, of every image of the split unless it says otherwise; the split is the claim's.

    Raises:
        UserError: the method has no two towers, or the evaluation reports no such number.
    """

    name: str
    evaluation: ImageTextEvaluation | Localization = field(default_factory=lambda: ImageTextEvaluation(samples=None))
    splits: ClassVar[Sequence[Split]] = HELD_OUT
    untrained: ClassVar[bool] = True

    def __call__(self, subject: Subject) -> float:
        evaluation = replace(self.evaluation, split=subject.split)
        datamodule = cast(DataModule, subject.datamodule)
        try:
            scores = evaluation(subject.module, datamodule, subject.device, precision=subject.precision)
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
