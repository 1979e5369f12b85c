"""SupCon: a contrastive loss between images, whose positives are all images of the same class."""

from __future__ import annotations

from torch import Tensor, nn

from src.collectives import gather, gather_rows
from src.datamodules.batches.base import labels_of
from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, mean_patch
from src.models.functional import l2_normalize
from src.models.heads.mlp import MlpHead
from src.models.joint_embedding.base import JointEmbedding, forward_views_jointly, two_views
from src.models.losses.contrastive import supcon
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe


class SupCon(JointEmbedding):
    """Supervised Contrastive Learning (Khosla et al., 2020). Deviations: none.

    Two views of each image are pulled to all views of all images of the same class and pushed away from the rest. The
    projector is dropped after pretraining; a linear classifier is trained on the frozen encoder.

    Args:
        backbone: any timm model without a head.
        optimizer: SGD in the authors' PyTorch code.
        temperature: similarities are divided by it.
        base_temperature: the loss is multiplied by ``temperature / base_temperature``, as in the authors' code.
        hidden_dim: width of the projector's hidden layer; None for that of the backbone's features.
        projection_dim: width of the projections.
        pool: makes the embedding, which is projected and evaluated, of the backbone's tokens.

    Raises:
        SettingError: a temperature that is not positive; in a step, a batch without two views of at least two images.
        BatchError: in a step, an image without a label.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        temperature: float = 0.1,
        base_temperature: float = 0.07,
        hidden_dim: int | None = None,
        projection_dim: int = 128,
        pool: Pool = mean_patch,
    ) -> None:
        super().__init__(optimizer)
        if min(temperature, base_temperature) <= 0:
            raise SettingError(
                f"model.temperature={temperature} and model.base_temperature={base_temperature} must be above 0"
            )
        self.encoder = ImageEncoder(backbone, pool)
        width = self.encoder.dim
        self.projector = MlpHead((width, hidden_dim or width, projection_dim), hidden_norm=None)
        self.temperature = temperature
        self.base_temperature = base_temperature

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        views, label = two_views(batch), labels_of(batch, "SupCon")
        h = forward_views_jointly(lambda x: self.encoder(x).embedding, views)
        z = l2_normalize(forward_views_jointly(self.projector, h))
        keys, offset = gather(z)
        loss = supcon(z, keys, gather_rows(label), offset, temperature=self.temperature)
        logs: dict[str, Tensor | float] = {"same_class": same_class_share(label)}
        return {
            "loss": self.temperature / self.base_temperature * loss,
            "logs": logs,
            "embedding": h[:, 0].detach().float(),
        }

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": self.encoder}


def same_class_share(label: Tensor) -> Tensor:
    """Share of the other images of this process that have an image's class, mean over images: [B] -> scalar."""
    same = (label[:, None] == label).sum(dim=1) - 1
    return same.float().mean() / (len(label) - 1)
