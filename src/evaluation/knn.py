"""Weighted k-nearest-neighbor classification of frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from src.collectives import gather_rows, world_size
from src.errors import SettingError
from src.evaluation.evaluation import FeatureEvaluation
from src.evaluation.features import FeatureNeeds, FeatureSets


@dataclass(frozen=True)
class KNN(FeatureEvaluation):
    """DINO's weighted kNN: the ``k`` nearest of the bank by cosine vote with weight exp(cosine / temperature).

    Of equal similarities the earlier sample of the bank is nearer, of equal votes the smaller class wins. A ``k``
    beyond the size of the bank means the whole bank. Shards of a bank are not exchanged: each process finds the nearest
    in its own, and the nearest of all are chosen from these, which gives the same neighbors.

    Reports ``knn_top1`` of the first ``k`` and ``knn<k>_top1`` of others.

    Args:
        k: number of neighbors that vote, or several numbers.
        temperature: of the weights; a smaller one gives the nearest neighbors more weight.
        query_chunk, bank_chunk: rows compared at a time; the largest matrix in memory has query_chunk x bank_chunk
            elements.
    """

    k: int | Sequence[int] = 20
    temperature: float = 0.07
    query_chunk: int = 512
    bank_chunk: int = 8192

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise SettingError(f"KNN: k must be at least 1, got {self.k}")
        if self.temperature <= 0:
            raise SettingError(f"KNN: temperature must be positive, got {self.temperature}")
        if min(self.query_chunk, self.bank_chunk) < 1:
            raise SettingError("KNN: query_chunk and bank_chunk must be at least 1")

    @property
    def needs(self) -> FeatureNeeds:
        return FeatureNeeds(accepts_shards=True)

    @property
    def ks(self) -> tuple[int, ...]:
        return (self.k,) if isinstance(self.k, int) else tuple(self.k)

    def score(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
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
        """Predicts the class of each query, for each k: int64 [n], on the CPU."""
        bank = F.normalize(sets.bank.features.to(device, torch.float32), dim=1)
        labels = sets.bank.labels.to(device)
        rows = None if sets.bank.rows is None else sets.bank.rows.to(device)
        predicted: dict[int, list[Tensor]] = {k: [] for k in self.ks}
        for features in sets.query.features.split(self.query_chunk):
            query = F.normalize(features.to(device, torch.float32), dim=1)
            similarity, neighbor = self._nearest(query, bank, max(self.ks))
            if rows is not None:
                similarity, neighbor = _merged(similarity, rows[neighbor], max(self.ks), len(labels))
            weight = (
                (similarity - similarity[:, :1]) / self.temperature
            ).exp()  # a common factor does not change the winner
            votes = similarity.new_zeros(len(query), sets.classes)
            for rank in range(similarity.shape[1]):
                # one neighbor at a time, so that the order of the sum is fixed even if scatter_add_ is not
                # deterministic
                votes.scatter_add_(1, labels[neighbor[:, rank : rank + 1]], weight[:, rank : rank + 1])
                if rank + 1 in predicted:
                    predicted[rank + 1].append(votes.argmax(dim=1).cpu())
            for k in self.ks:
                if k > similarity.shape[1]:
                    predicted[k].append(votes.argmax(dim=1).cpu())
        return {k: torch.cat(parts) for k, parts in predicted.items()}

    def _nearest(self, query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Returns similarity and position of each query's k nearest, nearest first: [q, k] each."""
        best = query.new_empty(len(query), 0)
        position = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
        for begin in range(0, len(bank), self.bank_chunk):
            similarity, columns = _largest(query @ bank[begin : begin + self.bank_chunk].T, k)
            # columns stay in the order of the bank, so that the earlier of equal samples comes first
            best, chosen = _largest(torch.cat([best, similarity], dim=1), k)
            position = torch.cat([position, columns + begin], dim=1).gather(1, chosen)
        best, order = best.sort(dim=1, descending=True, stable=True)
        return best, position.gather(1, order)


def _merged(similarity: Tensor, rows: Tensor, k: int, bank: int) -> tuple[Tensor, Tensor]:
    """Returns the k nearest of those each process found, nearest first, of equal ones the first rows: [q, k'] each ->
    [q, k].

    Args:
        rows: positions in the whole bank, int64.
        bank: its size.
    """
    # a shard may be smaller than k, and that of another process larger: pad with entries behind all others
    missing = min(k, bank) - similarity.shape[1]
    similarity, rows = F.pad(similarity, (0, missing), value=-torch.inf), F.pad(rows, (0, missing), value=bank)
    processes = world_size()
    similarity, rows = (
        gather_rows(part).unflatten(0, (processes, -1)).transpose(0, 1).flatten(1) for part in (similarity, rows)
    )
    rows, order = rows.sort(dim=1, stable=True)
    similarity, order = similarity.gather(1, order).sort(dim=1, descending=True, stable=True)
    return similarity[:, : min(k, bank)], rows.gather(1, order)[:, : min(k, bank)]


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k largest of each row (or all, if fewer) and their columns, in column order; of equal values the
    first columns, where ``topk`` may take any.
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
