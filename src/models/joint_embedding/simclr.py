"""SimCLR: a contrastive loss between two views of an image, with all other images of the batch as negatives."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from src.collectives import gather
from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, mean_patch
from src.models.functional import l2_normalize
from src.models.heads.mlp import MlpHead, batch_norm_without_shift
from src.models.joint_embedding.base import JointEmbedding, forward_views_jointly, two_views
from src.models.losses.contrastive import nt_xent
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe


class ContrastiveLoss(Protocol):
    """A loss of the unit vectors of this process [B, V, D] and of all processes [N, V, D]; ``offset`` is the first row
    of this process in ``keys``."""

    def __call__(self, z: Tensor, keys: Tensor, offset: int, *, temperature: float) -> Tensor: ...


class SimCLR(JointEmbedding):
    """A Simple Framework for Contrastive Learning of Visual Representations (Chen et al., 2020). Deviations: none.

    The projector is the paper's, of two layers. As in the authors' code a batch norm without shift follows it, its
    linear layers start from N(0, 0.01), and the loss is the sum over the two views. The loss `dcl` makes it Decoupled
    Contrastive Learning (Yeh et al., 2021), `dclw` its weighted form.

    Args:
        backbone: any timm model without a head.
        optimizer: LARS in the paper.
        loss: loss of the normalized projections.
        temperature: similarities are divided by it.
        hidden_dim: width of the projector's hidden layer; None for that of the backbone's features.
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
        loss: ContrastiveLoss = nt_xent,
        temperature: float = 0.1,
        hidden_dim: int | None = None,
        projection_dim: int = 128,
        pool: Pool = mean_patch,
    ) -> None:
        super().__init__(optimizer)
        if temperature <= 0:
            raise SettingError(f"model.temperature={temperature} must be above 0")
        self.loss = loss
        self.temperature = temperature
        self.encoder = ImageEncoder(backbone, pool)
        width = self.encoder.dim
        self.projector = MlpHead(
            (width, hidden_dim or width, projection_dim), last_bias=False, last_norm=batch_norm_without_shift
        )
        for layer in self.projector.layers:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        views = two_views(batch)
        h = forward_views_jointly(lambda x: self.encoder(x).embedding, views)
        z = l2_normalize(forward_views_jointly(self.projector, h))
        keys, offset = gather(z)
        loss = self.loss(z, keys, offset, temperature=self.temperature)
        positive = (z[:, 0] * z[:, 1]).sum(dim=-1).mean()
        return {"loss": loss, "logs": {"positive": positive.detach()}, "embedding": h[:, 0].detach().float()}

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": self.encoder}
