"""Retrieval: of images by texts, of texts by images, and of images by others of their class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from src.errors import SettingError
from src.evaluation.errors import BadFeatures, NotApplicable
from src.evaluation.evaluation import FeatureEvaluation
from src.evaluation.features import FeatureSets
from src.evaluation.image_text import encoded_captions, encoded_images, encoding
from src.evaluation.similarity import Rows, Similarity, count_rows, dot, similarity_of, split_rows
from src.evaluation.subject import Subject
from src.models.functional import full_precision


@dataclass(frozen=True)
class Retrieval:
    """Retrieves captions by images and images by captions, among all images of the split. Reports
    ``retrieval_i2t_r1`` … ``retrieval_rsum``, see `retrieval`."""

    def __call__(self, subject: Subject) -> dict[str, float]:
        captions, images = encoded_captions(subject), encoded_images(subject)
        with encoding(subject):
            recalls = retrieval(images.rows, captions.rows, captions.image, similarity=similarity_of(subject.module))
        return {f"retrieval_{name}": value for name, value in recalls.items()}


def retrieval(
    image: Rows,
    text: Rows,
    owner: Tensor,
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 512,
    similarity: Similarity = dot,
) -> dict[str, float]:
    """Returns recall in both directions as papers report it: ``i2t_r<k>``, the share of images with any of their texts
    among the first k of all texts, ``t2i_r<k>``, the share of texts with their image among the first k of all images,
    and ``rsum``, the sum of all of them in percent.

    Args:
        image: N encoded images, [N, D] of unit length unless the similarity is a method's own.
        text: M encoded texts, likewise; an image may have several.
        owner: int64 [M], the row of ``image`` that a text belongs to.
        ks: the numbers k.
        chunk: queries compared at a time, which bounds memory.
        similarity: of images with texts and of texts with images.

    Raises:
        SettingError: an image has no text, or a text belongs to none of the images.
        BadFeatures: see `ranks`.
    """
    rows = torch.arange(count_rows(image), device=owner.device)
    if not torch.equal(owner.unique(), rows):
        raise SettingError("retrieval: every image needs a text, and every text belongs to one of the images")
    ranks_by_direction = {
        "i2t": ranks(image, text, rows, owner, chunk=chunk, similarity=similarity),
        "t2i": ranks(text, image, owner, rows, chunk=chunk, similarity=similarity),
    }
    recalls = {f"{way}_r{k}": (rank < k).double().mean().item() for way, rank in ranks_by_direction.items() for k in ks}
    return {**recalls, "rsum": 100 * sum(recalls.values())}


@torch.no_grad()
@full_precision
def ranks(
    query: Rows,
    keys: Rows,
    query_owner: Tensor,
    key_owner: Tensor,
    *,
    chunk: int = 512,
    similarity: Similarity = dot,
) -> Tensor:
    """Returns the number of other samples' keys that come before the first of a query's own: int64 [Q]. Of equal
    similarities the earlier key comes first, so that a constant similarity is at chance and not perfect.

    Args:
        query, keys: Q and K rows.
        query_owner, key_owner: int64 [Q] and [K]; keys with the query's owner are its own.
        chunk: queries compared at a time.
        similarity: of queries and keys.

    Raises:
        BadFeatures: similarities are NaN or infinite.
    """
    columns, parts = torch.arange(count_rows(keys), device=key_owner.device), []
    for rows, owners in zip(split_rows(query, chunk), query_owner.split(chunk), strict=True):
        scores, own = similarity(rows, keys), owners[:, None] == key_owner
        if not torch.isfinite(scores).all():
            raise BadFeatures("similarities of images and texts are NaN or infinite")
        own_scores = scores.masked_fill(~own, -torch.inf)
        best = own_scores.argmax(dim=1, keepdim=True)
        best_score = own_scores.gather(1, best)
        # counts the keys that are not behind, as `within` does
        behind = (scores < best_score) | ((scores == best_score) & (columns >= best))
        parts.append((~behind & ~own).sum(dim=1))
    return torch.cat(parts)


@dataclass(frozen=True)
class Instances(FeatureEvaluation):
    """Retrieves images of a query's class by the cosine of the features.

    Reports ``instances_map``, the mean over queries of average precision over the whole ranking, and
    ``instances_r<k>``, the share of queries with a sample of their class among the first k. Of equal similarities the
    earlier sample comes first. Queries without another sample of their class are left out.

    Args:
        among_queries: search among the other queries instead of the bank, as is usual for classes that were not
            trained on; a query does not find itself.
        ks: the numbers k of the recalls.
        chunk: queries compared at a time, which bounds memory.

    Raises:
        NotApplicable: no query has another sample of its class.
    """

    among_queries: bool = False
    ks: Sequence[int] = (1, 5, 10)
    chunk: int = 256

    def score(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
        gallery = sets.query if self.among_queries else sets.bank
        precision, before = ranking(
            *(F.normalize(part.features.to(device, torch.float32), dim=1) for part in (sets.query, gallery)),
            *(part.labels.to(device) for part in (sets.query, gallery)),
            itself=gallery is sets.query,
            chunk=self.chunk,
        )
        answerable = before >= 0
        if not answerable.any():
            raise NotApplicable("no query has another sample of its class to find")
        recalls = {f"instances_r{k}": (before[answerable] < k).float().mean().item() for k in self.ks}
        return {"instances_map": precision[answerable].mean().item(), **recalls}


@torch.no_grad()
@full_precision
def ranking(
    query: Tensor, keys: Tensor, query_owner: Tensor, key_owner: Tensor, *, itself: bool = False, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """Ranks all keys of each query by `dot`. Returns the average precision, float32 [Q], and as `ranks` the number of
    other samples' keys before the first own one, int64 [Q]; 0 and -1 for a query without own keys. Of equal
    similarities the earlier key comes first.

    Args:
        query, keys: [Q, D] and [K, D].
        query_owner, key_owner: int64 [Q] and [K]; keys with the query's owner are its own.
        itself: key i is query i, which does not find itself.
        chunk: queries compared at a time.
    """
    precisions, first, begin = [], [], 0
    places = torch.arange(1, len(keys) + 1, device=keys.device)
    for rows, owners in zip(query.split(chunk), query_owner.split(chunk), strict=True):
        scores, own = dot(rows, keys), owners[:, None] == key_owner
        if itself:
            number = torch.arange(len(rows), device=rows.device)
            scores[number, begin + number], own[number, begin + number] = -torch.inf, False  # last, and not its own
        own = own.gather(1, scores.argsort(dim=1, descending=True, stable=True))
        hits = own.cumsum(dim=1)
        precisions.append((own * (hits / places)).sum(dim=1) / hits[:, -1].clamp(min=1))
        first.append(torch.where(hits[:, -1] > 0, own.int().argmax(dim=1), -1))
        begin += len(rows)
    return torch.cat(precisions), torch.cat(first)
