"""Contrastive losses: attract an anchor's positives, push it off everything in its denominator.

They differ only in which keys are positive, which enter the denominator, and how positives are weighted; `contrast` is
what they share. Anchors are the process's own rows, keys are those of all processes (``keys, offset = gather(z)``), and
each loss is the mean over the own anchors, so that after DDP's mean the gradients are those of the whole batch.

All vectors are of unit length; the method normalizes them in float32. Similarities are made, used and thrown away for
as many anchors at a time as ``block`` entries allow, and made again in the backward pass: memory grows with the number
of keys, not with its square, and the gradients are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from src.errors import SettingError
from src.models.functional import full_precision
from src.models.losses.blocks import BLOCK, by_rows


def contrast(
    logits: Tensor,
    positive: Tensor,
    denominator: Tensor,
    weight: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-weight * mean over positives + log of the sum of exp over the denominator, for each anchor: [R].

    Args:
        logits: [R, M], similarities over the temperature.
        positive: bool [R, M] or broadcastable, the keys an anchor is drawn to; at least one each.
        denominator: bool [R, M] or broadcastable, the keys that enter the sum; at least one each.
        weight: [R], of the positives; 1 if None.
        label_smoothing: this share of an anchor's attraction is dealt out evenly to all keys of its denominator, and to
            none that is left out of it.
    """
    attraction = torch.where(positive, logits, 0).sum(dim=1) / positive.sum(dim=1)
    if label_smoothing:
        even = torch.where(denominator, logits, 0).sum(dim=1) / denominator.sum(dim=1)
        attraction = (1 - label_smoothing) * attraction + label_smoothing * even
    repulsion = logits.masked_fill(~denominator, -torch.inf).logsumexp(dim=1)
    return repulsion - (attraction if weight is None else weight * attraction)


@full_precision
def nt_xent(z: Tensor, keys: Tensor, offset: int, *, temperature: float, block: int = BLOCK) -> Tensor:
    """SimCLR's loss (Chen et al., 2020): each view is to recognize the other views of its image among all others.

    Args:
        z: [B, V, D], the views of the process's images.
        keys: [N, V, D], of all processes: ``keys, offset = gather(z)``.
        offset: where the own images begin among the keys.

    Raises:
        SettingError: one image in all, which nothing could be told from.
    """
    return _among_images(z, keys, offset, temperature, block, decoupled=False).mean()


@full_precision
def dcl(z: Tensor, keys: Tensor, offset: int, *, temperature: float, block: int = BLOCK) -> Tensor:
    """Decoupled contrastive learning (Yeh et al., 2021): `nt_xent` with the views of the own image out of the
    denominator. Arguments and errors as there. Can be negative."""
    return _among_images(z, keys, offset, temperature, block, decoupled=True).mean()


@full_precision
def dclw(z: Tensor, keys: Tensor, offset: int, *, temperature: float, sigma: float = 0.5, block: int = BLOCK) -> Tensor:
    """`dcl` whose positives are weighted by how hard they are: 2 - exp(s / sigma) / its mean over all images, s being
    the similarity of the two views. The weights are 1 on average and carry no gradient.

    Raises:
        ValueError: not two views.
    """
    if z.shape[1] != 2:
        raise ValueError(f"the weighted form compares two views of an image, got {z.shape[1]}")
    hardness = ((keys[:, 0] * keys[:, 1]).sum(dim=1).detach() / sigma).exp()
    weight = (2 - hardness / hardness.mean())[offset : offset + len(z)].repeat_interleave(2)
    return _among_images(z, keys, offset, temperature, block, decoupled=True, weight=weight).mean()


@torch.no_grad()
@full_precision
def coupling(z: Tensor, keys: Tensor, offset: int, *, temperature: float, block: int = BLOCK) -> Tensor:
    """The mean factor by which `nt_xent`'s gradients are smaller than `dcl`'s: 1 minus the positive's probability."""
    return 1 - (-_among_images(z, keys, offset, temperature, block, decoupled=False)).exp().mean()


@full_precision
def info_nce(
    query: Tensor,
    keys: Tensor,
    offset: int,
    *,
    temperature: float = 1.0,
    same: Tensor | None = None,
    label_smoothing: float = 0.0,
    block: int = BLOCK,
) -> Tensor:
    """Each query is to recognize its own key among the keys of all images.

    Args:
        query: [B, D].
        keys: [N, D], of all processes; query b belongs to key ``offset + b``.
        same: int64 [N], one number for all keys that say the same; what says the same as a query's own key is no
            negative of it. None where none do.
        label_smoothing: see `contrast`.

    Raises:
        SettingError: one image in all.
    """
    check_one(len(keys))
    same = torch.arange(len(keys), device=keys.device) if same is None else same

    def rows(own: Tensor, query: Tensor, keys: Tensor, same: Tensor) -> Tensor:
        itself = own[:, None] == torch.arange(len(keys), device=keys.device)
        logits = query @ keys.T / temperature
        return contrast(logits, itself, itself | (same[own][:, None] != same), label_smoothing=label_smoothing)

    own = torch.arange(offset, offset + len(query), device=query.device)
    return by_rows(rows, [own, query], [keys, same], columns=len(keys), block=block).mean()


def ctr(query: Tensor, keys: Tensor, offset: int, *, temperature: float, block: int = BLOCK) -> Tensor:
    """MoCo v3's form (Chen et al., 2021): `info_nce` times 2 T, which keeps the gradient's size for any temperature."""
    return 2 * temperature * info_nce(query, keys, offset, temperature=temperature, block=block)


@full_precision
def queue_info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    *,
    temperature: float,
    synthetic: Tensor | None = None,
    excluded: Tensor | None = None,
    decoupled: bool = False,
    block: int = BLOCK,
) -> Tensor:
    """MoCo's loss (He et al., 2020): each query is to recognize its own key among old ones.

    Args:
        query, key: [B, D]; the key has no gradient.
        negatives: [K, D], the queue.
        synthetic: [B, S, D], negatives made for each query (`mix_hard_negatives`).
        excluded: bool [B, K], what of the queue is no negative of a query, such as the same image of an earlier epoch.
        decoupled: leave the positive out of the denominator, as in DCL.
    """
    each = [query, key]
    each += [] if synthetic is None else [synthetic]
    each += [] if excluded is None else [excluded]

    def rows(query: Tensor, key: Tensor, *others: Tensor) -> Tensor:
        similarities = [(query * key).sum(dim=1, keepdim=True), query @ others[-1].T]
        if synthetic is not None:
            similarities.append(torch.einsum("bd,bsd->bs", query, others[0]))
        logits = torch.cat(similarities, dim=1) / temperature
        positive = torch.zeros_like(logits[:1], dtype=torch.bool)
        positive[:, 0] = True
        denominator = torch.ones_like(logits, dtype=torch.bool)
        denominator[:, 0] = not decoupled
        if excluded is not None:
            denominator[:, 1 : 1 + len(negatives)] = ~others[-2]
        return contrast(logits, positive, denominator)

    columns = 1 + len(negatives) + (0 if synthetic is None else synthetic.shape[1])
    return by_rows(rows, each, [negatives], columns=columns, block=block).mean()


@torch.no_grad()
@full_precision
def contrastive_accuracy(
    query: Tensor, key: Tensor, negatives: Tensor, *, synthetic: Tensor | None = None, excluded: Tensor | None = None
) -> Tensor:
    """The share of queries that are more like their key than like any negative, for the log. Arguments as above."""
    similarity = query @ negatives.T
    hardest = (similarity if excluded is None else similarity.masked_fill(excluded, -torch.inf)).amax(dim=1)
    if synthetic is not None:
        hardest = torch.maximum(hardest, torch.einsum("bd,bsd->bs", query, synthetic).amax(dim=1))
    return ((query * key).sum(dim=1) > hardest).float().mean()


@torch.no_grad()
@full_precision
def mix_hard_negatives(
    query: Tensor,
    negatives: Tensor,
    uniform: Tensor,
    *,
    hardest: int,
    pairs: int,
    with_query: int,
    excluded: Tensor | None = None,
) -> Tensor:
    """MoCHi's synthetic negatives (Kalantidis et al., 2020), of unit length and without gradient: [B, S + S', D].

    Of the negatives most like a query, two are mixed with shares a and 1 - a (``pairs`` times), and one is mixed with
    the query itself, whose share is below one half (``with_query`` times). Each query draws for itself.

    Args:
        query: [B, D].
        negatives: [K, D], the queue.
        uniform: [B, 3 S + 2 S'] in [0, 1): for each pair its two members and a, for each other its member and b.
        hardest: N, how many of the negatives are drawn from.
        pairs, with_query: S and S'.
        excluded: bool [B, K], what of the queue must not be used for a query; fewer than K - N in each row.

    Raises:
        SettingError: fewer negatives than ``hardest``.
    """
    if not 0 < hardest <= len(negatives):
        raise SettingError(f"hardest={hardest} must be at least 1 and at most the queue's size {len(negatives)}")
    similarity = query @ negatives.T
    if excluded is not None:
        similarity = similarity.masked_fill(excluded, -torch.inf)
    nearest = similarity.topk(hardest, dim=1).indices

    def drawn(numbers: Tensor) -> Tensor:
        ranks = (numbers * hardest).long().clamp_(max=hardest - 1)
        return negatives[nearest.gather(1, ranks)]

    first, second, a, member, b = uniform.split([pairs, pairs, pairs, with_query, with_query], dim=1)
    a, b = a.unsqueeze(-1).to(query.dtype), b.unsqueeze(-1).to(query.dtype) / 2
    of_two = a * drawn(first) + (1 - a) * drawn(second)
    of_query = b * query.unsqueeze(1) + (1 - b) * drawn(member)
    return torch.nn.functional.normalize(torch.cat([of_two, of_query], dim=1), dim=-1)


def _among_images(
    z: Tensor,
    keys: Tensor,
    offset: int,
    temperature: float,
    block: int,
    *,
    decoupled: bool,
    weight: Tensor | None = None,
) -> Tensor:
    """The loss of every own view against all views of all images: [B * V]."""
    check_one(len(keys))
    views = z.shape[1]

    def rows(own: Tensor, anchors: Tensor, weight: Tensor, keys: Tensor) -> Tensor:
        columns = torch.arange(len(keys), device=keys.device)
        itself = own[:, None] == columns
        same_image = own[:, None] // views == columns // views
        logits = anchors @ keys.T / temperature
        return contrast(logits, same_image & ~itself, ~(same_image if decoupled else itself), weight)

    anchors, everything = z.flatten(0, 1), keys.flatten(0, 1)
    own = torch.arange(offset * views, offset * views + len(anchors), device=z.device)
    weight = torch.ones_like(anchors[:, 0]) if weight is None else weight
    return by_rows(rows, [own, anchors, weight], [everything], columns=len(everything), block=block)


def check_one(images: int) -> None:
    """
    Raises:
        SettingError: there is nothing that an image could be told from.
    """
    if images < 2:
        raise SettingError(f"data.batch_size: a contrastive loss needs at least 2 images in a step, got {images}")
