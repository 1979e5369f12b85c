"""The one protocol of evaluation: during training, afterwards, for claims and in the gauntlet."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Protocol

import torch

from src.collectives import gather_rows
from src.errors import UserError, nearest
from src.evaluation.features import FeatureNeeds, FeatureSets
from src.evaluation.subject import Subject, exact_products
from src.randomness import seeded


class Evaluation(Protocol):
    """Computes numbers of a `Subject`. A new one is a Python file and a YAML file ``configs/evaluation/<name>.yaml``,
    whose name `make evaluate EVAL=<name>`, online evaluation, claims and the gauntlet then know."""

    def __call__(self, subject: Subject) -> dict[str, float]:
        """Returns numbers by name, such as ``knn_top1``. All processes must call it, and all return the same.

        Raises:
            NotApplicable: the data or the method does not have what the evaluation needs.
            BadFeatures: features are NaN or infinite.
        """
        ...


class EncoderEvaluation(ABC):
    """An `Evaluation` of each encoder by itself."""

    @abstractmethod
    def by_encoder(self, subject: Subject) -> dict[str, dict[str, float]]:
        """Returns the numbers of each of ``subject.encoders``; errors as those of `Evaluation`."""

    def __call__(self, subject: Subject) -> dict[str, float]:
        return named(self.by_encoder(subject))


class FeatureEvaluation(EncoderEvaluation):
    """An `Evaluation` of the frozen features of a bank and of queries. Several of them share one pass over the data."""

    @property
    def needs(self) -> FeatureNeeds:
        """The features and labels that are read besides embeddings and class labels."""
        return FeatureNeeds()

    @abstractmethod
    def score(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
        """Returns the numbers of one encoder's features.

        Args:
            sets: features on the CPU.
            device: where to compute.
        """

    def by_encoder(self, subject: Subject) -> dict[str, dict[str, float]]:
        sets = subject.features(self.needs)
        return {name: score_exactly(self, of_encoder, subject.device) for name, of_encoder in sets.items()}


class Scorer(Protocol):
    """Computes numbers of features, as a `FeatureEvaluation` does."""

    def score(self, sets: FeatureSets, device: torch.device) -> dict[str, float]: ...


def score_exactly(scorer: Scorer, sets: FeatureSets, device: torch.device) -> dict[str, float]:
    """Returns the scorer's numbers, computed with exact products and without drawing from the generators of training;
    in all processes those of the first one."""
    with seeded(0), exact_products():
        return _of_first_process(scorer.score(sets, device), device)


def run_evaluations(subject: Subject, evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """Returns the numbers of all evaluations, whose features are read in one pass over the data."""
    subject.needs = joined_needs(evaluations)
    scores: dict[str, float] = {}
    for evaluation in evaluations:
        scores |= evaluation(subject)
    return scores


def joined_needs(evaluations: Sequence[Evaluation]) -> FeatureNeeds:
    """Returns what all of the evaluations read from one pass over the data.

    Raises:
        SettingError: two of them give one name to different readouts.
    """
    needs = (evaluation.needs for evaluation in evaluations if isinstance(evaluation, FeatureEvaluation))
    return reduce(or_, needs, FeatureNeeds())


def named(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns numbers by encoder as one mapping: those of the first encoder keep their names (``knn_top1``), those of
    others end in the encoder's (``knn_top1_teacher``)."""
    first = next(iter(scores), None)
    return {
        metric if encoder == first else f"{metric}_{encoder}": value
        for encoder, values in scores.items()
        for metric, value in values.items()
    }


def value_of(scores: Mapping[str, float], name: str) -> float:
    """Returns the number ``name`` of an evaluation.

    Raises:
        UserError: the evaluation does not report it, or it is not finite.
    """
    if scores.get(name) is None:
        raise UserError(f"the evaluation reports no '{name}'{nearest(name, list(scores))}")
    if not math.isfinite(scores[name]):
        raise UserError(f"{name} is not a finite number")
    return float(scores[name])


def _of_first_process(scores: dict[str, float], device: torch.device) -> dict[str, float]:
    """Returns the first process's numbers in all processes, so that decisions based on them are the same."""
    if not scores:
        return scores
    dtype = torch.float32 if device.type == "mps" else torch.float64
    values = gather_rows(torch.tensor([list(scores.values())], dtype=dtype, device=device))[0]
    return dict(zip(scores, values.tolist(), strict=True))
