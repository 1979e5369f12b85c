"""Contrastive losses among images: each view is drawn to its positives and pushed away from its negatives.

The losses differ in which keys are positives, which keys enter the denominator, and how positives are weighted.
`contrastive_loss` is the equation they share. Vectors are of unit length. Queries are this process's rows, keys are
those of all processes (``keys, offset = gather(z)`` in the method). Each loss is the mean over this process's images,
so that DDP's mean of the gradients is the gradient of the whole batch. Similarity matrices are computed in chunks of
rows (`in_row_chunks`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from src.errors import SettingError
from src.models.functional import full_precision
from src.models.losses.row_chunks import MAX_ENTRIES, in_row_chunks


def contrastive_loss(
    logits: Tensor,
    positives: Tensor,
    denominator: Tensor,
    weight: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    any_positive: bool = False,
) -> Tensor:
    """Computes log(sum over the denominator of exp(logit)) - weight * mean over the positives of the logit: [R].

    With one positive that is part of the denominator this is InfoNCE, -log(exp(positive) / sum(exp(logits))).

    Args:
        logits: [R, N], similarities divided by the temperature.
        positives: bool, broadcastable to [R, N]; at least one key in each row.
        denominator: bool, broadcastable to [R, N]; at least one key in each row.
        weight: [R], weights of the positive terms; None for 1.
        label_smoothing: share of the target that is spread evenly over the keys of the denominator.
        any_positive: takes log(sum over the positives of exp(logit)) in the place of the mean, so that one similar
            positive is enough, where the mean wants all of them similar.
    """
    if any_positive:
        target_logit = logits.masked_fill(~positives, -torch.inf).logsumexp(dim=1)
    else:
        target_logit = torch.where(positives, logits, 0).sum(dim=1) / positives.sum(dim=1)
    if label_smoothing:
        mean_logit = torch.where(denominator, logits, 0).sum(dim=1) / denominator.sum(dim=1)
        target_logit = (1 - label_smoothing) * target_logit + label_smoothing * mean_logit
    log_denominator = logits.masked_fill(~denominator, -torch.inf).logsumexp(dim=1)
    return log_denominator - (target_logit if weight is None else weight * target_logit)


@full_precision
def nt_xent(z: Tensor, keys: Tensor, offset: int, *, temperature: float, max_entries: int = MAX_ENTRIES) -> Tensor:
    """SimCLR's NT-Xent loss (Chen et al., 2020), mean over images and sum over views, as in the authors' code. The
    positives of a view are the other views of its image; the denominator has all views of all images except the view
    itself.

    The paper writes the mean over views, half of this. LARS scales gradients of matrices anyway, those of biases and
    norms it does not.

    Args:
        z: [B, V, D], the views of this process's images.
        keys: [N, V, D], the views of all processes' images.
        offset: row of ``keys`` at which this process's images begin.
        temperature: similarities are divided by it.

    Raises:
        SettingError: one image in all, which has no negative.
    """
    return _loss_per_view(z, keys, offset, temperature, max_entries, decoupled=False).sum(dim=1).mean()


@full_precision
def dcl(z: Tensor, keys: Tensor, offset: int, *, temperature: float, max_entries: int = MAX_ENTRIES) -> Tensor:
    """Decoupled contrastive learning (Yeh et al., 2021): `nt_xent` without the views of the same image in the
    denominator. Can be negative. Arguments and errors as in `nt_xent`."""
    return _loss_per_view(z, keys, offset, temperature, max_entries, decoupled=True).sum(dim=1).mean()


@full_precision
def dclw(
    z: Tensor, keys: Tensor, offset: int, *, temperature: float, sigma: float = 0.5, max_entries: int = MAX_ENTRIES
) -> Tensor:
    """`dcl` with weighted positives: 2 - exp(s / sigma) / mean over all images of exp(s / sigma), where s is the
    similarity of an image's two views. The weights have a mean of 1 and no gradient. The re-implementation that most
    people use differentiates through them, which makes gradients 10 to 17 % longer.

    Raises:
        SettingError: not two views, or one image in all.
    """
    if z.shape[1] != 2:
        raise SettingError(f"data.train_view: model.loss=dclw compares two views of an image, got {z.shape[1]}")
    similarity = ((keys[:, 0] * keys[:, 1]).sum(dim=1).detach() / sigma).exp()
    weight = (2 - similarity / similarity.mean())[offset : offset + len(z)].repeat_interleave(2)
    return _loss_per_view(z, keys, offset, temperature, max_entries, decoupled=True, weight=weight).sum(dim=1).mean()


@full_precision
def supcon(
    z: Tensor, keys: Tensor, label: Tensor, offset: int, *, temperature: float, max_entries: int = MAX_ENTRIES
) -> Tensor:
    """SupCon's loss L_out (Khosla et al., 2020), mean over images and views: `nt_xent` whose positives are the other
    views of all images of the same class. The denominator has all views of all images except the view itself.

    Args:
        z: [B, V, D], the views of this process's images.
        keys: [N, V, D], the views of all processes' images.
        label: [N], the classes of all processes' images.
        offset: row of ``keys`` at which this process's images begin.
        temperature: similarities are divided by it.

    Raises:
        SettingError: one image in all, which has no negative.
    """
    return _loss_per_view(z, keys, offset, temperature, max_entries, decoupled=False, label=label).mean()


@full_precision
def leave_one_out(
    query: Tensor,
    candidates: Tensor,
    label: Tensor,
    candidate_label: Tensor,
    excluded: Tensor,
    *,
    neighbors: int,
    temperature: float,
    max_entries: int = MAX_ENTRIES,
) -> Tensor:
    """LOOK's loss (Feng et al., 2021), one value for each image: minus the logarithm of the probability that a weighted
    nearest-neighbor classifier without the image itself gives to its class, [B]. The neighbors enter the denominator,
    those of the image's class are the positives.

    The most similar candidate of the image's class is always among the neighbors. An image without one counts as 0.

    Args:
        query: [B, D].
        candidates: [N, D], without gradient.
        label: [B], classes of the queries.
        candidate_label: [N].
        excluded: bool [B, N], candidates that are no neighbors of a query: its own image's, and empty ones.
        neighbors: number of nearest candidates.
        temperature: similarities are divided by it.
    """
    count = min(neighbors, len(candidates))

    def loss_of_rows(query: Tensor, label: Tensor, excluded: Tensor, candidates: Tensor, classes: Tensor) -> Tensor:
        logits = query @ candidates.T / temperature
        allowed = logits.detach().masked_fill(excluded, -torch.inf)
        same = (label[:, None] == classes) & ~excluded
        nearest_same = allowed.masked_fill(~same, -torch.inf).argmax(dim=1, keepdim=True)
        near = torch.zeros_like(excluded).scatter_(1, allowed.topk(count, dim=1).indices, True)
        near = near.scatter_(1, nearest_same, True) & ~excluded
        near |= ~near.any(dim=1, keepdim=True)  # an image that is alone
        positives = near & same
        positives = torch.where(positives.any(dim=1, keepdim=True), positives, near)
        return contrastive_loss(logits, positives, near, any_positive=True)

    rows, shared = [query, label, excluded], [candidates, candidate_label]
    return in_row_chunks(loss_of_rows, rows, shared, columns=len(candidates), max_entries=max_entries)


@torch.no_grad()
@full_precision
def coupling(z: Tensor, keys: Tensor, offset: int, *, temperature: float, max_entries: int = MAX_ENTRIES) -> Tensor:
    """Returns the mean factor by which `nt_xent`'s gradients are smaller than those of `dcl`: 1 minus the probability
    of the positive."""
    return 1 - (-_loss_per_view(z, keys, offset, temperature, max_entries, decoupled=False)).exp().mean()


def _loss_per_view(
    z: Tensor,
    keys: Tensor,
    offset: int,
    temperature: float,
    max_entries: int,
    *,
    decoupled: bool,
    weight: Tensor | None = None,
    label: Tensor | None = None,
) -> Tensor:
    """Contrasts every view of this process with all views of all images: [B, V]. Positives are the other views of the
    images with the same ``label`` [N]; without labels those of the same image."""
    check_images(len(keys))
    views = z.shape[1]
    group = torch.arange(len(keys), device=z.device) if label is None else label

    def loss_of_rows(own: Tensor, query: Tensor, weight: Tensor, keys: Tensor, group: Tensor) -> Tensor:
        columns = torch.arange(len(keys), device=keys.device)
        same_view = own[:, None] == columns
        same_group = group[own // views][:, None] == group.repeat_interleave(views)
        logits = query @ keys.T / temperature
        return contrastive_loss(logits, same_group & ~same_view, ~(same_group if decoupled else same_view), weight)

    query, keys = z.flatten(0, 1), keys.flatten(0, 1)
    own = torch.arange(offset * views, offset * views + len(query), device=z.device)
    weight = torch.ones_like(query[:, 0]) if weight is None else weight
    rows, shared = [own, query, weight], [keys, group]
    losses = in_row_chunks(loss_of_rows, rows, shared, columns=len(keys), max_entries=max_entries)
    return losses.unflatten(0, z.shape[:2])


@full_precision
def info_nce(query: Tensor, keys: Tensor, offset: int, *, temperature: float, max_entries: int = MAX_ENTRIES) -> Tensor:
    """InfoNCE (van den Oord et al., 2018) with the batch's other images as negatives: cross-entropy of each query's
    similarities with all keys, whose target is the key of the same image.

    Args:
        query: [B, D].
        keys: [N, D], of all processes; query b belongs to key ``offset + b``.
        temperature: similarities are divided by it.

    Raises:
        SettingError: one image in all, which has no negative.
    """
    check_images(len(keys))

    def cross_entropy(own: Tensor, query: Tensor, keys: Tensor) -> Tensor:
        return F.cross_entropy(query @ keys.T / temperature, own, reduction="none")

    own = torch.arange(offset, offset + len(query), device=query.device)
    return in_row_chunks(cross_entropy, [own, query], [keys], columns=len(keys), max_entries=max_entries).mean()


def moco_v3_loss(
    query: Tensor, keys: Tensor, offset: int, *, temperature: float, max_entries: int = MAX_ENTRIES
) -> Tensor:
    """MoCo v3's loss (Chen et al., 2021): 2 * temperature * `info_nce`, whose gradients have the same size at any
    temperature."""
    return 2 * temperature * info_nce(query, keys, offset, temperature=temperature, max_entries=max_entries)


@full_precision
def queue_info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float,
    synthetic: Tensor | None = None,
    excluded: Tensor | None = None,
    decoupled: bool = False,
    max_entries: int = MAX_ENTRIES,
) -> Tensor:
    """MoCo's loss (He et al., 2020): InfoNCE of each query with its own key as the positive and the queue as negatives.

    Args:
        query: [B, D].
        key: [B, D], from the momentum encoder, without gradient.
        queue: [K, D], keys of earlier steps.
        temperature: similarities are divided by it.
        synthetic: [B, S, D], further negatives of each query (`mix_hard_negatives`).
        excluded: bool [B, K], entries of the queue that are no negatives of a query, such as earlier keys of its image.
        decoupled: leaves the positive out of the denominator, as DCL does.
    """
    rows = [query, key]
    rows += [] if synthetic is None else [synthetic]
    rows += [] if excluded is None else [excluded]

    def loss_of_rows(query: Tensor, key: Tensor, *others: Tensor) -> Tensor:
        similarities = [(query * key).sum(dim=1, keepdim=True), query @ others[-1].T]
        if synthetic is not None:
            similarities.append(torch.einsum("bd,bsd->bs", query, others[0]))
        logits = torch.cat(similarities, dim=1) / temperature
        positives = torch.zeros_like(logits[:1], dtype=torch.bool)
        positives[:, 0] = True
        denominator = torch.ones_like(logits, dtype=torch.bool)
        denominator[:, 0] = not decoupled
        if excluded is not None:
            denominator[:, 1 : 1 + len(queue)] = ~others[-2]
        return contrastive_loss(logits, positives, denominator)

    columns = 1 + len(queue) + (0 if synthetic is None else synthetic.shape[1])
    return in_row_chunks(loss_of_rows, rows, [queue], columns=columns, max_entries=max_entries).mean()


@torch.no_grad()
@full_precision
def contrastive_accuracy(
    query: Tensor, key: Tensor, queue: Tensor, *, synthetic: Tensor | None = None, excluded: Tensor | None = None
) -> Tensor:
    """Returns the share of queries that are more similar to their key than to every negative, for the log. Arguments
    as in `queue_info_nce`."""
    similarity = query @ queue.T
    hardest = (similarity if excluded is None else similarity.masked_fill(excluded, -torch.inf)).amax(dim=1)
    if synthetic is not None:
        hardest = torch.maximum(hardest, torch.einsum("bd,bsd->bs", query, synthetic).amax(dim=1))
    return ((query * key).sum(dim=1) > hardest).float().mean()


@torch.no_grad()
@full_precision
def mix_hard_negatives(
    query: Tensor,
    queue: Tensor,
    uniform: Tensor,
    *,
    hardest: int,
    pairs: int,
    with_query: int,
    excluded: Tensor | None = None,
) -> Tensor:
    """MoCHi's synthetic negatives (Kalantidis et al., 2020), of unit length and without gradient: [B, S + S', D].

    Mixes, for each query on its own, two of its hardest negatives with shares a and 1 - a (``pairs`` times), and one of
    them with the query itself, whose share is below one half (``with_query`` times).

    Args:
        query: [B, D].
        queue: [K, D], keys of earlier steps.
        uniform: [B, 3 S + 2 S'], random numbers in [0, 1): for each pair its two members and a, then for each mix with
            the query its member and share.
        hardest: N, number of most similar negatives to draw from.
        pairs: S.
        with_query: S'.
        excluded: bool [B, K], entries of the queue not to use for a query; fewer than K - N in each row.

    Raises:
        SettingError: the queue holds fewer than ``hardest`` negatives.
    """
    if not 0 < hardest <= len(queue):
        raise SettingError(f"model.hardest={hardest} must be at least 1 and at most the queue's size {len(queue)}")
    similarity = query @ queue.T
    if excluded is not None:
        similarity = similarity.masked_fill(excluded, -torch.inf)
    nearest = similarity.topk(hardest, dim=1).indices

    def draw(numbers: Tensor) -> Tensor:
        ranks = (numbers * hardest).long().clamp_(max=hardest - 1)
        return queue[nearest.gather(1, ranks)]

    first, second, a, member, b = uniform.split([pairs, pairs, pairs, with_query, with_query], dim=1)
    a, b = a.unsqueeze(-1).to(query.dtype), b.unsqueeze(-1).to(query.dtype) / 2
    mixed_pairs = a * draw(first) + (1 - a) * draw(second)
    mixed_with_query = b * query.unsqueeze(1) + (1 - b) * draw(member)
    return F.normalize(torch.cat([mixed_pairs, mixed_with_query], dim=1), dim=-1)


def check_images(count: int) -> None:
    """
    Raises:
        SettingError: a single image in a step, which has no negative.
    """
    if count < 2:
        raise SettingError(f"data.batch_size: a contrastive loss needs at least 2 images in a step, got {count}")
