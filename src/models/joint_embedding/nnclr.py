"""NNCLR: a contrastive loss whose positive is the nearest neighbor of the other view in a queue of earlier images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from src.collectives import gather
from src.datamodules.batches.base import optional_labels
from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, mean_patch
from src.models.functional import full_precision, l2_normalize
from src.models.heads.mlp import MlpHead
from src.models.joint_embedding.base import JointEmbedding, forward_views_separately, two_views
from src.models.joint_embedding.queue import FeatureQueue
from src.models.losses.contrastive import info_nce
from src.models.losses.row_chunks import MAX_ENTRIES, in_row_chunks
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe


class NNCLR(JointEmbedding):
    """With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual Representations (Dwibedi et
    al., 2021). Deviations: none.

    The projection of a view is replaced by its nearest neighbor in the queue (the paper's support set), which must
    predict the other view of the image among those of all other images. Both views take either part. Neighbors carry no
    gradient. The projections of the first view are enqueued after the step.

    Args:
        backbone: any timm model without a head.
        optimizer: LARS in the paper.
        queue_size: number of projections of earlier images; a multiple of the batch size.
        neighbors: False takes a view's own projection in the place of its nearest neighbor, without gradient: the
            baseline of the claim.
        temperature: similarities are divided by it.
        hidden_dim: width of the projector's hidden layers.
        predictor_dim: width of the predictor's hidden layer.
        projection_dim: width of projections and predictions.
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
        queue_size: int = 98304,
        neighbors: bool = True,
        temperature: float = 0.1,
        hidden_dim: int = 2048,
        predictor_dim: int = 4096,
        projection_dim: int = 256,
        pool: Pool = mean_patch,
    ) -> None:
        super().__init__(optimizer)
        if temperature <= 0:
            raise SettingError(f"model.temperature={temperature} must be above 0")
        self.encoder = ImageEncoder(backbone, pool)
        self.projector = MlpHead(
            (self.encoder.dim, hidden_dim, hidden_dim, projection_dim), hidden_bias=True, last_norm=nn.BatchNorm1d
        )
        self.predictor = MlpHead((projection_dim, predictor_dim, projection_dim), hidden_bias=True)
        self.queue = FeatureQueue(projection_dim, queue_size, columns=("label",))
        self.neighbors = neighbors
        self.temperature = temperature

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        views = two_views(batch)
        h = forward_views_separately(lambda x: self.encoder(x).embedding, views)
        projection = forward_views_separately(self.projector, h)
        prediction = l2_normalize(forward_views_separately(self.predictor, projection))
        z = l2_normalize(projection.detach())
        nearest = nearest_neighbors(z.flatten(0, 1), self.queue.features).unflatten(0, z.shape[:2])
        positive = self.queue.features[nearest] if self.neighbors else z
        p, offset = gather(prediction)
        loss = (
            info_nce(positive[:, 0], p[:, 1], offset, temperature=self.temperature)
            + info_nce(positive[:, 1], p[:, 0], offset, temperature=self.temperature)
        ) / 2
        label = optional_labels(batch)
        logs: dict[str, Tensor | float] = {
            "neighbor_similarity": (z * self.queue.features[nearest]).sum(dim=-1).mean(),
        }
        if self.queue.full and (label >= 0).all():
            logs["neighbor_accuracy"] = (self.queue.column("label")[nearest] == label[:, None]).float().mean()
        self.queue.stage(z[:, 0], label=label)
        return {"loss": loss, "logs": logs, "embedding": h[:, 0].detach().float()}

    def on_train_start(self) -> None:
        self.queue.check_batch_size(self.trainer.datamodule.batch_size)  # type: ignore[attr-defined]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.queue.enqueue()

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": self.encoder}


@torch.no_grad()
@full_precision
def nearest_neighbors(z: Tensor, queue: Tensor, *, max_entries: int = MAX_ENTRIES) -> Tensor:
    """Positions in ``queue`` [K, D] of the vector nearest to each of ``z`` [B, D], all of unit length: int64 [B]."""

    def most_similar(z: Tensor, queue: Tensor) -> Tensor:
        return (z @ queue.T).argmax(dim=1)

    return in_row_chunks(most_similar, [z], [queue], columns=len(queue), max_entries=max_entries)
