"""MoCo v2: a contrastive loss with keys from a momentum encoder, and a queue of earlier keys as negatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from src.datamodules.batches.base import optional_labels
from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, mean_patch
from src.models.functional import l2_normalize
from src.models.heads.mlp import MlpHead
from src.models.joint_embedding.base import JointEmbedding, two_views
from src.models.joint_embedding.queue import FeatureQueue
from src.models.losses.contrastive import contrastive_accuracy, queue_info_nce
from src.models.pretrain_module import StepOutput
from src.models.teacher import TeacherPair, teacher_of
from src.optim import OptimizerRecipe


class MoCoV2(JointEmbedding):
    """Improved Baselines with Momentum Contrastive Learning (Chen et al., 2020). Deviations: batch norm is synchronized
    over processes, where the paper shuffles the keys' images between them; both keep a query from recognizing its key
    by shared batch statistics.

    The student encodes the first view, the query. The teacher (momentum encoder) has moved before the step and encodes
    the second view, the key, which is enqueued at the end of the step.

    Args:
        backbone: any timm model without a head.
        optimizer: SGD in the paper.
        queue_size: number of keys of earlier steps, the negatives; a multiple of the batch size.
        temperature: similarities are divided by it.
        hidden_dim: width of the projector's hidden layer; None for that of the backbone's features.
        projection_dim: width of the projections.
        teacher_momentum: momentum of the moving average.
        pool: makes the embedding, which is projected and evaluated, of the backbone's tokens.

    Raises:
        SettingError: a bad value; at start, a queue size that is not a multiple of the batch size; in a step, a batch
            without two views of at least two images.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        queue_size: int = 65536,
        temperature: float = 0.2,
        hidden_dim: int | None = None,
        projection_dim: int = 128,
        teacher_momentum: float = 0.999,
        pool: Pool = mean_patch,
    ) -> None:
        super().__init__(optimizer)
        if temperature <= 0:
            raise SettingError(f"model.temperature={temperature} must be above 0")
        encoder = ImageEncoder(backbone, pool)
        width = encoder.dim
        projector = MlpHead((width, hidden_dim or width, projection_dim), hidden_norm=None)
        self.student = nn.ModuleDict({"encoder": encoder, "projector": projector})
        self.teacher = teacher_of(self.student)
        self.queue = FeatureQueue(projection_dim, queue_size, columns=("index", "label"))
        self.temperature = temperature
        self.teacher_momentum = teacher_momentum

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        first, second = two_views(batch).unbind(dim=1)
        h = self.student["encoder"](first).embedding
        query = l2_normalize(self.student["projector"](h))
        with torch.no_grad():
            key = l2_normalize(self.teacher["projector"](self.teacher["encoder"](second).embedding))
        loss, logs = self.compare(query, key, batch)
        self.queue.stage(key, index=batch["index"], label=optional_labels(batch))
        return {"loss": loss, "logs": logs, "embedding": h.detach().float()}

    def compare(self, query: Tensor, key: Tensor, batch: MultiViewBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Returns the loss of normalized queries and keys [B, D] against the queue, and further scalars for the log."""
        loss = queue_info_nce(query, key, self.queue.features, temperature=self.temperature)
        return loss, {"proxy_accuracy": contrastive_accuracy(query, key, self.queue.features)}

    def on_train_start(self) -> None:
        self.queue.check_batch_size(self.trainer.datamodule.batch_size)  # type: ignore[attr-defined]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.queue.enqueue()

    def teacher_pairs(self) -> list[TeacherPair]:
        return [TeacherPair(self.student, self.teacher)]

    def encoders(self) -> dict[str, Encoder]:
        return {"student": self.student["encoder"], "teacher": self.teacher["encoder"]}  # type: ignore[dict-item]
