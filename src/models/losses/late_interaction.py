"""Late interaction: images and texts are compared token by token, each token with the one that suits it best.

Tokens are vectors of unit length. A token of zeros is padding: it stands for nothing, is found by nothing and does not
count. Similarities of tokens with tokens are made, used and thrown away for some rows at a time, so that memory grows
with the number of pairs in the batch and not with its square.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from src.models.functional import full_precision
from src.models.losses.blocks import BLOCK, by_rows
from src.models.losses.contrastive import check_one, contrast


@full_precision
def late_interaction(query: Tensor, keys: Tensor, *, block: int = BLOCK) -> Tensor:
    """FILIP's similarity (Yao et al., 2021): every token of a query takes the best of a key's tokens, and what they
    take is averaged. Of images with texts it is another number than of texts with images.

    Args:
        query: [Q, n, D].
        keys: [K, m, D]; each with one token at least that is no padding.

    Returns:
        [Q, K].
    """
    return by_rows(_best, [query], [keys, _real(keys)], columns=_columns(query, keys), block=block)


@full_precision
def late_interaction_loss(
    image: Tensor,
    text: Tensor,
    images: Tensor,
    texts: Tensor,
    offset: int,
    *,
    scale: Tensor,
    same: Tensor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """FILIP's loss (Yao et al., 2021): each image is to recognize its text among all texts by `late_interaction`, and
    each text its image among all images, by its own.

    Args:
        image: [B, n, D], tokens of the own images.
        text: [B, l, D], tokens of the own texts.
        images, texts: [N, n', D] and [N, l', D], of all processes: ``images, offset = gather(image)``; they may hold
            fewer tokens (`salient`).
        scale: scalar, the inverse temperature.
        same: int64 [N], one number for all pairs whose texts are equal, which are no negatives of each other.

    Raises:
        SettingError: one pair in all.
    """
    to_text = _recognize(image, texts, offset, scale, same, block)
    to_image = _recognize(text, images, offset, scale, same, block)
    return (to_text + to_image) / 2


def salient(tokens: Tensor, others: Tensor, share: float, *, block: int = BLOCK) -> Tensor:
    """The tokens of each row that are most like any token of any of ``others``: [B, ceil(share * n), D].

    What FILIP sends to other processes. The choice carries no gradient, what is chosen does. Filling is chosen last.

    Args:
        tokens: [B, n, D].
        others: [C, m, D], of the other kind.
        share: of the n tokens; 1 takes all, in their order.
    """
    if share == 1:
        return tokens
    found = _saliency(tokens, others, block).topk(math.ceil(share * tokens.shape[1]), dim=1).indices
    return tokens.gather(1, found[:, :, None].expand(-1, -1, tokens.shape[2]))


@torch.no_grad()
@full_precision
def _saliency(tokens: Tensor, others: Tensor, block: int) -> Tensor:
    """Each token's greatest similarity, -inf for padding: [B, n]."""
    flat = others.flatten(0, 1)

    def rows(token: Tensor, others: Tensor, real: Tensor) -> Tensor:
        return (token @ others.T).masked_fill_(~real, -torch.inf).amax(dim=1)

    greatest = by_rows(rows, [tokens.flatten(0, 1)], [flat, _real(flat)], columns=len(flat), block=block)
    return greatest.view(tokens.shape[:2]).masked_fill(~_real(tokens), -torch.inf)


def _recognize(query: Tensor, keys: Tensor, offset: int, scale: Tensor, same: Tensor | None, block: int) -> Tensor:
    check_one(len(keys))
    same = torch.arange(len(keys), device=keys.device) if same is None else same

    def rows(own: Tensor, query: Tensor, keys: Tensor, real: Tensor, same: Tensor, scale: Tensor) -> Tensor:
        itself = own[:, None] == torch.arange(len(keys), device=keys.device)
        return contrast(scale * _best(query, keys, real), itself, itself | (same[own][:, None] != same))

    own = torch.arange(offset, offset + len(query), device=query.device)
    shared = [keys, _real(keys), same, scale]
    return by_rows(rows, [own, query], shared, columns=_columns(query, keys), block=block).mean()


def _best(query: Tensor, keys: Tensor, real: Tensor) -> Tensor:
    """[R, n, D], [K, m, D] and which of the keys' tokens are no padding [K, m] -> [R, K]."""
    similarity = (query.flatten(0, 1) @ keys.flatten(0, 1).T).masked_fill_(~real.flatten(), -torch.inf)
    found = similarity.view(*query.shape[:2], *keys.shape[:2]).max(dim=3).values
    counts = _real(query).to(found.dtype)
    return torch.einsum("rnk,rn->rk", found, counts / counts.sum(dim=1, keepdim=True))


def _real(tokens: Tensor) -> Tensor:
    return tokens.detach().any(dim=-1)


def _columns(query: Tensor, keys: Tensor) -> int:
    """Similarities of tokens that one row of the query makes."""
    return query.shape[1] * keys.shape[0] * keys.shape[1]
