"""MoCo v3: recognize an image's other view, as a slow copy of oneself encodes it, among those of a large batch."""

from __future__ import annotations

from functools import partial

import torch
from timm.models import named_apply
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_moco
from torch import nn

from src.collectives import gather
from src.datamodules.batches.image import MultiViewBatch
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, mean_patch
from src.models.backbones.positions import fixed_positions
from src.models.functional import l2_normalize
from src.models.heads.mlp import MlpHead
from src.models.joint_embedding.base import JointEmbedding, forward_views_separately, two_views
from src.models.losses.contrastive import moco_v3_loss
from src.models.pretrain_module import StepOutput
from src.models.teacher import TeacherPair, teacher_of
from src.optim import OptimizerRecipe


class MoCoV3(JointEmbedding):
    """An Empirical Study of Training Self-Supervised Vision Transformers (Chen et al., 2021). Deviations: none.

    Student and predictor make the queries, the teacher, which has moved before the step, the keys, of both views each.
    A query is to recognize the key of its image's other view among those of all images. A ViT is initialized anew with
    fixed sine-cosine positions, and its patch projection stays the random one it begins with, which the paper found to
    keep training stable.

    Args:
        backbone: any timm model without a head; a ViT has a class token.
        optimizer: AdamW for ViTs, LARS for ResNets in the paper.
        temperature: similarities are divided by it.
        hidden_dim: of projector and predictor.
        projection_dim: width of what is compared.
        projector_layers: 3 for ViTs, 2 for ResNets in the paper.
        predictor_norm: a batch norm on what is predicted, for ViTs in the paper.
        frozen_patches: leave a ViT's patch projection untrained.
        teacher_momentum: of the moving average; the paper raises it to 1 along a cosine.
        pool: what of the backbone's tokens is projected and evaluated; the class token in the paper.

    Raises:
        SettingError: in a step, where the batch does not have two views of at least two images.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        temperature: float = 0.2,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        projector_layers: int = 3,
        predictor_norm: bool = True,
        frozen_patches: bool = True,
        teacher_momentum: float = 0.99,
        pool: Pool = mean_patch,
    ) -> None:
        super().__init__(optimizer)
        if temperature <= 0:
            raise ValueError(f"MoCoV3: temperature must be above 0, got {temperature}")
        if projector_layers < 1:
            raise ValueError(f"MoCoV3: projector_layers must be at least 1, got {projector_layers}")
        if isinstance(backbone, VisionTransformer):
            prepare(backbone, frozen_patches=frozen_patches)
        encoder = ImageEncoder(backbone, pool)
        plain = partial(nn.BatchNorm1d, affine=False)
        dims = (encoder.dim, *[hidden_dim] * (projector_layers - 1), projection_dim)
        projector = MlpHead(dims, last_bias=False, last_norm=plain)
        self.student = nn.ModuleDict({"encoder": encoder, "projector": projector})
        self.teacher = teacher_of(self.student)
        self.predictor = MlpHead(
            (projection_dim, hidden_dim, projection_dim), last_bias=False, last_norm=plain if predictor_norm else None
        )
        self.temperature = temperature
        self.teacher_momentum = teacher_momentum

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        views = two_views(batch)
        h = forward_views_separately(lambda x: self.student["encoder"](x).embedding, views)
        query = l2_normalize(forward_views_separately(lambda x: self.predictor(self.student["projector"](x)), h))
        with torch.no_grad():
            key = l2_normalize(
                forward_views_separately(
                    lambda x: self.teacher["projector"](self.teacher["encoder"](x).embedding), views
                )
            )
        keys, offset = gather(key)
        loss = moco_v3_loss(query[:, 0], keys[:, 1], offset, temperature=self.temperature)
        loss = loss + moco_v3_loss(query[:, 1], keys[:, 0], offset, temperature=self.temperature)
        positive = (query * key.flip(1)).sum(dim=-1).mean()
        return {"loss": loss, "logs": {"positive": positive.detach()}, "embedding": h[:, 0].detach().float()}

    def teacher_pairs(self) -> list[TeacherPair]:
        return [TeacherPair(self.student, self.teacher)]

    def encoders(self) -> dict[str, Encoder]:
        return {"student": self.student["encoder"], "teacher": self.teacher["encoder"]}  # type: ignore[dict-item]


def prepare(vit: VisionTransformer, *, frozen_patches: bool) -> None:
    """The paper's ViT: Xavier-uniform layers (query, key and value each for itself) and patch projection, a class token
    close to zero, fixed positions."""
    named_apply(init_weights_vit_moco, vit)
    projection = vit.patch_embed.proj
    nn.init.xavier_uniform_(projection.weight.view(len(projection.weight), -1))
    nn.init.zeros_(projection.bias)
    projection.requires_grad_(not frozen_patches)
    nn.init.normal_(vit.get_parameter("cls_token"), std=1e-6)
    vit.pos_embed = fixed_positions(vit.embed_dim, vit.patch_embed.grid_size)
