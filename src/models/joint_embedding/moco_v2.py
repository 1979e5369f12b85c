"""MoCo v2: recognize an image's other view, encoded by a slow copy of oneself, among those of many earlier images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from src.datamodules.batches.image import MultiViewBatch
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
    over processes where the paper shuffles the keys' images between them; both keep a query from recognizing its key by
    the statistics they share.

    The student encodes the first view, the query. The teacher has moved before the step and encodes the second, the
    key, which joins the queue when the step is over.

    Args:
        backbone: any timm model without a head.
        optimizer: SGD in the paper.
        queue_size: keys of earlier steps that serve as negatives; a multiple of the batch.
        temperature: similarities are divided by it.
        hidden_dim: of the projector; None for as wide as the backbone's features.
        projection_dim: width of what is compared.
        teacher_momentum: of the moving average.
        pool: what of the backbone's tokens is projected and evaluated.

    Raises:
        SettingError: at start, where the queue is no multiple of the batch; in a step, where the batch does not have
            two views of at least two images.
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
            raise ValueError(f"{type(self).__name__}: temperature must be above 0, got {temperature}")
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
        self.queue.hold(key, index=batch["index"], label=batch["label"])
        return {"loss": loss, "logs": logs, "embedding": h.detach().float()}

    def compare(self, query: Tensor, key: Tensor, batch: MultiViewBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss of unit vectors [B, D] against the queue, and what else to log."""
        loss = queue_info_nce(query, key, self.queue.features, temperature=self.temperature)
        return loss, {"proxy_accuracy": contrastive_accuracy(query, key, self.queue.features)}

    def on_train_start(self) -> None:
        self.queue.refuse(self.trainer.datamodule.batch_size)  # type: ignore[attr-defined]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.queue.push()

    def teacher_pairs(self) -> list[TeacherPair]:
        return [TeacherPair(self.student, self.teacher)]

    def encoders(self) -> dict[str, Encoder]:
        return {"student": self.student["encoder"], "teacher": self.teacher["encoder"]}  # type: ignore[dict-item]
