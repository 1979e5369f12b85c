"""Barlow Twins: two views of an image agree in every dimension, and no two dimensions say the same."""

from __future__ import annotations

from torch import nn

from src.collectives import all_reduce, world_size
from src.datamodules.batches.image import MultiViewBatch
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, mean_patch
from src.models.functional import feature_std, full_precision
from src.models.heads.mlp import MlpHead
from src.models.joint_embedding.base import JointEmbedding, forward_views_separately, two_views
from src.models.losses.redundancy import barlow_twins, cross_correlation, off_diagonal
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe


class BarlowTwins(JointEmbedding):
    """Self-Supervised Learning via Redundancy Reduction (Zbontar et al., 2021).

    The cross-correlation is that of the whole batch over all processes (of a micro-batch where gradients are
    accumulated).

    Deviations: gradients are those of one process on the whole batch. The authors' code does not differentiate through
    its sum over W processes, so that its gradients are 1 / W of these. Of matrices LARS takes such a factor out; biases
    and norms take steps W times as long at an equal learning rate, which is `optimizer.rules` to change.

    Args:
        backbone: any timm model without a head.
        optimizer: LARS in the paper, with a learning rate of its own for everything with one axis.
        off_diagonal_weight: the paper's lambda.
        hidden_dim: of the projector's two hidden layers.
        projection_dim: D, the side of the matrix.
        pool: what of the backbone's tokens is projected and evaluated.

    Raises:
        SettingError: in a step, where the batch does not have two views of at least two images.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        off_diagonal_weight: float = 0.0051,
        hidden_dim: int = 8192,
        projection_dim: int = 8192,
        pool: Pool = mean_patch,
    ) -> None:
        super().__init__(optimizer)
        if off_diagonal_weight < 0:
            raise ValueError(f"BarlowTwins: off_diagonal_weight must not be negative, got {off_diagonal_weight}")
        self.off_diagonal_weight = off_diagonal_weight
        self.encoder = ImageEncoder(backbone, pool)
        self.projector = MlpHead((self.encoder.dim, hidden_dim, hidden_dim, projection_dim), last_bias=False)
        self.norm = nn.BatchNorm1d(projection_dim, affine=False)

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        views = two_views(batch)
        h = forward_views_separately(lambda x: self.encoder(x).embedding, views)
        z = forward_views_separately(self.projector, h)
        z1, z2 = forward_views_separately(full_precision(self.norm), z).unbind(dim=1)
        correlation = all_reduce(cross_correlation(z1, z2, len(z1) * world_size()))
        loss = barlow_twins(correlation, self.off_diagonal_weight)
        logs = {
            "diagonal": correlation.detach().diagonal().mean(),
            "off_diagonal": off_diagonal(correlation.detach()).square().mean().sqrt(),
            "std": feature_std(z),
        }
        return {"loss": loss, "logs": logs, "embedding": h[:, 0].detach().float()}

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": self.encoder}
