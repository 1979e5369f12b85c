"""Whether the representation is alive: seen on a dashboard and said aloud, before a run is wasted."""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from src.collectives import gather_rows, rank, reduce_sum, world_size
from src.models.logging import publish
from src.models.losses.distillation import effective_prototypes, entropy

log = logging.getLogger(__name__)


class RepresentationHealth(L.Callback):
    """Measures ``StepOutput["embedding"]`` over the most recent rows of all processes, every ``every_n_steps`` steps.

    - ``health/feature_std``: `feature_std`, 1 where features point everywhere alike, 0 where they all point one way.
    - ``health/effective_rank``: `effective_rank`, how many directions are in use, at most D.
    - ``health/embedding_norm``: mean length of an embedding.

    Of ``StepOutput["targets"]``, a teacher's distributions over prototypes if there is one, over as many steps:

    - ``health/teacher_entropy``: mean entropy in nats; 0 where each target is a single prototype.
    - ``health/effective_prototypes``: how many prototypes are in use over all images, at most K.
    - ``health/target_information``: what a target tells of its image, log(effective prototypes) - entropy in nats.

    Below ``min_feature_std`` or ``min_effective_rank`` the representation counts as collapsed: one line says so, and
    again only after it has recovered. The limits are those of a representation that is lost (all cosines above 0.9999;
    a single direction), not of one that is merely poor, so that a random initialization does not cry wolf.
    Below ``min_target_information`` the targets have collapsed: all images have nearly the same one, whether that is a
    single prototype (entropy 0) or all of them alike (entropy log K). Small runs of DINO whose features gained nothing
    told 0.018 and 0.003 nats after 400 steps, those whose features gained 0.33 to 0.92 (a ViT of width 96 on scenes,
    1,024 prototypes).

    Args:
        every_n_steps: optimizer steps between measurements.
        window: rows that are kept.
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
            raise ValueError("RepresentationHealth: every_n_steps must be at least 1 and window at least 2")
        self.every_n_steps = every_n_steps
        self.window = window
        self.min_feature_std = min_feature_std
        self.min_effective_rank = min_effective_rank
        self.min_target_information = min_target_information
        self._recent: Tensor | None = None
        self._targets: Tensor | None = None  # [K + 2]: sums of targets and of their entropies, and how many
        self._same_targets = False
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
        # the step these rows belong to: a micro-batch that is not its step's last has not moved the count
        own_step = step if step > self._done else step + 1
        self._done = step
        # only the steps whose rows will still be in the window are worth collecting
        steps_left = -own_step % self.every_n_steps
        rows_a_step = len(local) * world_size() * trainer.accumulate_grad_batches
        if steps_left * rows_a_step < self.window:
            rows = gather_rows(local)
            known = [] if self._recent is None else [self._recent.to(rows.device)]
            self._recent = torch.cat([*known, rows])[-self.window :]
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
            "same_targets": self._same_targets,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recent = state_dict["recent"]
        self._measured_at = state_dict["measured_at"]
        self._collapsed = state_dict["collapsed"]
        self._targets = state_dict["targets"]
        self._same_targets = state_dict["same_targets"]

    def _report(self, trainer: L.Trainer, embeddings: Tensor) -> None:
        if not torch.isfinite(embeddings).all():
            return  # another callback's business, and singular values of it would not end
        std, directions = feature_std(embeddings), effective_rank(embeddings)
        publish(
            trainer,
            {
                "health/feature_std": std,
                "health/effective_rank": directions,
                "health/embedding_norm": embeddings.norm(dim=1).mean().item(),
            },
        )
        collapsed = std < self.min_feature_std or directions < self.min_effective_rank
        if collapsed and not self._collapsed and rank() == 0:
            log.warning(
                "step %d: the representation has collapsed (feature std %.4f, below %g is lost; effective rank %.2f of "
                "%d, below %g is lost)",
                trainer.global_step,
                std,
                self.min_feature_std,
                directions,
                embeddings.shape[1],
                self.min_effective_rank,
            )
        self._collapsed = collapsed

    def _report_targets(self, trainer: L.Trainer, sums: Tensor) -> None:
        if not torch.isfinite(sums).all():
            return
        count = sums[-1]
        uncertain, in_use = (sums[-2] / count).item(), effective_prototypes(sums[:-2] / count).item()
        # never below 0 but for rounding: a mean's entropy is at least the mean entropy
        information = max(0.0, math.log(in_use) - uncertain)
        publish(
            trainer,
            {
                "health/teacher_entropy": uncertain,
                "health/effective_prototypes": in_use,
                "health/target_information": information,
            },
        )
        same = information < self.min_target_information
        if same and not self._same_targets and rank() == 0:
            log.warning(
                "step %d: the teacher's targets have collapsed, all images have nearly the same one (they tell %.1e "
                "nats of an image, below %g is lost; entropy %.4f of at most %.2f, %.2f prototypes in use)",
                trainer.global_step,
                information,
                self.min_target_information,
                uncertain,
                math.log(len(sums) - 2),
                in_use,
            )
        self._same_targets = same


def _sums(targets: Tensor) -> Tensor:
    """Targets [..., K] summed up, their entropies summed up, and their number: float64 [K + 2] (float32 on MPS)."""
    rows = targets.flatten(0, -2)
    total = rows.sum(dim=0, dtype=torch.float32 if rows.device.type == "mps" else torch.float64)
    count = total.new_full((1,), len(rows))
    return torch.cat([total, entropy(rows).to(total.dtype) * count, count])


def feature_std(embeddings: Tensor) -> float:
    """Mean over dimensions of the deviation of unit-length embeddings, times sqrt(D): [n, D] -> [0, 1].

    1 is reached where directions are spread evenly over all dimensions around a mean of zero; n equal rows give 0.
    """
    unit = F.normalize(embeddings.float(), dim=1)
    return (unit.std(dim=0, correction=0).mean() * math.sqrt(embeddings.shape[1])).item()


def effective_rank(embeddings: Tensor) -> float:
    """exp of the entropy of the singular values' shares (RankMe): [n, D] -> [1, min(n, D)]; 0 where all are zero."""
    values = torch.linalg.svdvals(embeddings.float())
    if values.sum() == 0:
        return 0.0
    share = values / values.sum()
    return torch.exp(-torch.xlogy(share, share).sum()).item()
