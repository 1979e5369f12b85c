"""MoCHi: MoCo v2 with synthetic hard negatives, mixed from the hardest negatives of the queue."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from src.datamodules.batches.base import optional_labels
from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.backbones.image_encoder import Pool, mean_patch
from src.models.joint_embedding.moco_v2 import MoCoV2
from src.models.losses.contrastive import contrastive_accuracy, mix_hard_negatives, queue_info_nce
from src.optim import OptimizerRecipe


class MoCHi(MoCoV2):
    """Hard Negative Mixing for Contrastive Learning (Kalantidis et al., 2020). Deviations: those of `MoCoV2`.

    Each query gets synthetic negatives, mixed from pairs of its hardest negatives in the queue and from a hard negative
    and the query itself; they take no gradient and are not enqueued. Mixing begins when the queue is full and a
    schedule has set ``mixing`` to 1 (``schedules.mixing``, after a warm-up of plain MoCo).

    Args:
        hardest: N, number of the queue's keys most similar to a query, from which negatives are mixed.
        pairs: s, number of negatives mixed from two of them.
        with_query: s', number of negatives mixed from one of them and the query.
        mixing: 1 to mix negatives, 0 for plain MoCo v2.
        exclude_own: exclude the keys of the query's own image in earlier epochs from the negatives; for datasets so
            small that the queue still holds them.
        queue_size, temperature, hidden_dim, projection_dim, teacher_momentum, pool: as in `MoCoV2`.

    Raises:
        SettingError: ``hardest`` is not between 1 and the queue's size, or a number of negatives is negative; at start,
            fewer than ``hardest`` keys could remain once those of the query's own image are excluded; and as `MoCoV2`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        hardest: int = 1024,
        pairs: int = 1024,
        with_query: int = 128,
        mixing: float = 1.0,
        exclude_own: bool = False,
        queue_size: int = 65536,
        temperature: float = 0.2,
        hidden_dim: int | None = None,
        projection_dim: int = 128,
        teacher_momentum: float = 0.999,
        pool: Pool = mean_patch,
    ) -> None:
        super().__init__(
            backbone,
            optimizer,
            queue_size=queue_size,
            temperature=temperature,
            hidden_dim=hidden_dim,
            projection_dim=projection_dim,
            teacher_momentum=teacher_momentum,
            pool=pool,
        )
        if not 0 < hardest <= self.queue.size:
            raise SettingError(f"model.hardest={hardest} must lie between 1 and model.queue_size={self.queue.size}")
        if min(pairs, with_query) < 0 or not pairs + with_query:
            raise SettingError(
                f"model.pairs={pairs} and model.with_query={with_query}: neither below 0, and one of them above"
            )
        self.hardest = hardest
        self.pairs = pairs
        self.with_query = with_query
        self.mixing = mixing
        self.exclude_own = exclude_own

    def on_train_start(self) -> None:
        super().on_train_start()
        batch = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        images = int(self.trainer.num_training_batches) // self.trainer.accumulate_grad_batches * batch
        copies = -(-self.queue.size // images) + 1  # an image is at most so often in the queue, as epochs are shuffled
        if self.exclude_own and self.hardest + copies > self.queue.size:
            raise SettingError(
                f"model.hardest={self.hardest} must be at most model.queue_size={self.queue.size} minus the up to "
                f"{copies} keys of a query's own image, which model.exclude_own excludes"
            )

    def compare(self, query: Tensor, key: Tensor, batch: MultiViewBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        queue = self.queue.features
        excluded = batch["index"][:, None] == self.queue.column("index") if self.exclude_own else None
        synthetic = self.mix(query, excluded) if self.mixing and self.queue.full else None
        loss = queue_info_nce(query, key, queue, temperature=self.temperature, synthetic=synthetic, excluded=excluded)
        accuracy = partial(contrastive_accuracy, query, key, queue, excluded=excluded)
        logs: dict[str, Tensor | float] = {
            "proxy_accuracy": accuracy(),
            "proxy_accuracy_mixed": accuracy(synthetic=synthetic),
        }
        label = optional_labels(batch)
        if self.queue.full and (label >= 0).all():
            logs["false_negatives"] = self.false_negatives(query, excluded, label)
        return loss, logs

    @torch.no_grad()
    def mix(self, query: Tensor, excluded: Tensor | None) -> Tensor:
        """Mixes the synthetic negatives of each query, of unit length: [B, s + s', D]."""
        uniform = torch.rand(len(query), 3 * self.pairs + 2 * self.with_query, device=query.device)
        return mix_hard_negatives(
            query,
            self.queue.features,
            uniform,
            hardest=self.hardest,
            pairs=self.pairs,
            with_query=self.with_query,
            excluded=excluded,
        )

    @torch.no_grad()
    def false_negatives(self, query: Tensor, excluded: Tensor | None, label: Tensor) -> Tensor:
        """Returns the share of the hardest negatives that have the query's class, for the log."""
        similarity = query.detach() @ self.queue.features.to(query.dtype).T
        if excluded is not None:
            similarity = similarity.masked_fill(excluded, -torch.inf)
        nearest = similarity.topk(self.hardest).indices
        return (self.queue.column("label")[nearest] == label[:, None]).float().mean()
