"""Measures collapse of the representation and of a teacher's targets, and warns of it."""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from src.collectives import gather_rows, rank, reduce_sum, world_size
from src.errors import SettingError
from src.models.logging import publish
from src.models.losses.distillation import effective_prototypes, entropy

log = logging.getLogger(__name__)


class RepresentationHealth(L.Callback):
    """Logs measures of collapse every ``every_n_steps`` optimizer steps, over all processes.

    Of the most recent rows of ``StepOutput["embedding"]`` [n, D]:

    - ``health/feature_std``: `feature_std`, 1 for directions spread evenly, 0 for a single direction.
    - ``health/effective_rank``: `effective_rank`, the number of directions in use, at most D.
    - ``health/embedding_norm``: mean L2 norm.

    Of ``StepOutput["targets"]`` [..., K] since the last measurement, distributions over prototypes from a teacher or an
    assignment:

    - ``health/teacher_entropy``: mean entropy in nats, 0 if every target is a single prototype.
    - ``health/effective_prototypes``: number of prototypes in use, exp of the entropy of the mean target, at most K.
    - ``health/target_information``: the mutual information of image and prototype in nats,
      log(effective prototypes) - entropy.

    Logs one warning when the representation collapses (below ``min_feature_std`` or ``min_effective_rank``) or the
    targets collapse (below ``min_target_information``), and another only after it has recovered. Targets collapse when
    all images have nearly the same target, be it a single prototype (entropy 0) or the uniform distribution (entropy
    log K).

    Args:
        every_n_steps: optimizer steps between measurements.
        window: number of the most recent embeddings to measure.
        min_feature_std: the default is reached when all cosines are above 0.9999. A random initialization is above it.
        min_effective_rank: the default is just above 1, a single direction.
        min_target_information: nats. In small DINO runs (a ViT of width 96 on scenes, 1,024 prototypes, 400 steps) the
            targets held 0.003 and 0.018 nats when features did not improve, and 0.33 to 0.92 when they did.

    Raises:
        SettingError: ``every_n_steps`` or ``window`` is too small.
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 50,
        window: int = 2048,
        min_feature_std: float = 0.01,
        min_effective_rank: float = 1.1,
        min_target_information: float = 0.02,
    ) -> None:
        if every_n_steps < 1 or window < 2:
            raise SettingError(
                "callbacks.representation_health: every_n_steps must be at least 1 and window at least 2, got "
                f"{every_n_steps} and {window}"
            )
        self.every_n_steps = every_n_steps
        self.window = window
        self.min_feature_std = min_feature_std
        self.min_effective_rank = min_effective_rank
        self.min_target_information = min_target_information
        self._recent: Tensor | None = None
        self._targets: Tensor | None = None  # [K + 2], see `_sums`
        self._targets_collapsed = False
        self._done = 0
        self._measured_at = 0
        self._collapsed = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._done = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if "embedding" not in outputs:
            return
        step, local = trainer.global_step, outputs["embedding"].detach().float()
        # the step of these rows: before the last micro-batch of a step, global_step is still the previous one's
        rows_step = step if step > self._done else step + 1
        self._done = step
        # rows that will have left the window at the next measurement are not collected
        steps_left = -rows_step % self.every_n_steps
        rows_a_step = len(local) * world_size() * trainer.accumulate_grad_batches
        if steps_left * rows_a_step < self.window:
            rows = gather_rows(local)
            earlier = [] if self._recent is None else [self._recent.to(rows.device)]
            self._recent = torch.cat([*earlier, rows])[-self.window :]
            if "targets" in outputs:
                sums = _sums(outputs["targets"].detach())
                self._targets = sums if self._targets is None else self._targets.to(sums.device) + sums
        if self._recent is None or step // self.every_n_steps == self._measured_at // self.every_n_steps:
            return
        self._measured_at = step
        self._report(trainer, self._recent)
        if self._targets is not None:
            self._report_targets(trainer, reduce_sum(self._targets))
            self._targets = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "recent": self._recent,
            "measured_at": self._measured_at,
            "collapsed": self._collapsed,
            "targets": self._targets,
            "targets_collapsed": self._targets_collapsed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recent = state_dict["recent"]
        self._measured_at = state_dict["measured_at"]
        self._collapsed = state_dict["collapsed"]
        self._targets = state_dict["targets"]
        self._targets_collapsed = state_dict["targets_collapsed"]

    def _report(self, trainer: L.Trainer, embeddings: Tensor) -> None:
        if not torch.isfinite(embeddings).all():
            return  # NanGuard handles this, and svdvals raises for such values
        std, effective = feature_std(embeddings), effective_rank(embeddings)
        publish(
            trainer,
            {
                "health/feature_std": std,
                "health/effective_rank": effective,
                "health/embedding_norm": embeddings.norm(dim=1).mean().item(),
            },
        )
        collapsed = std < self.min_feature_std or effective < self.min_effective_rank
        if collapsed and not self._collapsed and rank() == 0:
            log.warning(
                "step %d: the representation has collapsed (feature std %.4f, limit %g; effective rank %.2f of %d, "
                "limit %g)",
                trainer.global_step,
                std,
                self.min_feature_std,
                effective,
                embeddings.shape[1],
                self.min_effective_rank,
            )
        self._collapsed = collapsed

    def _report_targets(self, trainer: L.Trainer, sums: Tensor) -> None:
        if not torch.isfinite(sums).all():
            return
        count = sums[-1]
        mean_entropy, prototypes = (sums[-2] / count).item(), effective_prototypes(sums[:-2] / count).item()
        # negative by rounding alone: the entropy of the mean is at least the mean entropy
        information = max(0.0, math.log(prototypes) - mean_entropy)
        publish(
            trainer,
            {
                "health/teacher_entropy": mean_entropy,
                "health/effective_prototypes": prototypes,
                "health/target_information": information,
            },
        )
        collapsed = information < self.min_target_information
        if collapsed and not self._targets_collapsed and rank() == 0:
            log.warning(
                "step %d: the teacher's targets have collapsed: all images have nearly the same target (%.1e nats of "
                "information about an image, limit %g; entropy %.4f of at most %.2f, %.2f prototypes in use)",
                trainer.global_step,
                information,
                self.min_target_information,
                mean_entropy,
                math.log(len(sums) - 2),
                prototypes,
            )
        self._targets_collapsed = collapsed


def _sums(targets: Tensor) -> Tensor:
    """Sum of the targets [..., K], sum of their entropies, and their number: float64 [K + 2], float32 on MPS."""
    rows = targets.flatten(0, -2)
    total = rows.sum(dim=0, dtype=torch.float32 if rows.device.type == "mps" else torch.float64)
    count = total.new_full((1,), len(rows))
    return torch.cat([total, entropy(rows).to(total.dtype) * count, count])


def feature_std(embeddings: Tensor) -> float:
    """Standard deviation of L2-normalized embeddings, averaged over dimensions, times sqrt(D): [n, D] -> [0, 1].

    1 for directions spread evenly around zero, 0 for equal rows.
    """
    unit = F.normalize(embeddings.float(), dim=1)
    return (unit.std(dim=0, correction=0).mean() * math.sqrt(embeddings.shape[1])).item()


def effective_rank(embeddings: Tensor) -> float:
    """RankMe (Garrido et al., 2023), exp of the entropy of the normalized singular values: [n, D] -> [1, min(n, D)], 0
    for a zero matrix."""
    values = torch.linalg.svdvals(embeddings.float())
    if values.sum() == 0:
        return 0.0
    share = values / values.sum()
    return torch.exp(-torch.xlogy(share, share).sum()).item()
