"""The metric of a claim: one number of an evaluation of a trained run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.utils import get_class

from src import runs
from src.datamodules.sources.source import Split
from src.evaluation.evaluation import joined_needs, value_of
from src.evaluation.subject import Subject
from src.evaluation_config import evaluation_of
from src.trained import RunSubject


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

    @property
    def _is_logged(self) -> bool:
        return isinstance(self.evaluation, Mapping) and get_class(self.evaluation["_target_"]) is Logged


def values_of(specs: Mapping[str, Mapping[str, Any]], subject: RunSubject) -> dict[str, float]:
    """Returns the numbers of a run, by name of the metric. Those of one encoder share its features.

    Args:
        specs: see `Claim.metrics_of`.

    Raises:
        UserError: an evaluation is not applicable or does not report the number, or it is not finite.
    """
    metrics = {name: Metric(**spec) for name, spec in specs.items()}
    evaluations = {name: evaluation_of(subject.config, metric.evaluation) for name, metric in metrics.items()}
    values = {}
    for encoder in {metric.encoder: None for metric in metrics.values()}:
        of_encoder = subject.only(encoder)
        names = [name for name, metric in metrics.items() if metric.encoder == encoder]
        of_encoder.needs = joined_needs([evaluations[name] for name in names])
        for name in names:
            values[name] = value_of(evaluations[name](of_encoder), metrics[name].value)
    return {name: values[name] for name in metrics}


def subject_of(run: runs.Run, split: Split) -> RunSubject:
    """Returns a finished run with its last weights, since the best ones were chosen on the validation split, and with
    all images of its data."""
    return RunSubject(run.config(), run.last, split=split, logged=run.metrics().get("train", {}))
