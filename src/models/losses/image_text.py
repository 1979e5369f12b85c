"""Losses between the images and the texts of a batch.

Vectors are of unit length. Own rows are compared with those of all processes, and each loss is the mean over the own
rows, so that after DDP's mean the gradients are those of the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from src.collectives import shift, world_size
from src.models.functional import full_precision
from src.models.losses.blocks import BLOCK, by_rows
from src.models.losses.contrastive import info_nce


@full_precision
def clip_loss(
    image: Tensor,
    text: Tensor,
    images: Tensor,
    texts: Tensor,
    offset: int,
    *,
    scale: Tensor,
    same: Tensor | None = None,
    label_smoothing: float = 0.0,
    block: int = BLOCK,
) -> Tensor:
    """CLIP's loss (Radford et al., 2021): each image is to recognize its text among all texts, and the other way round.

    Args:
        image, text: [B, D], own pairs.
        images, texts: [N, D], of all processes: ``images, offset = gather(image)``.
        scale: scalar, the inverse temperature.
        same: int64 [N], one number for all pairs whose texts are equal, which are no negatives of each other.
        label_smoothing: the share of the targets that is dealt out evenly to a pair and its negatives.

    Raises:
        SettingError: one pair in all.
    """
    to_text = info_nce(scale * image, texts, offset, same=same, label_smoothing=label_smoothing, block=block)
    to_image = info_nce(scale * text, images, offset, same=same, label_smoothing=label_smoothing, block=block)
    return (to_text + to_image) / 2


@full_precision
def sigmoid_loss(
    image: Tensor, texts: Tensor, offset: int, *, scale: Tensor, bias: Tensor, block: int = BLOCK
) -> Tensor:
    """SigLIP's loss (Zhai et al., 2023): each pair of an image and a text is judged alone, as one that belongs together
    or not. The sum over pairs by the number of images, not of pairs.

    Args:
        image: [B, D], own images.
        texts: [N, D], of all processes; image b belongs to text ``offset + b``.
        scale, bias: scalars; a similarity s is judged by sigmoid(scale * s + bias).
    """
    positive = torch.arange(offset, offset + len(image), device=image.device)
    return _pairs(image, texts, positive, scale, bias, block)


@full_precision
def ring_sigmoid_loss(image: Tensor, text: Tensor, *, scale: Tensor, bias: Tensor, block: int = BLOCK) -> Tensor:
    """`sigmoid_loss` without gathering: texts go round the processes, and each holds those of one other at a time."""
    nowhere = torch.full((len(image),), -1, device=image.device)
    total = _pairs(image, text, torch.arange(len(image), device=image.device), scale, bias, block)
    for _ in range(world_size() - 1):
        text = shift(text)
        total = total + _pairs(image, text, nowhere, scale, bias, block)
    return total


@full_precision
def bag_of_words_loss(logits: Tensor, words: Tensor) -> Tensor:
    """Multi-class logistic loss (Joulin et al., 2016): -log softmax of each word that the text has, averaged over these
    words, then over images. A text without a word counts nothing.

    Args:
        logits: [B, V].
        words: [B, V], 1 for a word that is in the text, else 0.
    """
    each = -(logits.log_softmax(dim=1) * words).sum(dim=1) / words.sum(dim=1).clamp(min=1)
    return each.mean()


def _pairs(image: Tensor, texts: Tensor, positive: Tensor, scale: Tensor, bias: Tensor, block: int) -> Tensor:
    """-log sigmoid(z * logit), z being 1 at ``positive`` and -1 elsewhere: summed over texts, averaged over images."""

    def rows(image: Tensor, positive: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits = scale * image @ texts.T + bias
        belongs = positive[:, None] == torch.arange(len(texts), device=texts.device)
        return softplus(torch.where(belongs, -logits, logits)).sum(dim=1)

    return by_rows(rows, [image, positive], [texts, scale, bias], columns=len(texts), block=block).mean()
