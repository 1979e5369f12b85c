"""LOOK: each image must share its class with its nearest neighbors, so that a class may have several clusters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from src.collectives import gather, gather_rows
from src.datamodules.batches.base import labels_of
from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.joint_embedding.moco_v2 import MoCoV2
from src.models.losses.contrastive import leave_one_out
from src.optim import OptimizerRecipe


class LOOK(MoCoV2):
    """Rethinking Supervised Pre-training for Better Downstream Transferring (Feng et al., 2021), leave-one-out k
    nearest neighbors.

    Deviations: those of `MoCoV2`. The authors published no code; reconstructed are the momentum encoder, that the keys
    of the step are candidates beside the queue, that the nearest image of the own class always is a neighbor, and that
    the key of the own second view replaces it where no other image of the class is there.

    The student's projection of the first view is classified by its k nearest among labelled keys, those of earlier
    images in the queue and of the step's other images, weighted by similarity. The loss is the logarithm of the
    probability of the image's class. Other keys of the image itself are left out. With micro-batches the step's keys
    are those of a micro-batch.

    Args:
        neighbors: k. If it is the number of all candidates, every image of the class attracts, as in `SupCon`.
        temperature: similarities are divided by it.
        others: arguments of `MoCoV2`.

    Raises:
        SettingError: ``neighbors`` is below 1; and as `MoCoV2`.
        BatchError: in a step, an image without a label.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        neighbors: int = 400,
        temperature: float = 0.1,
        **others: Any,
    ) -> None:
        super().__init__(backbone, optimizer, temperature=temperature, **others)
        if neighbors < 1:
            raise SettingError(f"model.neighbors={neighbors} must be at least 1")
        self.neighbors = neighbors

    def compare(self, query: Tensor, key: Tensor, batch: MultiViewBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        label, index = labels_of(batch, "LOOK"), batch["index"]
        keys, offset = gather(key)
        candidates = torch.cat([self.queue.features.to(key.dtype), keys])
        candidate_label = torch.cat([self.queue.column("label"), gather_rows(label)])
        candidate_index = torch.cat([self.queue.column("index"), gather_rows(index)])
        excluded = (index[:, None] == candidate_index) | (candidate_label < 0)
        has_mate = ((label[:, None] == candidate_label) & ~excluded).any(dim=1)
        own = torch.arange(len(key), device=key.device)
        excluded[own, self.queue.size + offset + own] = has_mate
        losses = leave_one_out(
            query,
            candidates,
            label,
            candidate_label,
            excluded,
            neighbors=self.neighbors,
            temperature=self.temperature,
        )
        return losses.mean(), {
            "posterior": (-losses.detach()).exp().mean(),
            "with_class_mate": has_mate.float().mean(),
        }
