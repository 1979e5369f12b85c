"""MoCo v3: a contrastive loss with keys from a momentum encoder, and the other images of a large batch as negatives."""

from __future__ import annotations

from functools import partial

import torch
from timm.models import named_apply
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_moco
from torch import nn

from src.collectives import gather
from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, mean_patch
from src.models.backbones.plain_vit import check_plain_vit
from src.models.backbones.positions import fixed_positions, position_count
from src.models.functional import l2_normalize
from src.models.heads.mlp import MlpHead
from src.models.joint_embedding.base import JointEmbedding, forward_views_separately, two_views
from src.models.losses.contrastive import moco_v3_loss
from src.models.pretrain_module import StepOutput
from src.models.teacher import TeacherPair, teacher_of
from src.optim import OptimizerRecipe


class MoCoV3(JointEmbedding):
    """An Empirical Study of Training Self-Supervised Vision Transformers (Chen et al., 2021). Deviations: none.

    Student and predictor make a query of each view; the teacher (momentum encoder), which has moved before the step,
    makes a key of each view. The positive of a query is the key of its image's other view. A ViT is initialized anew
    with fixed sine-cosine positional embeddings and a random patch embedding that is not trained, which the paper found
    to keep training stable.

    Args:
        backbone: any timm model without a head; with ``frozen_patches`` a plain ViT or a network without patches.
        optimizer: AdamW for ViTs, LARS for ResNets in the paper.
        temperature: similarities are divided by it.
        hidden_dim: width of the hidden layers of projector and predictor.
        projection_dim: width of the projections.
        projector_layers: number of linear layers of the projector: 3 for ViTs, 2 for ResNets in the paper.
        predictor_norm: a batch norm on the predictor's output, for ViTs in the paper.
        frozen_patches: do not train a ViT's patch embedding.
        teacher_momentum: momentum of the moving average; the paper raises it to 1 along a cosine.
        pool: makes the embedding, which is projected and evaluated, of the backbone's tokens; the class token in the
            paper.

    Raises:
        SettingError: a bad value; in a step, a batch without two views of at least two images.
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
            raise SettingError(f"model.temperature={temperature} must be above 0")
        if projector_layers < 1:
            raise SettingError(f"model.projector_layers={projector_layers} must be at least 1")
        if frozen_patches and hasattr(backbone, "patch_embed"):
            check_plain_vit(backbone, "MoCo v3 with model.frozen_patches=true")
        if isinstance(backbone, VisionTransformer):
            initialize_vit(backbone, frozen_patches=frozen_patches)
        encoder = ImageEncoder(backbone, pool)
        norm_without_affine = partial(nn.BatchNorm1d, affine=False)
        dims = (encoder.dim, *[hidden_dim] * (projector_layers - 1), projection_dim)
        projector = MlpHead(dims, last_bias=False, last_norm=norm_without_affine)
        self.student = nn.ModuleDict({"encoder": encoder, "projector": projector})
        self.teacher = teacher_of(self.student)
        self.predictor = MlpHead(
            (projection_dim, hidden_dim, projection_dim),
            last_bias=False,
            last_norm=norm_without_affine if predictor_norm else None,
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


def initialize_vit(vit: VisionTransformer, *, frozen_patches: bool) -> None:
    """Initializes a ViT as the paper does: Xavier-uniform linear layers (query, key and value separately) and patch
    embedding, a class token close to zero, fixed sine-cosine positional embeddings."""
    named_apply(init_weights_vit_moco, vit)
    patch_embed = vit.patch_embed.proj
    nn.init.xavier_uniform_(patch_embed.weight.view(len(patch_embed.weight), -1))
    if patch_embed.bias is not None:
        nn.init.zeros_(patch_embed.bias)
    patch_embed.requires_grad_(not frozen_patches)
    if vit.cls_token is not None:
        nn.init.normal_(vit.cls_token, std=1e-6)
    vit.pos_embed = fixed_positions(
        vit.embed_dim, vit.patch_embed.grid_size, prefix_tokens=position_count(vit), rows_first=True
    )
