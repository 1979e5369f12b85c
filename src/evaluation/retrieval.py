"""Finding what belongs together: images by texts, texts by images, and images by others of their class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from src.errors import SettingError
from src.evaluation.features import FeatureSets
from src.evaluation.similarity import Similarity, dot
from src.models.functional import full_precision


def retrieval(
    image: Tensor,
    text: Tensor,
    owner: Tensor,
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 512,
    similarity: Similarity = dot,
) -> dict[str, float]:
    """Recall both ways as papers report it: of an image's texts any within the first K of all texts (``i2t``), of a
    text its one image (``t2i``), and the sum of all six.

    Args:
        image: [N, D], unit length.
        text: [M, D], unit length, several an image.
        owner: int64 [M], the row of ``image`` that a text belongs to.
        chunk: queries compared at a time.
        similarity: of images with texts and of texts with images; where it is a method's own, ``image`` and ``text``
            are what the method encodes them as.

    Raises:
        ValueError: an image without a text, or a text of an image that is not there.
    """
    rows = torch.arange(len(image), device=image.device)
    if not torch.equal(owner.unique(), rows):
        raise ValueError("retrieval: every image needs a text, and every text belongs to one of the images")
    found = {
        "i2t": ranks(image, text, rows, owner, chunk=chunk, similarity=similarity),
        "t2i": ranks(text, image, owner, rows, chunk=chunk, similarity=similarity),
    }
    recalls = {f"{way}_r{k}": (rank < k).double().mean().item() for way, rank in found.items() for k in ks}
    return {**recalls, "rsum": 100 * sum(recalls.values())}


@torch.no_grad()
@full_precision
def ranks(
    query: Tensor,
    keys: Tensor,
    query_owner: Tensor,
    key_owner: Tensor,
    *,
    chunk: int = 512,
    similarity: Similarity = dot,
) -> Tensor:
    """How many keys of others come before the first of a query's own: int64 [Q]. A tied key that stands earlier comes
    before, so that a model which says the same of everything is as good as chance and not perfect."""
    columns, found = torch.arange(len(keys), device=keys.device), []
    for rows, owners in zip(query.split(chunk), query_owner.split(chunk), strict=True):
        scores, own = similarity(rows, keys), owners[:, None] == key_owner
        mine = scores.masked_fill(~own, -torch.inf)
        best = mine.argmax(dim=1, keepdim=True)
        level = mine.gather(1, best)
        before = (scores > level) | ((scores == level) & (columns < best))
        found.append((before & ~own).sum(dim=1))
    return torch.cat(found)


@dataclass(frozen=True)
class Instances:
    """Image retrieval: every query looks for samples of its class, by the cosine of the features.

    Reports ``instances_map``, the mean over queries of average precision over the whole ranking, and
    ``instances_r<k>``, the share of queries with a sample of their class among the first k. Of ties the sample that
    stands earlier comes first. Queries to whose class nothing else belongs are left out.

    Args:
        among_queries: look among the other queries, as is usual where classes are judged that nothing was trained on,
            instead of in the bank; a query does not find itself.
        ks: of the recalls.
        chunk: queries compared at a time.

    Raises:
        SettingError: no query has anything to find.
    """

    among_queries: bool = False
    ks: Sequence[int] = (1, 5, 10)
    chunk: int = 256

    def __call__(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
        found_in = sets.query if self.among_queries else sets.bank
        precision, before = ranking(
            *(F.normalize(each.features.to(device, torch.float32), dim=1) for each in (sets.query, found_in)),
            *(each.labels.to(device) for each in (sets.query, found_in)),
            itself=found_in is sets.query,
            chunk=self.chunk,
        )
        judged = before >= 0
        if not judged.any():
            raise SettingError("instances: no query has a sample of its class to find")
        recalls = {f"instances_r{k}": (before[judged] < k).float().mean().item() for k in self.ks}
        return {"instances_map": precision[judged].mean().item(), **recalls}


@torch.no_grad()
@full_precision
def ranking(
    query: Tensor, keys: Tensor, query_owner: Tensor, key_owner: Tensor, *, itself: bool = False, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """Average precision of each query's ranking of all keys by `dot`, float32 [Q], and as `ranks` the number of others'
    keys before the first own, int64 [Q]; 0 and -1 of a query that owns none. Of ties the earlier key comes first.

    Args:
        query, keys: [Q, D] and [K, D].
        query_owner, key_owner: int64 [Q] and [K]; what has the query's owner is its own.
        itself: key i is query i, which does not find itself.
        chunk: queries compared at a time.
    """
    precisions, first, begin = [], [], 0
    places = torch.arange(1, len(keys) + 1, device=keys.device)
    for rows, owners in zip(query.split(chunk), query_owner.split(chunk), strict=True):
        scores, own = dot(rows, keys), owners[:, None] == key_owner
        if itself:
            mine = torch.arange(len(rows), device=rows.device)
            scores[mine, begin + mine], own[mine, begin + mine] = -torch.inf, False  # at the end, and of no use there
        own = own.gather(1, scores.argsort(dim=1, descending=True, stable=True))
        hits = own.cumsum(dim=1)
        precisions.append((own * (hits / places)).sum(dim=1) / hits[:, -1].clamp(min=1))
        first.append(torch.where(hits[:, -1] > 0, own.int().argmax(dim=1), -1))
        begin += len(rows)
    return torch.cat(precisions), torch.cat(first)
