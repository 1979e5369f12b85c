"""The metric of a claim: one number of an evaluation of a trained run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.utils import get_class

from src import runs
from src.datamodules.sources.source import Split
from src.errors import UserError, nearest
from src.evaluation.evaluation import value_of
from src.evaluation.subject import Subject
from src.evaluation_config import evaluation_of
from src.trained import RunSubject

KEYS = ("evaluation", "value", "encoder")


@dataclass(frozen=True)
class Logged:
    """Returns the last values that training logged, such as ``health/effective_rank``."""

    def __call__(self, subject: Subject) -> dict[str, float]:
        return dict(subject.logged)


@dataclass(frozen=True)
class Metric:
    """One number of a run.

    Args:
        evaluation: a name in configs/evaluation, or the ``_target_`` of an evaluation and its arguments.
        value: the name of the number, such as ``knn_top1``.
        encoder: of the method, such as ``teacher``; None for the first one.

    Raises:
        UserError: there is no evaluation of that name.
    """

    evaluation: str | Mapping[str, Any]
    value: str
    encoder: str | None = None

    @classmethod
    def parse(cls, spec: Mapping[str, Any]) -> Metric:
        """Returns the metric that ``metric:`` in a claim's file describes.

        Raises:
            UserError: a key is missing or not known.
        """
        for key in spec:
            if key not in KEYS:
                raise UserError(f"metric: there is no key '{key}'{nearest(str(key), KEYS)}")
        for key in ("evaluation", "value"):
            if not spec.get(key):
                raise UserError(f"missing value: metric.{key}")
        return cls(**spec)

    @property
    def untrained(self) -> bool:
        """True if an untrained network has this number too."""
        return not self._is_logged

    @property
    def splits(self) -> Sequence[Split]:
        """The splits that the number can be computed on."""
        if not self._is_logged:
            return ("test", "val")
        return ("val",) if self.value.startswith("eval/") else ("train",)

    def __call__(self, subject: RunSubject) -> float:
        """
        Raises:
            UserError: the evaluation is not applicable or does not report the number, or it is not finite.
        """
        evaluation = evaluation_of(subject.config, self.evaluation)
        return value_of(evaluation(subject.only(self.encoder)), self.value)

    @property
    def _is_logged(self) -> bool:
        return isinstance(self.evaluation, Mapping) and get_class(self.evaluation["_target_"]) is Logged


def subject_of(run: runs.Run, split: Split) -> RunSubject:
    """Returns a finished run with its last weights, since the best ones were chosen on the validation split, and with
    all images of its data."""
    return RunSubject(run.config(), run.last, split=split, logged=run.metrics().get("train", {}))
