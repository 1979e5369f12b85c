"""Late interaction: images and texts are compared token by token, each token with its most similar counterpart.

Tokens are vectors of unit length; a token of zeros is padding. Padding is never the most similar token and does not
enter the mean. Token-by-token similarities are computed in chunks of rows (`in_row_chunks`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from src.models.functional import full_precision
from src.models.losses.contrastive import check_images, contrastive_loss
from src.models.losses.row_chunks import MAX_ENTRIES, in_row_chunks


@full_precision
def late_interaction(query: Tensor, keys: Tensor, *, max_entries: int = MAX_ENTRIES) -> Tensor:
    """FILIP's similarity (Yao et al., 2021): for every token of a query the greatest similarity with any token of a
    key, averaged over the query's tokens. It is not symmetric: images with texts differ from texts with images.

    Args:
        query: [Q, n, D].
        keys: [K, m, D]; each has at least one token that is not padding.

    Returns:
        [Q, K].
    """
    shared = [keys, _not_padding(keys)]
    return in_row_chunks(
        _late_interaction, [query], shared, columns=_entries_per_row(query, keys), max_entries=max_entries
    )


@full_precision
def late_interaction_loss(
    image: Tensor,
    text: Tensor,
    images: Tensor,
    texts: Tensor,
    offset: int,
    *,
    logit_scale: Tensor,
    text_hash: Tensor | None = None,
    max_entries: int = MAX_ENTRIES,
) -> Tensor:
    """FILIP's loss (Yao et al., 2021): CLIP's loss with `late_interaction` as the similarity, image to text in one
    direction and text to image in the other.

    Args:
        image: [B, n, D], tokens of this process's images.
        text: [B, l, D], tokens of this process's texts.
        images, texts: [N, n', D] and [N, l', D], of all processes; pair b is row ``offset + b``. They may hold fewer
            tokens (`select_tokens`).
        logit_scale: scalar, the inverse temperature.
        text_hash: see `clip_loss`.

    Raises:
        SettingError: one pair in all, which has no negative.
    """
    check_images(len(images))
    own = torch.arange(offset, offset + len(image), device=image.device)
    text_hash = torch.arange(len(texts), device=texts.device) if text_hash is None else text_hash

    def cross_entropy(
        own: Tensor, query: Tensor, keys: Tensor, not_padding: Tensor, text_hash: Tensor, logit_scale: Tensor
    ) -> Tensor:
        logits = logit_scale * _late_interaction(query, keys, not_padding)
        positive = own[:, None] == torch.arange(len(keys), device=keys.device)
        negatives = text_hash[own][:, None] != text_hash
        return contrastive_loss(logits, positive, positive | negatives)

    def all_rows(query: Tensor, keys: Tensor) -> Tensor:
        shared = [keys, _not_padding(keys), text_hash, logit_scale]
        columns = _entries_per_row(query, keys)
        return in_row_chunks(cross_entropy, [own, query], shared, columns=columns, max_entries=max_entries).mean()

    return (all_rows(image, texts) + all_rows(text, images)) / 2


def select_tokens(tokens: Tensor, others: Tensor, keep_ratio: float, *, max_entries: int = MAX_ENTRIES) -> Tensor:
    """Returns the tokens of each row that are most similar to any token of any of ``others``: [B, ceil(ratio * n), D].

    FILIP sends these to the other processes. The selection has no gradient, the selected tokens have one. Padding is
    selected last.

    Args:
        tokens: [B, n, D].
        others: [C, m, D], of the other modality.
        keep_ratio: share of the n tokens; 1 returns all of them in their order.
    """
    if keep_ratio == 1:
        return tokens
    count = math.ceil(keep_ratio * tokens.shape[1])
    index = _greatest_similarity(tokens, others, max_entries).topk(count, dim=1).indices
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


@torch.no_grad()
@full_precision
def _greatest_similarity(tokens: Tensor, others: Tensor, max_entries: int) -> Tensor:
    """Returns each token's greatest similarity with any token of ``others``, -inf for padding: [B, n]."""

    def greatest(token: Tensor, others: Tensor, not_padding: Tensor) -> Tensor:
        return (token @ others.T).masked_fill_(~not_padding, -torch.inf).amax(dim=1)

    token, others = tokens.flatten(0, 1), others.flatten(0, 1)
    similarity = in_row_chunks(
        greatest, [token], [others, _not_padding(others)], columns=len(others), max_entries=max_entries
    )
    return similarity.view(tokens.shape[:2]).masked_fill(~_not_padding(tokens), -torch.inf)


def _late_interaction(query: Tensor, keys: Tensor, not_padding: Tensor) -> Tensor:
    """[R, n, D], [K, m, D] and the keys' padding mask [K, m], False for padding -> [R, K]."""
    similarity = (query.flatten(0, 1) @ keys.flatten(0, 1).T).masked_fill_(~not_padding.flatten(), -torch.inf)
    greatest = similarity.view(*query.shape[:2], *keys.shape[:2]).max(dim=3).values
    counts = _not_padding(query).to(greatest.dtype)
    return torch.einsum("rnk,rn->rk", greatest, counts / counts.sum(dim=1, keepdim=True))


def _not_padding(tokens: Tensor) -> Tensor:
    """[B, n, D] -> bool [B, n], False for tokens of zeros."""
    return tokens.detach().any(dim=-1)


def _entries_per_row(query: Tensor, keys: Tensor) -> int:
    """Returns the number of token similarities that one row of the query has."""
    return query.shape[1] * keys.shape[0] * keys.shape[1]
