"""Barlow Twins: the cross-correlation of two views' embeddings is brought close to the identity."""

from __future__ import annotations

from torch import nn

from src.collectives import all_reduce, world_size
from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, mean_patch
from src.models.functional import feature_std, in_full_precision
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
    its sum over W processes, so that its gradients are 1 / W of these. LARS cancels such a factor for matrices, up to
    their weight decay; biases and norms would take steps W times as long. The recipe has the weight decay times 32 and
    the rate of biases and norms divided by 32, for the authors' 32 GPUs.

    Args:
        backbone: any timm model without a head.
        optimizer: LARS in the paper, with another learning rate for biases and norms.
        off_diagonal_weight: weight of the redundancy reduction term, the paper's lambda.
        hidden_dim: width of the projector's two hidden layers.
        projection_dim: D, width of the projections.
        pool: makes the embedding, which is projected and evaluated, of the backbone's tokens.

    Raises:
        SettingError: a bad value; in a step, a batch without two views of at least two images.
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
            raise SettingError(f"model.off_diagonal_weight={off_diagonal_weight} must not be negative")
        self.off_diagonal_weight = off_diagonal_weight
        self.encoder = ImageEncoder(backbone, pool)
        self.projector = MlpHead((self.encoder.dim, hidden_dim, hidden_dim, projection_dim), last_bias=False)
        self.norm = nn.BatchNorm1d(projection_dim, affine=False)

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        views = two_views(batch)
        h = forward_views_separately(lambda x: self.encoder(x).embedding, views)
        z = forward_views_separately(self.projector, h)
        z1, z2 = forward_views_separately(lambda x: in_full_precision(self.norm, x), z).unbind(dim=1)
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
