"""SwAV's loss: codes balanced by optimal transport, predicted from the other views."""

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
    """Sinkhorn-Knopp: soft codes that use all prototypes about equally, [B, K]. exp(scores / eps) is normalized over
    samples and over prototypes in turn; each sample's code sums to 1.

    Args:
        scores: [B, K], cosines of this process's samples with the prototypes. Their bound 1 is subtracted before the
            exponential, because the largest score differs between processes.
        eps: smoothness; smaller makes codes harder and balances more slowly.
        iterations: number of normalizations; 0 for a softmax, which balances nothing.
        reduce: sums a tensor over processes (``reduce_sum``). Only the prototypes' totals are exchanged.
    """
    samples = reduce(scores.new_full((), len(scores)))
    codes = ((scores - 1) / eps).exp()
    codes = codes / reduce(codes.sum())
    for _ in range(iterations):
        codes = codes / (reduce(codes.sum(dim=0)) * scores.shape[1])
        codes = codes / (codes.sum(dim=1, keepdim=True) * samples)
    return codes / codes.sum(dim=1, keepdim=True)


def swapped_prediction(codes: Tensor, scores: Tensor, temperature: float = 0.1) -> Tensor:
    """SwAV's swapped prediction (Caron et al., 2020): every other crop predicts the code of each of the first Q crops.

    Args:
        codes: [B, Q, K], of the first Q crops (`sinkhorn`), without gradient.
        scores: [B, V, K], cosines of all crops with the prototypes.
    """
    return cross_view_cross_entropy(codes, scores, temperature)


def check_sample_count(prototypes: int, samples: int) -> None:
    """
    Args:
        samples: number of samples in one assignment: the images of a step and, if there is one, of the queue.

    Raises:
        SettingError: more prototypes than samples, which no assignment can balance.
    """
    if prototypes > samples:
        raise SettingError(
            f"model.prototypes={prototypes} cannot be balanced over {samples} samples: "
            "use fewer, a larger data.batch_size or a longer model.queue_size"
        )
