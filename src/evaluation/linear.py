"""Linear classification of frozen features, solved to convergence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from src.errors import SettingError
from src.evaluation.evaluation import FeatureEvaluation
from src.evaluation.features import FeatureNeeds, FeatureReadout, FeatureSets
from src.randomness import fold

_EPS = 1e-6  # of the variance, as in MAE's affine-free batch norm
_CHUNK_ELEMENTS = 2**25  # logits held at once

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # logits [n, C], targets -> sum over n, its gradient [n, C]
Accuracy = Callable[[Tensor, Tensor, Tensor], float]  # weights [D + 1, C], features [n, D], targets -> accuracy


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the `Loss` of classes of which each sample has one: labels int64 [n]."""
    log_p = F.log_softmax(logits, dim=1)
    loss = F.nll_loss(log_p, labels, reduction="sum")
    error = log_p.exp_()
    error[torch.arange(len(labels), device=labels.device), labels] -= 1
    return loss, error


@dataclass(frozen=True)
class LinearProbe(FeatureEvaluation):
    """Softmax regression on features standardized by mean and standard deviation of the bank.

    Minimizes mean cross-entropy + l2 / 2 * |W|^2 (the bias is not regularized) by full-batch L-BFGS: the problem is
    convex, so the result depends neither on an initialization nor on a learning rate. ``l2`` and the readout are chosen
    by the top-1 on a held-out part of the bank (of equals the first readout and the strongest l2); then the whole bank
    is fitted. Queries are used for the reported accuracy only.

    With ``readouts`` this is the grid that the linear protocols of MAE and DINO search, without the learning rates,
    which a converged fit does not have. All readouts come from one pass over the data.

    Reports ``<name>_top1`` and ``<name>_l2``, and the position of the chosen readout in the grid as ``<name>_pool``.

    Args:
        l2: the grid of weight decays.
        held_out: share of the bank by which they are chosen.
        max_iterations: of L-BFGS, for each value of the grid.
        tolerance: largest gradient at which a fit counts as converged.
        seed: of the choice of the held-out part.
        readouts: vectors that are tried, by name; None for the embedding.
        name: prefix of the names of its numbers.
    """

    l2: Sequence[float] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    held_out: float = 0.2
    max_iterations: int = 200
    tolerance: float = 1e-5
    seed: int = 0
    readouts: Mapping[str, FeatureReadout] | None = None
    name: str = "linear"

    def __post_init__(self) -> None:
        if not self.l2 or min(self.l2) <= 0:
            raise SettingError(f"LinearProbe: l2 must be a list of positive values, got {self.l2}")
        if not 0 < self.held_out < 1:
            raise SettingError(f"LinearProbe: held_out must lie between 0 and 1, got {self.held_out}")

    @property
    def needs(self) -> FeatureNeeds:
        return FeatureNeeds(readouts=self.readouts or {})

    @torch.no_grad()
    def score(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
        candidates = [sets] if not self.readouts else [sets.readouts[name] for name in self.readouts]
        labels, classes = sets.bank.labels.to(device), sets.classes
        best, readout, l2 = -1.0, 0, max(self.l2)
        for position, candidate in enumerate(candidates):
            if len(candidates) * len(self.l2) > 1:
                bank, _ = standardized(candidate, device)
                chosen, accuracy = self.choose(bank, labels, classes)
                if accuracy > best:
                    best, readout, l2 = accuracy, position, chosen
        bank, query = standardized(candidates[readout], device)
        weights = self.fit(bank, labels, classes, l2)
        scores = {f"{self.name}_top1": _top1(weights, query, sets.query.labels.to(device)), f"{self.name}_l2": l2}
        return scores | ({f"{self.name}_pool": float(readout)} if self.readouts else {})

    def fit(
        self,
        features: Tensor,
        targets: Tensor,
        classes: int,
        l2: float,
        start: Tensor | None = None,
        loss: Loss = cross_entropy,
    ) -> Tensor:
        """Returns the minimizer [D + 1, C], whose last row is the bias.

        Args:
            features: standardized, [n, D].
            targets: of the loss, [n] or [n, C].
            start: weights to start from, which saves iterations; None for zeros.
        """
        shape = (features.shape[1] + 1, classes)
        weights = torch.zeros(shape, device=features.device) if start is None else start.clone()
        optimizer = torch.optim.LBFGS(
            [weights],
            max_iter=self.max_iterations,
            tolerance_grad=self.tolerance,
            tolerance_change=0.0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            value, weights.grad = _objective(weights, features, targets, l2, loss)
            return value

        optimizer.step(closure)
        return weights

    def choose(
        self,
        features: Tensor,
        targets: Tensor,
        classes: int,
        loss: Loss = cross_entropy,
        accuracy: Accuracy | None = None,
    ) -> tuple[float, float]:
        """Returns the l2 of the grid with the best accuracy on the held-out part, and that accuracy.

        Args:
            features: standardized, [n, D].
            targets: of the loss, [n] or [n, C].
            accuracy: None for top-1.
        """
        # from strong to weak, each fit starting from the last one
        grid = sorted(self.l2, reverse=True)
        if len(features) < 2:
            return grid[0], 0.0
        order = np.random.default_rng(fold(self.seed, len(features))).permutation(len(features))
        count = min(max(1, round(self.held_out * len(features))), len(features) - 1)
        held_out, fitted = (torch.from_numpy(np.sort(part)).to(features.device) for part in np.split(order, [count]))
        weights, best, chosen = None, -1.0, grid[0]
        for l2 in grid:
            weights = self.fit(features[fitted], targets[fitted], classes, l2, start=weights, loss=loss)
            value = (accuracy or _top1)(weights, features[held_out], targets[held_out])
            if value > best:
                best, chosen = value, l2
        return chosen, best


def standardized(sets: FeatureSets, device: torch.device) -> tuple[Tensor, Tensor]:
    """Standardizes bank and queries by mean and standard deviation of the bank: float32 [n, D] and [m, D], on
    ``device``."""
    bank = sets.bank.features.to(device, torch.float32)
    variance, mean = torch.var_mean(bank, dim=0, correction=0)
    std = (variance + _EPS).sqrt()
    return (bank - mean) / std, (sets.query.features.to(device, torch.float32) - mean) / std


def logits_of(weights: Tensor, features: Tensor) -> Tensor:
    """Computes logits [n, C] from weights [D + 1, C] and features [n, D]."""
    return torch.addmm(weights[-1], features, weights[:-1])


def _objective(weights: Tensor, features: Tensor, targets: Tensor, l2: float, loss_of: Loss) -> tuple[Tensor, Tensor]:
    """Computes loss (scalar) and gradient [D + 1, C], a bounded number of logits at a time."""
    loss = 0.5 * l2 * weights[:-1].square().sum()
    gradient = torch.zeros_like(weights)
    gradient[:-1] = l2 * weights[:-1]
    rows = max(1, _CHUNK_ELEMENTS // weights.shape[1])
    for x, y in zip(features.split(rows), targets.split(rows), strict=True):
        value, error = loss_of(logits_of(weights, x), y)
        loss = loss + value / len(features)
        gradient[:-1].addmm_(x.T, error, alpha=1 / len(features))
        gradient[-1] += error.sum(dim=0) / len(features)
    return loss, gradient


def _top1(weights: Tensor, features: Tensor, labels: Tensor) -> float:
    rows = max(1, _CHUNK_ELEMENTS // weights.shape[1])
    predicted = torch.cat([logits_of(weights, x).argmax(dim=1) for x in features.split(rows)])
    accuracy = multiclass_accuracy(
        predicted, labels, num_classes=weights.shape[1], average="micro", validate_args=False
    )
    return accuracy.item()
