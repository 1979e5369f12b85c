"""BYOL: predict the momentum encoder's projection of the other view, without negatives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.datamodules.batches.image import MultiViewBatch
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, mean_patch
from src.models.functional import l2_normalize
from src.models.heads.mlp import MlpHead
from src.models.joint_embedding.base import JointEmbedding, forward_views_separately, two_views
from src.models.pretrain_module import StepOutput
from src.models.teacher import TeacherPair, teacher_of
from src.optim import OptimizerRecipe


class BYOL(JointEmbedding):
    """Bootstrap Your Own Latent (Grill et al., 2020).

    Deviations: the teacher starts as a copy of the student; the authors draw it anew and saw no difference.

    Student and teacher (the paper's online and target network) encode both views, each in a forward pass of its own.
    The teacher is the momentum encoder with its projector; it moves after every update, and its batch norms keep their
    own statistics.

    Args:
        backbone: any timm model without a head.
        optimizer: LARS in the paper.
        hidden_dim: width of the hidden layers of projector and predictor.
        projection_dim: width of projections and predictions.
        teacher_momentum: momentum of the moving average; the paper raises it to 1 along a cosine.
        pool: makes the embedding, which is projected and evaluated, of the backbone's tokens.

    Raises:
        SettingError: a bad value; in a step, a batch without two views of at least two images.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        teacher_momentum: float = 0.996,
        pool: Pool = mean_patch,
    ) -> None:
        super().__init__(optimizer)
        encoder = ImageEncoder(backbone, pool)
        projector = MlpHead((encoder.dim, hidden_dim, projection_dim), hidden_bias=True, last_bias=False)
        self.student = nn.ModuleDict({"encoder": encoder, "projector": projector})
        self.teacher = teacher_of(self.student)
        self.predictor = MlpHead((projection_dim, hidden_dim, projection_dim), hidden_bias=True, last_bias=False)
        self.teacher_momentum = teacher_momentum

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        views = two_views(batch)
        h = forward_views_separately(lambda x: self.student["encoder"](x).embedding, views)
        prediction = forward_views_separately(lambda x: self.predictor(self.student["projector"](x)), h)
        with torch.no_grad():
            target = forward_views_separately(
                lambda x: self.teacher["projector"](self.teacher["encoder"](x).embedding), views
            )
        loss = regression(prediction, target.flip(1))
        return {"loss": loss, "embedding": h[:, 0].detach().float()}

    def teacher_pairs(self) -> list[TeacherPair]:
        return [TeacherPair(self.student, self.teacher)]

    def encoders(self) -> dict[str, Encoder]:
        return {"student": self.student["encoder"], "teacher": self.teacher["encoder"]}  # type: ignore[dict-item]


def regression(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared distance of normalized vectors, 2 - 2 cos, summed over views, mean over images: [B, V, D], [B, V, D] ->
    scalar."""
    return (2 - 2 * (l2_normalize(prediction) * l2_normalize(target)).sum(dim=-1)).sum(dim=1).mean()
