"""SimSiam: predict the projection of the other view behind a stop-gradient, without negatives or a momentum encoder."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from src.datamodules.batches.image import MultiViewBatch
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, mean_patch
from src.models.functional import feature_std, full_precision, l2_normalize
from src.models.heads.mlp import MlpHead
from src.models.joint_embedding.base import JointEmbedding, forward_views_separately, two_views
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe


class SimSiam(JointEmbedding):
    """Exploring Simple Siamese Representation Learning (Chen and He, 2020). Deviations: none.

    Both views go through the same encoder and projector, each in a forward pass of its own. The predictor's learning
    rate stays constant: the recipe's rule says so, as the authors' recommended command does.

    Args:
        backbone: any timm model without a head.
        optimizer: SGD in the paper.
        projection_dim: width of the projections and of the projector's hidden layers.
        predictor_dim: width of the predictor's hidden layer, a quarter of the projections' in the paper.
        stop_gradient: False also trains the targets, with which the paper shows collapse.
        pool: makes the embedding, which is projected and evaluated, of the backbone's tokens.

    Raises:
        SettingError: a bad value; in a step, a batch without two views of at least two images.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        projection_dim: int = 2048,
        predictor_dim: int = 512,
        stop_gradient: bool = True,
        pool: Pool = mean_patch,
    ) -> None:
        super().__init__(optimizer)
        self.encoder = ImageEncoder(backbone, pool)
        width = self.encoder.dim
        self.projector = MlpHead(
            (width, width, width, projection_dim), last_bias=False, last_norm=partial(nn.BatchNorm1d, affine=False)
        )
        self.predictor = MlpHead((projection_dim, predictor_dim, projection_dim))
        self.stop_gradient = stop_gradient

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        views = two_views(batch)
        h = forward_views_separately(lambda x: self.encoder(x).embedding, views)
        z = forward_views_separately(self.projector, h)
        p = forward_views_separately(self.predictor, z)
        target = z.detach() if self.stop_gradient else z
        loss = negative_cosine(p, target.flip(1))
        logs = {"std": feature_std(l2_normalize(z))}
        return {"loss": loss, "logs": logs, "embedding": h[:, 0].detach().float()}

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": self.encoder}


@full_precision
def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Negative cosine similarity, mean over views and images: [B, V, D], [B, V, D] -> scalar, -1 at best."""
    return -(l2_normalize(p) * l2_normalize(z)).sum(dim=-1).mean()
