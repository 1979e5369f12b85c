"""The loss of a language model that writes captions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from src.models.functional import full_precision


@full_precision
def captioning_loss(logits: Tensor, text: Tensor, mask: Tensor, count: Tensor | float) -> Tensor:
    """Next-token cross-entropy, summed over the tokens that are not padding and divided by ``count``.

    Args:
        logits: [B, L, V]; position t predicts token t + 1.
        text: int64 [B, L + 1]; the first token is given and not predicted.
        mask: bool [B, L + 1], False for padding.
        count: predicted tokens, averaged over processes: after DDP's mean the loss is the mean over all tokens of the
            whole batch.
    """
    target = text[:, 1:].masked_fill(~mask[:, 1:], -100)  # -100 is ignored by cross_entropy
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum") / count
