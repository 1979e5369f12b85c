"""A linear classifier on frozen features, solved to convergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from src.evaluation.features import FeatureSets
from src.randomness import fold

_EPS = 1e-6  # of the variance, as in MAE's affine-free batch norm
_CHUNK_ELEMENTS = 2**25  # logits held at once


@dataclass(frozen=True)
class LinearProbe:
    """Softmax regression on features standardised by the bank's mean and deviation.

    Minimises mean cross-entropy + l2 / 2 * |W|^2 (the bias is free) by full-batch L-BFGS: the problem is convex, so the
    result depends neither on an initialisation nor on a learning rate. ``l2`` is the one of the grid with the best
    top-1 on a held-out part of the bank (of equals the strongest); then the whole bank is fitted. Queries decide
    nothing. Reports ``linear_top1`` and ``linear_l2``.

    Args:
        l2: the grid.
        held_out: share of the bank that chooses among it.
        max_iterations: of L-BFGS, for each value of the grid.
        tolerance: largest gradient at which a fit counts as converged.
        seed: of the choice of what is held out.
    """

    l2: Sequence[float] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    held_out: float = 0.2
    max_iterations: int = 200
    tolerance: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.l2 or min(self.l2) <= 0:
            raise ValueError(f"LinearProbe: l2 must be a list of positive values, got {self.l2}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"LinearProbe: held_out must lie between 0 and 1, got {self.held_out}")

    @torch.no_grad()
    def __call__(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
        bank = sets.bank.features.to(device, torch.float32)
        deviation, mean = torch.var_mean(bank, dim=0, correction=0)
        deviation = (deviation + _EPS).sqrt()
        bank = (bank - mean) / deviation
        query = (sets.query.features.to(device, torch.float32) - mean) / deviation
        labels = sets.bank.labels.to(device)
        l2 = self._choose(bank, labels, sets.classes)
        weights = self.fit(bank, labels, sets.classes, l2)
        return {"linear_top1": _top1(weights, query, sets.query.labels.to(device)), "linear_l2": l2}

    def fit(self, features: Tensor, labels: Tensor, classes: int, l2: float, start: Tensor | None = None) -> Tensor:
        """The minimiser [D + 1, C], the last row being the bias; ``start`` only shortens the way there."""
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
            loss, weights.grad = _objective(weights, features, labels, l2)
            return loss

        optimizer.step(closure)
        return weights

    def _choose(self, bank: Tensor, labels: Tensor, classes: int) -> float:
        # from strong to weak, each fit starting where the last one ended
        grid = sorted(self.l2, reverse=True)
        if len(grid) == 1 or len(bank) < 2:
            return grid[0]
        order = np.random.default_rng(fold(self.seed, len(bank))).permutation(len(bank))
        count = min(max(1, round(self.held_out * len(bank))), len(bank) - 1)
        judged, fitted = (torch.from_numpy(np.sort(part)).to(bank.device) for part in np.split(order, [count]))
        features, classes_of = bank[fitted], labels[fitted]
        held_features, held_labels = bank[judged], labels[judged]
        weights, best, chosen = None, -1.0, grid[0]
        for l2 in grid:
            weights = self.fit(features, classes_of, classes, l2, start=weights)
            accuracy = _top1(weights, held_features, held_labels)
            if accuracy > best:
                best, chosen = accuracy, l2
        return chosen


def _objective(weights: Tensor, features: Tensor, labels: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Loss (scalar) and gradient [D + 1, C], a bounded number of logits at a time."""
    loss = 0.5 * l2 * weights[:-1].square().sum()
    gradient = torch.zeros_like(weights)
    gradient[:-1] = l2 * weights[:-1]
    rows = max(1, _CHUNK_ELEMENTS // weights.shape[1])
    for x, y in zip(features.split(rows), labels.split(rows), strict=True):
        logits = torch.addmm(weights[-1], x, weights[:-1])
        log_p = F.log_softmax(logits, dim=1)
        loss = loss + F.nll_loss(log_p, y, reduction="sum") / len(features)
        error = log_p.exp_()
        error[torch.arange(len(y), device=y.device), y] -= 1
        gradient[:-1].addmm_(x.T, error, alpha=1 / len(features))
        gradient[-1] += error.sum(dim=0) / len(features)
    return loss, gradient


def _top1(weights: Tensor, features: Tensor, labels: Tensor) -> float:
    rows = max(1, _CHUNK_ELEMENTS // weights.shape[1])
    predicted = torch.cat([torch.addmm(weights[-1], x, weights[:-1]).argmax(dim=1) for x in features.split(rows)])
    accuracy = multiclass_accuracy(
        predicted, labels, num_classes=weights.shape[1], average="micro", validate_args=False
    )
    return accuracy.item()
