"""Weighted nearest neighbors on frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from src.collectives import gather_rows, world_size
from src.evaluation.features import FeatureSets


@dataclass(frozen=True)
class KNN:
    """DINO's weighted kNN: the ``k`` nearest of the bank by cosine vote with weight exp(cosine / temperature).

    Where similarities tie the earlier sample of the bank is nearer, where votes tie the smaller class wins. A ``k``
    beyond the bank's size means the whole bank. A bank in shards stays where it is: each process finds the nearest of
    its own, and the nearest of all are chosen from these: the same neighbors, ties included.

    Reports ``knn_top1`` of the first ``k`` and ``knn<k>_top1`` of others.

    Args:
        k: one number of neighbors, or several.
        temperature: small ones give the nearest neighbors more say.
        query_chunk, bank_chunk: rows compared at a time; the largest matrix in memory is their product.
    """

    k: int | Sequence[int] = 20
    temperature: float = 0.07
    query_chunk: int = 512
    bank_chunk: int = 8192

    takes_shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"KNN: k must be at least 1, got {self.k}")
        if self.temperature <= 0:
            raise ValueError(f"KNN: temperature must be positive, got {self.temperature}")
        if min(self.query_chunk, self.bank_chunk) < 1:
            raise ValueError("KNN: query_chunk and bank_chunk must be at least 1")

    @property
    def ks(self) -> tuple[int, ...]:
        return (self.k,) if isinstance(self.k, int) else tuple(self.k)

    def __call__(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
        predicted = self.predict(sets, device)
        scores: dict[str, float] = {}
        for position, k in enumerate(self.ks):
            accuracy = multiclass_accuracy(
                predicted[k], sets.query.labels, num_classes=sets.classes, average="micro", validate_args=False
            )
            scores["knn_top1" if position == 0 else f"knn{k}_top1"] = accuracy.item()
        return scores

    @torch.no_grad()
    def predict(self, sets: FeatureSets, device: torch.device) -> dict[int, Tensor]:
        """The predicted class of each query by each k: int64 [n], on the CPU."""
        bank = F.normalize(sets.bank.features.to(device, torch.float32), dim=1)
        labels = sets.bank.labels.to(device)
        rows = None if sets.bank.rows is None else sets.bank.rows.to(device)
        predicted: dict[int, list[Tensor]] = {k: [] for k in self.ks}
        for features in sets.query.features.split(self.query_chunk):
            query = F.normalize(features.to(device, torch.float32), dim=1)
            similarity, neighbor = self._nearest(query, bank, max(self.ks))
            if rows is not None:
                similarity, neighbor = _merged(similarity, rows[neighbor], max(self.ks), len(labels))
            weight = ((similarity - similarity[:, :1]) / self.temperature).exp()  # a common factor leaves votes alone
            votes = similarity.new_zeros(len(query), sets.classes)
            for rank in range(similarity.shape[1]):
                # one neighbor at a time: the sum's order is fixed, also where scattering is not deterministic
                votes.scatter_add_(1, labels[neighbor[:, rank : rank + 1]], weight[:, rank : rank + 1])
                if rank + 1 in predicted:
                    predicted[rank + 1].append(votes.argmax(dim=1).cpu())
            for k in self.ks:
                if k > similarity.shape[1]:
                    predicted[k].append(votes.argmax(dim=1).cpu())
        return {k: torch.cat(parts) for k, parts in predicted.items()}

    def _nearest(self, query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Similarity and position of each query's k nearest, nearest first: [q, k] each."""
        best = query.new_empty(len(query), 0)
        where = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
        for begin in range(0, len(bank), self.bank_chunk):
            similarity, columns = _largest(query @ bank[begin : begin + self.bank_chunk].T, k)
            # columns stay in the order of the bank, which is what decides ties
            best, kept = _largest(torch.cat([best, similarity], dim=1), k)
            where = torch.cat([where, columns + begin], dim=1).gather(1, kept)
        best, order = best.sort(dim=1, descending=True, stable=True)
        return best, where.gather(1, order)


def _merged(similarity: Tensor, rows: Tensor, k: int, bank: int) -> tuple[Tensor, Tensor]:
    """The k nearest of what each process found, nearest first, of ties the first rows: [q, k'] each -> [q, k].

    Args:
        rows: of the whole bank, int64.
        bank: its size.
    """
    # a shard may be shorter than k, and another process's longer: what is missing is far away and behind all rows
    missing = min(k, bank) - similarity.shape[1]
    similarity, rows = F.pad(similarity, (0, missing), value=-torch.inf), F.pad(rows, (0, missing), value=bank)
    everyone = world_size()
    similarity, rows = (
        gather_rows(each).unflatten(0, (everyone, -1)).transpose(0, 1).flatten(1) for each in (similarity, rows)
    )
    rows, order = rows.sort(dim=1, stable=True)
    similarity, order = similarity.gather(1, order).sort(dim=1, descending=True, stable=True)
    return similarity[:, : min(k, bank)], rows.gather(1, order)[:, : min(k, bank)]


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (or all, if fewer) and their columns, in column order; of ties the first columns.

    ``topk`` alone may take any of several values that tie for the last place.
    """
    if values.shape[1] <= k:
        return values, torch.arange(values.shape[1], device=values.device).expand_as(values)
    top, columns = values.topk(k + 1, dim=1)
    tied = top[:, k] == top[:, k - 1]
    columns = columns[:, :k].sort(dim=1).values
    if tied.any():
        rows, last = values[tied], top[tied, k - 1 : k]
        above, level = rows > last, rows == last
        free = k - above.sum(dim=1, keepdim=True)
        chosen = above | (level & (level.cumsum(dim=1) <= free))
        columns[tied] = chosen.nonzero()[:, 1].view(-1, k)
    return values.gather(1, columns), columns
