"""What a model of language is taught by."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from src.models.functional import full_precision


@full_precision
def captioning_loss(logits: Tensor, text: Tensor, mask: Tensor, count: Tensor | float) -> Tensor:
    """-log p of each token given those before it, summed over the tokens that are no padding and divided by ``count``.

    Args:
        logits: [B, L, V], of the token *after* each of a text's first L; with L + 1 tokens the last says nothing.
        text: int64 [B, L + 1], of which the first is given and not predicted.
        mask: bool [B, L + 1], which tokens are no padding.
        count: predicted tokens, the mean over processes: after DDP's mean the loss is that of the whole batch's tokens.
    """
    target = text[:, 1:].masked_fill(~mask[:, 1:], -100)  # which cross_entropy leaves out
    return cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum") / count
