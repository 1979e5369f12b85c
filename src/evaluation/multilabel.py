"""Multi-label classification of frozen features: every class that an image shows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multilabel_average_precision

from src.evaluation.errors import NotApplicable
from src.evaluation.evaluation import FeatureEvaluation
from src.evaluation.features import FeatureNeeds, FeatureSets
from src.evaluation.linear import LinearProbe, logits_of, standardized


def binary_cross_entropy(logits: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the `Loss` of classes each of which is present or not: tags float [n, C]. As it is a sum over classes,
    each class is fitted independently."""
    return F.binary_cross_entropy_with_logits(logits, tags, reduction="sum"), logits.sigmoid() - tags


@dataclass(frozen=True)
class MultiLabelProbe(FeatureEvaluation):
    """Fits a logistic regression for each class on standardized features, to convergence as `LinearProbe` does; l2 is
    chosen by mean average precision on a held-out part of the bank.

    Reports ``multilabel_map``, the mean over classes of average precision, without classes that no query shows, and
    ``multilabel_l2``.

    Args:
        probe: grid of l2, held-out share and convergence of the regressions.

    Raises:
        NotApplicable: the source knows at most one class of an image.
    """

    probe: LinearProbe = field(default_factory=LinearProbe)

    @property
    def needs(self) -> FeatureNeeds:
        return FeatureNeeds(tags=True)

    @torch.no_grad()
    def score(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
        if sets.bank.tags is None or sets.query.tags is None:
            raise NotApplicable("all classes of an image are needed, which scenes have and this data does not")
        bank, query = standardized(sets, device)
        tags = sets.bank.tags.to(device, torch.float32)
        options = {"classes": tags.shape[1], "loss": binary_cross_entropy}
        l2, _ = self.probe.choose(bank, tags, **options, accuracy=_mean_average_precision)  # type: ignore[arg-type]
        weights = self.probe.fit(bank, tags, l2=l2, **options)  # type: ignore[arg-type]
        value = mean_average_precision(logits_of(weights, query), sets.query.tags.to(device))
        return {"multilabel_map": value, "multilabel_l2": l2}


def mean_average_precision(scores: Tensor, tags: Tensor) -> float:
    """Returns the mean of average precision over the classes that occur; 0 if none does.

    Args:
        scores: logits [n, K].
        tags: the classes of each image, bool [n, K].
    """
    occurring = tags.any(dim=0)
    if not occurring.any():
        return 0.0
    # torchmetrics takes probabilities; a sigmoid would make all large logits one number, in float64 from 37 on
    ranks = rankdata(scores[:, occurring].cpu().double().numpy(), method="dense", axis=0)
    precisions = multilabel_average_precision(
        torch.from_numpy(ranks / (len(ranks) + 1.0)),
        tags[:, occurring].cpu().long(),
        num_labels=ranks.shape[1],
        average="none",
        validate_args=False,
    )
    return precisions.mean().item()


def _mean_average_precision(weights: Tensor, features: Tensor, tags: Tensor) -> float:
    return mean_average_precision(logits_of(weights, features), tags.bool())
