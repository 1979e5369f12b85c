"""Every class that an image shows, from frozen features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multilabel_average_precision

from src.errors import SettingError
from src.evaluation.features import FeatureSets
from src.evaluation.linear import LinearProbe, logits_of, standardized


def binary_cross_entropy(logits: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
    """Of classes each of which is there or not: tags float [n, C]. A `Loss`; as it is a sum over classes, each of them
    has the problem it would have alone."""
    return F.binary_cross_entropy_with_logits(logits, tags, reduction="sum"), logits.sigmoid() - tags


@dataclass(frozen=True)
class MultiLabelProbe:
    """Logistic regressions on standardized features, one a class, solved to convergence as `LinearProbe` solves its
    own; l2 is chosen by mean average precision on what is held out of the bank.

    Reports ``multilabel_map``, the mean over classes of average precision (classes that no query shows left out), and
    ``multilabel_l2``.

    Args:
        probe: its grid, what is held out, and how far it is solved.

    Raises:
        SettingError: the data knows one class an image at most.
    """

    probe: LinearProbe = field(default_factory=LinearProbe)

    reads_tags: ClassVar[bool] = True

    @torch.no_grad()
    def __call__(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
        if sets.bank.tags is None or sets.query.tags is None:
            raise SettingError("multilabel: the data knows one class a picture at most; scenes know all that are seen")
        bank, query = standardized(sets, device)
        tags = sets.bank.tags.to(device, torch.float32)
        options = {"classes": tags.shape[1], "loss": binary_cross_entropy}
        l2, _ = self.probe.choose(bank, tags, **options, judge=_judge)  # type: ignore[arg-type]
        weights = self.probe.fit(bank, tags, l2=l2, **options)  # type: ignore[arg-type]
        found = mean_average_precision(logits_of(weights, query), sets.query.tags.to(device))
        return {"multilabel_map": found, "multilabel_l2": l2}


def mean_average_precision(scores: Tensor, tags: Tensor) -> float:
    """The mean over classes that are there at all; 0 where none is.

    Args:
        scores: how sure of each class, real numbers [n, K].
        tags: what is there, bool [n, K].
    """
    known = tags.any(dim=0)
    if not known.any():
        return 0.0
    # torchmetrics takes shares of 1, and float32 has few of them near 1
    shares = scores[:, known].cpu().double().sigmoid()
    each = multilabel_average_precision(
        shares, tags[:, known].cpu().long(), num_labels=shares.shape[1], average="none", validate_args=False
    )
    return each.mean().item()


def _judge(weights: Tensor, features: Tensor, tags: Tensor) -> float:
    return mean_average_precision(logits_of(weights, features), tags.bool())
