"""SwAV: balanced codes by optimal transport, predicted from the other views."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from src.errors import SettingError
from src.models.functional import full_precision
from src.models.losses.distillation import cross_view_cross_entropy


@torch.no_grad()
@full_precision
def sinkhorn(
    scores: Tensor, *, eps: float = 0.05, iterations: int = 3, reduce: Callable[[Tensor], Tensor] = torch.clone
) -> Tensor:
    """Codes that use all prototypes about equally: exp(scores / eps) with rows and columns scaled in turn, [B, K].

    Each sample's code sums to 1; the codes stay soft. No iterations: the softmax, which balances nothing.

    Args:
        scores: [B, K], cosines of the process's samples with the prototypes. Their bound 1 is what is subtracted
            before the exponential: the largest score would be another number in each process.
        eps: smoothness; smaller is harder and balances more slowly.
        iterations: how often prototypes and samples are scaled.
        reduce: sums a tensor over processes (``reduce_sum``); what is exchanged are the prototypes' totals.
    """
    samples = reduce(scores.new_full((), len(scores)))
    codes = ((scores - 1) / eps).exp()
    codes = codes / reduce(codes.sum())
    for _ in range(iterations):
        codes = codes / (reduce(codes.sum(dim=0)) * scores.shape[1])
        codes = codes / (codes.sum(dim=1, keepdim=True) * samples)
    return codes / codes.sum(dim=1, keepdim=True)


def swapped_prediction(codes: Tensor, scores: Tensor, temperature: float = 0.1) -> Tensor:
    """Caron et al., 2020: every other crop predicts the code of each code crop.

    Args:
        codes: [Q, B, K], of the first Q crops (`sinkhorn`), without gradient.
        scores: [V, B, K], of all crops.
    """
    return cross_view_cross_entropy(codes, scores, temperature)


def check_too_few_samples(prototypes: int, samples: int) -> None:
    """
    Args:
        samples: what takes part in one assignment: the images of a step and, if there is one, of the queue.

    Raises:
        SettingError: more prototypes than samples, which no assignment can use equally.
    """
    if prototypes > samples:
        raise SettingError(
            f"model.prototypes={prototypes} cannot be balanced over {samples} samples: "
            "use fewer, a larger data.batch_size or a longer model.queue_size"
        )
