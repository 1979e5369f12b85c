"""A linear classifier on frozen features, solved to convergence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from src.evaluation.features import FeatureSets, Pool
from src.randomness import fold

_EPS = 1e-6  # of the variance, as in MAE's affine-free batch norm
_CHUNK_ELEMENTS = 2**25  # logits held at once

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # logits [n, C], targets -> their sum, its gradient [n, C]
Judge = Callable[[Tensor, Tensor, Tensor], float]  # weights [D + 1, C], features [n, D], targets -> higher is better


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of classes that exclude each other: labels int64 [n]. A `Loss`."""
    log_p = F.log_softmax(logits, dim=1)
    loss = F.nll_loss(log_p, labels, reduction="sum")
    error = log_p.exp_()
    error[torch.arange(len(labels), device=labels.device), labels] -= 1
    return loss, error


@dataclass(frozen=True)
class LinearProbe:
    """Softmax regression on features standardized by the bank's mean and deviation.

    Minimizes mean cross-entropy + l2 / 2 * |W|^2 (the bias is free) by full-batch L-BFGS: the problem is convex, so the
    result depends neither on an initialization nor on a learning rate. ``l2``, and what of the features is classified,
    are those of the grid with the best top-1 on a held-out part of the bank (of equals the first pool and the strongest
    l2); then the whole bank is fitted. Queries decide nothing.

    With ``pools`` this is the grid that the linear protocols of MAE and DINO search, less the learning rates, which a
    converged fit does not have. All pools come from one pass over the data.

    Reports ``<name>_top1`` and ``<name>_l2``, and the chosen pool's position in the grid as ``<name>_pool``.

    Args:
        l2: the grid.
        held_out: share of the bank that chooses among it.
        max_iterations: of L-BFGS, for each value of the grid.
        tolerance: largest gradient at which a fit counts as converged.
        seed: of the choice of what is held out.
        pools: what of the features is tried, by name; None for what there is.
        name: what its numbers' names begin with.
    """

    l2: Sequence[float] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    held_out: float = 0.2
    max_iterations: int = 200
    tolerance: float = 1e-5
    seed: int = 0
    pools: Mapping[str, Pool] | None = None
    name: str = "linear"

    def __post_init__(self) -> None:
        if not self.l2 or min(self.l2) <= 0:
            raise ValueError(f"LinearProbe: l2 must be a list of positive values, got {self.l2}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"LinearProbe: held_out must lie between 0 and 1, got {self.held_out}")

    @torch.no_grad()
    def __call__(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
        tried = [sets] if not self.pools else [sets.pooled[name] for name in self.pools]
        labels, classes = sets.bank.labels.to(device), sets.classes
        best, pool, l2 = -1.0, 0, max(self.l2)
        for position, each in enumerate(tried):
            if len(tried) * len(self.l2) > 1:
                bank, _ = standardized(each, device)
                chosen, accuracy = self.choose(bank, labels, classes)
                if accuracy > best:
                    best, pool, l2 = accuracy, position, chosen
        bank, query = standardized(tried[pool], device)
        weights = self.fit(bank, labels, classes, l2)
        scores = {f"{self.name}_top1": _top1(weights, query, sets.query.labels.to(device)), f"{self.name}_l2": l2}
        return scores | ({f"{self.name}_pool": float(pool)} if self.pools else {})

    def fit(
        self,
        features: Tensor,
        targets: Tensor,
        classes: int,
        l2: float,
        start: Tensor | None = None,
        loss: Loss = cross_entropy,
    ) -> Tensor:
        """The minimizer [D + 1, C], the last row being the bias; ``start`` only shortens the way there."""
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
        judge: Judge | None = None,
    ) -> tuple[float, float]:
        """The l2 of the grid that does best on what is held out, and how well it does.

        Args:
            features: standardized, [n, D].
            targets: of the loss, [n] or [n, C].
            judge: top-1 where there is none.
        """
        # from strong to weak, each fit starting where the last one ended
        grid = sorted(self.l2, reverse=True)
        if len(features) < 2:
            return grid[0], 0.0
        order = np.random.default_rng(fold(self.seed, len(features))).permutation(len(features))
        count = min(max(1, round(self.held_out * len(features))), len(features) - 1)
        judged, fitted = (torch.from_numpy(np.sort(part)).to(features.device) for part in np.split(order, [count]))
        weights, best, chosen = None, -1.0, grid[0]
        for l2 in grid:
            weights = self.fit(features[fitted], targets[fitted], classes, l2, start=weights, loss=loss)
            found = (judge or _top1)(weights, features[judged], targets[judged])
            if found > best:
                best, chosen = found, l2
        return chosen, best


def standardized(sets: FeatureSets, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bank and queries less the bank's mean and over its deviation: float32 [n, D] and [m, D] on ``device``."""
    bank = sets.bank.features.to(device, torch.float32)
    deviation, mean = torch.var_mean(bank, dim=0, correction=0)
    deviation = (deviation + _EPS).sqrt()
    return (bank - mean) / deviation, (sets.query.features.to(device, torch.float32) - mean) / deviation


def logits_of(weights: Tensor, features: Tensor) -> Tensor:
    """[D + 1, C] and [n, D] -> [n, C]."""
    return torch.addmm(weights[-1], features, weights[:-1])


def _objective(weights: Tensor, features: Tensor, targets: Tensor, l2: float, loss_of: Loss) -> tuple[Tensor, Tensor]:
    """Loss (scalar) and gradient [D + 1, C], a bounded number of logits at a time."""
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
