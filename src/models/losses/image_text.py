"""Losses between the images and the texts of a batch.

Vectors are of unit length. This process's pairs are compared with those of all processes, which the method gathers.
Each loss is the mean over this process's pairs, so that DDP's mean of the gradients is the gradient of the whole batch.
Similarity matrices are computed in chunks of rows (`in_row_chunks`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from src.models.functional import full_precision
from src.models.losses.contrastive import check_images, contrastive_loss
from src.models.losses.row_chunks import MAX_ENTRIES, in_row_chunks


@full_precision
def clip_loss(
    image: Tensor,
    text: Tensor,
    images: Tensor,
    texts: Tensor,
    offset: int,
    *,
    logit_scale: Tensor,
    text_hash: Tensor | None = None,
    label_smoothing: float = 0.0,
    max_entries: int = MAX_ENTRIES,
) -> Tensor:
    """CLIP's loss (Radford et al., 2021): cross-entropy of each image's similarities with all texts and of each text's
    similarities with all images, whose target is the own pair; the mean of the two directions.

    Args:
        image, text: [B, D], this process's pairs.
        images, texts: [N, D], the pairs of all processes; pair b is row ``offset + b``.
        logit_scale: scalar, the inverse temperature.
        text_hash: int64 [N], equal for equal texts, which are then not negatives of each other. None keeps all other
            pairs as negatives.
        label_smoothing: share of the target that is spread evenly over a pair and its negatives.

    Raises:
        SettingError: one pair in all, which has no negative.
    """
    check_images(len(images))
    own = torch.arange(offset, offset + len(image), device=image.device)
    text_hash = torch.arange(len(texts), device=texts.device) if text_hash is None else text_hash

    def cross_entropy(own: Tensor, query: Tensor, keys: Tensor, text_hash: Tensor, logit_scale: Tensor) -> Tensor:
        logits = logit_scale * query @ keys.T
        positive = own[:, None] == torch.arange(len(keys), device=keys.device)
        negatives = text_hash[own][:, None] != text_hash
        return contrastive_loss(logits, positive, positive | negatives, label_smoothing=label_smoothing)

    def all_rows(query: Tensor, keys: Tensor) -> Tensor:
        shared = [keys, text_hash, logit_scale]
        return in_row_chunks(cross_entropy, [own, query], shared, columns=len(keys), max_entries=max_entries).mean()

    return (all_rows(image, texts) + all_rows(text, images)) / 2


@full_precision
def sigmoid_loss(
    image: Tensor,
    texts: Tensor,
    offset: int | None,
    *,
    logit_scale: Tensor,
    logit_bias: Tensor,
    max_entries: int = MAX_ENTRIES,
) -> Tensor:
    """SigLIP's loss (Zhai et al., 2023): -log sigmoid(z * (logit_scale * similarity + logit_bias)) of every image with
    every text, where z is 1 for a pair that belongs together and -1 otherwise; summed over texts, averaged over images.

    Args:
        image: [B, D], this process's images.
        texts: [N, D]; image b belongs to text ``offset + b``.
        offset: None where no image belongs to any of these texts, such as those of another process.
        logit_scale: scalar, the inverse temperature.
        logit_bias: scalar.
    """
    own = torch.arange(len(image), device=image.device)
    own = torch.full_like(own, -1) if offset is None else own + offset  # -1 belongs to no text

    def loss_of_rows(image: Tensor, own: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        logits = logit_scale * image @ texts.T + logit_bias
        positive = own[:, None] == torch.arange(len(texts), device=texts.device)
        return F.softplus(torch.where(positive, -logits, logits)).sum(dim=1)  # softplus(-x) = -log sigmoid(x)

    shared = [texts, logit_scale, logit_bias]
    return in_row_chunks(loss_of_rows, [image, own], shared, columns=len(texts), max_entries=max_entries).mean()


@full_precision
def bag_of_words_loss(logits: Tensor, bag: Tensor) -> Tensor:
    """Multi-class logistic loss (Joulin et al., 2016): -log softmax averaged over the words of a text, then over
    images. A text without words counts as 0.

    Args:
        logits: [B, V], one for each word of the vocabulary.
        bag: [B, V], 1 for the words of the text, else 0.
    """
    loss = -(logits.log_softmax(dim=1) * bag).sum(dim=1) / bag.sum(dim=1).clamp(min=1)
    return loss.mean()
