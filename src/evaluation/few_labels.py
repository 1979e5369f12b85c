"""How far a few labels go: a fixed number of each class, or a share of the bank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import scipy.stats
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from src.datamodules.sources.splits import of_each_class
from src.errors import SettingError
from src.evaluation.features import FeatureSet, FeatureSets, Pool
from src.evaluation.linear import LinearProbe
from src.randomness import fold


@dataclass(frozen=True)
class FewShot:
    """``n`` samples of each class of the bank, ``trials`` times anew, judged on all queries.

    Two classifiers: the nearest class mean by cosine, of features of unit length, and logistic regression on features
    standardized by the few. Reports ``fewshot<n>_nearest_top1`` and ``fewshot<n>_logistic_top1``, means over trials,
    and each with the half width of its 95 % confidence interval (Student's t over trials), ``…_ci95``.

    Args:
        shots: numbers of samples a class.
        trials: choices of samples, at least two; those of more shots hold those of fewer.
        l2: of the regression, fixed: there is nothing to hold out.
        seed: of the choices.

    Raises:
        SettingError: a class has fewer samples in the bank than ``n``.
    """

    shots: Sequence[int] = (1, 5, 10)
    trials: int = 5
    l2: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.shots or min(self.shots) < 1 or self.trials < 2 or self.l2 <= 0:
            raise ValueError(
                f"FewShot: shots of at least 1, two trials or more and l2 above 0 are needed; got {self.shots}, "
                f"{self.trials} and {self.l2}"
            )

    @torch.no_grad()
    def __call__(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
        known = torch.cat([sets.bank.labels, sets.query.labels]).unique()
        counts = torch.bincount(sets.bank.labels, minlength=sets.classes)[known]
        scores: dict[str, float] = {}
        for shots in self.shots:
            if int(counts.min()) < shots:
                raise SettingError(
                    f"fewshot: the bank has {int(counts.min())} samples of class {int(known[counts.argmin()])} and "
                    f"{shots} are asked for: raise evaluate.bank_samples, or lower "
                    "evaluate.evaluators.fewshot.shots"
                )
            found = [self._trial(sets, shots, trial, device) for trial in range(self.trials)]
            for name in ("nearest", "logistic"):
                mean, half = interval([each[name] for each in found])
                scores |= {f"fewshot{shots}_{name}_top1": mean, f"fewshot{shots}_{name}_top1_ci95": half}
        return scores

    def _trial(self, sets: FeatureSets, shots: int, trial: int, device: torch.device) -> dict[str, float]:
        few = sets.learning_from(_rows(sets.bank.labels, lambda _: shots, fold(self.seed, trial)))
        predicted = nearest_mean(few.bank, few.query.features, sets.classes, device)
        right = multiclass_accuracy(
            predicted, sets.query.labels, num_classes=sets.classes, average="micro", validate_args=False
        )
        return {"nearest": right.item(), "logistic": LinearProbe(l2=[self.l2])(few, device)["linear_top1"]}


@dataclass(frozen=True)
class LowShot:
    """A linear probe that learns from a share of the bank: of each class the share of its samples, at least one.

    Of 1 % and 10 % of a training split only with the whole of it for a bank: ``evaluate.bank_samples=null``. Reports
    ``lowshot<percent>_top1``.

    Args:
        percent: of the bank.
        probe: how it learns; what it holds out is of the share.
        seed: of the choice; a larger share holds the smaller.
    """

    percent: Sequence[float] = (1, 10)
    probe: LinearProbe = field(default_factory=LinearProbe)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.percent or not 0 < min(self.percent) <= max(self.percent) <= 100:
            raise ValueError(f"LowShot: percent must lie in (0, 100], got {self.percent}")

    @property
    def pools(self) -> Mapping[str, Pool] | None:
        return self.probe.pools

    def __call__(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
        scores = {}
        for percent in self.percent:
            rows = _rows(sets.bank.labels, partial(_share, percent), self.seed)
            top1 = self.probe(sets.learning_from(rows), device)[f"{self.probe.name}_top1"]
            scores[f"lowshot{percent:g}_top1"] = top1
        return scores


def _rows(labels: Tensor, wanted: Callable[[int], int], seed: int) -> Tensor:
    return torch.from_numpy(of_each_class(labels.cpu().numpy(), wanted, seed))


def _share(percent: float, count: int) -> int:
    return max(1, round(percent / 100 * count))


def nearest_mean(bank: FeatureSet, query: Tensor, classes: int, device: torch.device) -> Tensor:
    """The class whose mean is nearest by cosine, all features of unit length: [m, D] -> int64 [m], on the CPU; of ties
    the smaller class, and never one without a sample."""
    features, labels = F.normalize(bank.features.to(device, torch.float32), dim=1), bank.labels.to(device)
    total = features.new_zeros(classes, features.shape[1])
    for name in labels.unique():  # a class at a time: the order of the sum is fixed on every device
        total[name] = features[labels == name].sum(dim=0)
    similarity = F.normalize(query.to(device, torch.float32), dim=1) @ F.normalize(total, dim=1).T
    absent = torch.bincount(labels, minlength=classes) == 0
    return similarity.masked_fill(absent, -torch.inf).argmax(dim=1).cpu()


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of at least two values, and the half width of its 95 % confidence interval by Student's t."""
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(scipy.stats.t.ppf(0.975, len(values) - 1)) * error
