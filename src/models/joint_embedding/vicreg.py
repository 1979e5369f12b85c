"""VICReg: invariance between views, variance of every dimension, and no covariance between dimensions."""

from __future__ import annotations

from torch import nn

from src.collectives import gather
from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, mean_patch
from src.models.functional import feature_std
from src.models.heads.mlp import MlpHead
from src.models.joint_embedding.base import JointEmbedding, forward_views_separately, two_views
from src.models.losses.redundancy import vicreg
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe


class VICReg(JointEmbedding):
    """Variance-Invariance-Covariance Regularization (Bardes et al., 2021). Deviations: none.

    Where paper and code differ this follows the code: the squared distance is a mean over dimensions too, to which the
    weights 25, 25 and 1 belong. Variances and covariances are those of the whole batch over all processes (of a
    micro-batch where gradients are accumulated).

    Args:
        backbone: any timm model without a head.
        optimizer: LARS in the paper.
        invariance_weight, variance_weight, covariance_weight: weights of the three terms.
        hidden_dim: width of the two hidden layers of the projector, which the paper calls expander.
        projection_dim: width of the projections.
        pool: makes the embedding, which is projected and evaluated, of the backbone's tokens.

    Raises:
        SettingError: a bad value; in a step, a batch without two views of at least two images.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        hidden_dim: int = 8192,
        projection_dim: int = 8192,
        pool: Pool = mean_patch,
    ) -> None:
        super().__init__(optimizer)
        self.weights = {
            "invariance_weight": invariance_weight,
            "variance_weight": variance_weight,
            "covariance_weight": covariance_weight,
        }
        for name, weight in self.weights.items():
            if weight < 0:
                raise SettingError(f"model.{name}={weight} must not be negative")
        self.encoder = ImageEncoder(backbone, pool)
        self.projector = MlpHead(
            (self.encoder.dim, hidden_dim, hidden_dim, projection_dim), hidden_bias=True, last_bias=False
        )

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        views = two_views(batch)
        h = forward_views_separately(lambda x: self.encoder(x).embedding, views)
        z = forward_views_separately(self.projector, h)
        all_z, _ = gather(z)
        loss, terms = vicreg(z[:, 0], z[:, 1], all_z[:, 0], all_z[:, 1], **self.weights)
        logs = {**terms, "std": feature_std(all_z)}
        return {"loss": loss, "logs": logs, "embedding": h[:, 0].detach().float()}

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": self.encoder}
