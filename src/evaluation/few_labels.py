"""Classification from few labels: a fixed number of each class, or a share of the bank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from src.datamodules.sources.splits import of_each_class
from src.errors import SettingError
from src.evaluation.errors import NotApplicable
from src.evaluation.evaluation import FeatureEvaluation
from src.evaluation.features import FeatureNeeds, FeatureSet, FeatureSets
from src.evaluation.linear import LinearProbe
from src.randomness import fold


@dataclass(frozen=True)
class FewShot(FeatureEvaluation):
    """Learns from ``n`` samples of each class of the bank and classifies all queries, in several trials.

    There are two classifiers: the nearest class mean by cosine, of features of unit length, and logistic regression on
    features standardized by the few samples. Reports ``fewshot<n>_nearest_top1`` and ``fewshot<n>_logistic_top1``,
    means over trials, and for each the half width of its 95 % confidence interval (Student's t over trials),
    ``…_ci95``.

    Args:
        shots: numbers n of samples of each class.
        trials: number of random choices of samples, at least two; in a trial, more shots include those of fewer.
        l2: weight decay of the regression, fixed, as there are too few samples to hold some out.
        seed: of the choices.

    Raises:
        NotApplicable: a class has fewer samples in the bank than ``n``.
    """

    shots: Sequence[int] = (1, 5, 10)
    trials: int = 5
    l2: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.shots or min(self.shots) < 1 or self.trials < 2 or self.l2 <= 0:
            raise SettingError(
                f"FewShot: shots of at least 1, at least two trials and l2 above 0 are needed; got {self.shots}, "
                f"{self.trials} and {self.l2}"
            )

    @torch.no_grad()
    def score(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
        labels = torch.cat([sets.bank.labels, sets.query.labels]).unique()
        counts = torch.bincount(sets.bank.labels, minlength=sets.classes)[labels]
        scores: dict[str, float] = {}
        for shots in self.shots:
            if int(counts.min()) < shots:
                raise NotApplicable(
                    f"the bank has {int(counts.min())} samples of class {int(labels[counts.argmin()])} where "
                    f"{shots} are needed: raise evaluate.bank_samples, or lower evaluation.fewshot.shots"
                )
            accuracies = [self._trial(sets, shots, trial, device) for trial in range(self.trials)]
            for name in ("nearest", "logistic"):
                mean, half = interval([accuracy[name] for accuracy in accuracies])
                scores |= {f"fewshot{shots}_{name}_top1": mean, f"fewshot{shots}_{name}_top1_ci95": half}
        return scores

    def _trial(self, sets: FeatureSets, shots: int, trial: int, device: torch.device) -> dict[str, float]:
        few = sets.learning_from(_rows(sets.bank.labels, lambda _: shots, fold(self.seed, trial)))
        predicted = nearest_mean(few.bank, few.query.features, sets.classes, device)
        nearest = multiclass_accuracy(
            predicted, sets.query.labels, num_classes=sets.classes, average="micro", validate_args=False
        )
        return {"nearest": nearest.item(), "logistic": LinearProbe(l2=[self.l2]).score(few, device)["linear_top1"]}


@dataclass(frozen=True)
class LowShot(FeatureEvaluation):
    """Fits a linear probe to a share of the bank: of each class that share of its samples, at least one.

    These are 1 % and 10 % of the training split only if all of it is the bank: ``evaluate.bank_samples=null``. Reports
    ``lowshot<percent>_top1``.

    Args:
        percent: shares of the bank, in percent.
        probe: the linear probe; it holds out a part of the share.
        seed: of the choice; a larger share includes the smaller ones.
    """

    percent: Sequence[float] = (1, 10)
    probe: LinearProbe = field(default_factory=LinearProbe)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.percent or not 0 < min(self.percent) <= max(self.percent) <= 100:
            raise SettingError(f"LowShot: percent must lie in (0, 100], got {self.percent}")

    @property
    def needs(self) -> FeatureNeeds:
        return self.probe.needs

    def score(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
        scores = {}
        for percent in self.percent:
            rows = _rows(sets.bank.labels, partial(_share, percent), self.seed)
            top1 = self.probe.score(sets.learning_from(rows), device)[f"{self.probe.name}_top1"]
            scores[f"lowshot{percent:g}_top1"] = top1
        return scores


def _rows(labels: Tensor, count: Callable[[int], int], seed: int) -> Tensor:
    return torch.from_numpy(of_each_class(labels.cpu().numpy(), count, seed))


def _share(percent: float, count: int) -> int:
    return max(1, round(percent / 100 * count))


def nearest_mean(bank: FeatureSet, query: Tensor, classes: int, device: torch.device) -> Tensor:
    """Predicts the class whose mean is nearest by cosine, all features of unit length: [m, D] -> int64 [m], on the CPU;
    of equal classes the smaller one, and never one without a sample."""
    features, labels = F.normalize(bank.features.to(device, torch.float32), dim=1), bank.labels.to(device)
    total = features.new_zeros(classes, features.shape[1])
    for label in labels.unique():  # a class at a time, so that the order of the sum is fixed on every device
        total[label] = features[labels == label].sum(dim=0)
    similarity = F.normalize(query.to(device, torch.float32), dim=1) @ F.normalize(total, dim=1).T
    absent = torch.bincount(labels, minlength=classes) == 0
    return similarity.masked_fill(absent, -torch.inf).argmax(dim=1).cpu()


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean of at least two values, and the half width of its 95 % confidence interval by Student's t."""
    import scipy.stats

    return float(np.mean(values)), float(scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values))
