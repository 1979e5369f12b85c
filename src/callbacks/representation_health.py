"""Whether the representation is alive: seen on a dashboard and said aloud, before a run is wasted."""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from src.callbacks.publish import publish
from src.collectives import gather_rows, rank, world_size

log = logging.getLogger(__name__)


class RepresentationHealth(L.Callback):
    """Measures ``StepOutput["embedding"]`` over the most recent rows of all processes, every ``every_n_steps`` steps.

    - ``health/feature_std``: `feature_std`, 1 where features point everywhere alike, 0 where they all point one way.
    - ``health/effective_rank``: `effective_rank`, how many directions are in use, at most D.
    - ``health/embedding_norm``: mean length of an embedding.

    Below ``min_feature_std`` or ``min_effective_rank`` the representation counts as collapsed: one line says so, and
    again only after it has recovered. The limits are those of a representation that is lost (all cosines above 0.9999;
    a single direction), not of one that is merely poor, so that a random initialisation does not cry wolf.

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
    ) -> None:
        if every_n_steps < 1 or window < 2:
            raise ValueError("RepresentationHealth: every_n_steps must be at least 1 and window at least 2")
        self.every_n_steps = every_n_steps
        self.window = window
        self.min_feature_std = min_feature_std
        self.min_effective_rank = min_effective_rank
        self._recent: Tensor | None = None
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
        if self._recent is None or step // self.every_n_steps == self._measured_at // self.every_n_steps:
            return
        self._measured_at = step
        self._report(trainer, self._recent)

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self._recent, "measured_at": self._measured_at, "collapsed": self._collapsed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recent = state_dict["recent"]
        self._measured_at = state_dict["measured_at"]
        self._collapsed = state_dict["collapsed"]

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
