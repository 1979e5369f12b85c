"""Finding what belongs together: images by texts and texts by images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from src.evaluation.comparison import Similarity, dot
from src.models.losses.precision import full_precision


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
