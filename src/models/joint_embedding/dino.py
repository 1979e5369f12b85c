"""DINO: self-distillation, a student matches the momentum encoder's distribution over prototypes on other crops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, cls_token_or_mean
from src.models.backbones.layout import explained
from src.models.backbones.positions import accept_any_image_size, dino_positions
from src.models.heads.dino import DINOHead
from src.models.joint_embedding.base import JointEmbedding, forward_views_jointly
from src.models.joint_embedding.center import Center
from src.models.layers.initialization import start_class_token
from src.models.losses.distillation import (
    cross_view_cross_entropy,
    divergence,
    effective_prototypes,
    entropy,
    sharpen,
)
from src.models.pretrain_module import StepOutput
from src.models.teacher import TeacherPair, disable_drop_path, teacher_of
from src.optim import OptimizerRecipe


class DINO(JointEmbedding):
    """Emerging Properties in Self-Supervised Vision Transformers (Caron et al., 2021). Deviations: none.

    The teacher (momentum encoder) receives only global crops, without drop-path or gradient. Centering keeps its scores
    from collapsing to one prototype, sharpening by a low temperature from collapsing to a uniform distribution. The
    recipe's callbacks clip the gradient of each parameter on its own and freeze the prototypes for the first epoch.

    Args:
        backbone: any timm model without a head; a ViT interpolates its positional embeddings for local crops, and its
            class token starts with a standard deviation of 0.02, as the authors'.
        optimizer: AdamW in the paper, with a weight decay that rises along a cosine.
        prototypes: K, number of prototypes.
        hidden_dim, bottleneck_dim: widths of the projection head.
        train_gain: learn the prototypes' norms, as the authors do for ViT-S.
        student_temperature, teacher_temperature: scores are divided by them; the paper warms the teacher's up.
        teacher_momentum: momentum of the moving average; the paper raises it to 1 along a cosine.
        center_momentum: momentum of the center; with 1 it stays zero, which is no centering.
        pool: makes the embedding, which is projected and evaluated, of the backbone's tokens.

    Raises:
        SettingError: a temperature that is not positive; in a step, fewer than two global crops.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        train_gain: bool = False,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        teacher_momentum: float = 0.996,
        center_momentum: float = 0.9,
        pool: Pool = cls_token_or_mean,
    ) -> None:
        super().__init__(optimizer)
        if min(student_temperature, teacher_temperature) <= 0:
            raise SettingError(
                f"model.student_temperature={student_temperature} and model.teacher_temperature={teacher_temperature} "
                "must be above 0"
            )
        start_class_token(backbone)
        encoder = ImageEncoder(accept_any_image_size(backbone, interpolation=dino_positions), pool)
        head = DINOHead(
            encoder.dim, prototypes, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, train_gain=train_gain
        )
        self.student = nn.ModuleDict({"encoder": encoder, "head": head})
        self.teacher = disable_drop_path(teacher_of(self.student))
        self.center = Center(prototypes, center_momentum)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.teacher_momentum = teacher_momentum

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        views = global_views(batch)
        h = forward_views_jointly(lambda x: self.student["encoder"](x).embedding, views)
        scores = torch.cat([self.student["head"](h), self.local_scores(batch)], dim=1)
        with torch.no_grad():
            teacher_h = forward_views_jointly(lambda x: self.teacher["encoder"](x).embedding, views)
            teacher_scores = self.teacher["head"](teacher_h)
        targets = sharpen(teacher_scores, self.center(), self.teacher_temperature)
        self.center.observe(teacher_scores)
        loss = cross_view_cross_entropy(targets, scores, self.student_temperature)
        return {
            "loss": loss,
            "logs": self.collapse_metrics(targets, scores[:, : views.shape[1]].detach()),
            "embedding": h[:, 0].detach().float(),
            "targets": targets,
        }

    def local_scores(self, batch: MultiViewBatch) -> Tensor:
        """The student's scores of the L local crops, L possibly 0: [B, L, K]."""
        if "local_views" not in batch:
            return self.center().new_zeros(len(batch["views"]), 0, len(self.center()))
        h = forward_views_jointly(lambda x: self.student["encoder"](x).embedding, batch["local_views"])
        return self.student["head"](h)

    def collapse_metrics(self, targets: Tensor, scores: Tensor) -> dict[str, Tensor | float]:
        """The paper's two signs of collapse, the entropy of the targets and their divergence from the scores of the
        views in reverse order, and the number of prototypes in use: [B, V, K], [B, V, K]."""
        return {
            "teacher_entropy": entropy(targets),
            "divergence": divergence(targets.flip(1), scores, self.student_temperature),
            "effective_prototypes": effective_prototypes(targets.flatten(0, -2).mean(dim=0)),
        }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.center.update()

    def teacher_pairs(self) -> list[TeacherPair]:
        return [TeacherPair(self.student, self.teacher)]

    def encoders(self) -> dict[str, Encoder]:
        return {"student": self.student["encoder"], "teacher": self.teacher["encoder"]}  # type: ignore[dict-item]

    def visualize(self, batch: MultiViewBatch) -> Mapping[str, Tensor]:
        """The views and, for a ViT, the attention of the teacher's class token in the first of them, head by head."""
        visualizations = dict(super().visualize(batch))
        attended = attended_images(self.teacher["encoder"].backbone, batch["views"][:, 0])  # type: ignore[arg-type]
        return visualizations if attended is None else {**visualizations, "attention": attended}


def global_views(batch: MultiViewBatch) -> Tensor:
    """Returns the global crops, which the teacher encodes: [B, V, 3, H, W].

    Raises:
        SettingError: there are fewer than two.
    """
    if batch["views"].shape[1] < 2:
        raise SettingError(
            "data.train_view: this method predicts one view of an image from another and needs at least 2 in "
            f"train_view.views, but the batch has {batch['views'].shape[1]}"
        )
    return batch["views"]


def attended_images(backbone: nn.Module, image: Tensor) -> Tensor | None:
    """Returns images beside themselves under the attention of the class token, head by head: [B, 3, H, W] -> [B, 1 +
    heads, 3, H, W]. None as in `class_attention`."""
    attention = class_attention(backbone, image)
    if attention is None:
        return None
    maps = F.interpolate(attention, size=image.shape[-2:], mode="nearest").unsqueeze(2)
    maps = maps / maps.amax(dim=(-2, -1), keepdim=True)
    return torch.cat([image[:, None], image[:, None] * maps], dim=1)


def class_attention(backbone: nn.Module, image: Tensor) -> Tensor | None:
    """Returns the attention of the class token to the patches in the last block, head by head: [B, 3, H, W] ->
    [B, heads, rows, columns]. None for a backbone that is not a plain ViT with a class token."""
    if not isinstance(backbone, VisionTransformer) or backbone.cls_token is None:
        return None
    attn: Any = getattr(backbone.blocks[-1], "attn", None)
    if not hasattr(attn, "qkv"):
        return None
    outputs: list[Tensor] = []
    handle = attn.qkv.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        with explained(backbone, image):
            backbone.forward_features(image)
    finally:
        handle.remove()
    q, k, _ = outputs[0].unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    weights = (q[:, :, :1] @ k.transpose(-2, -1) * attn.scale).softmax(dim=-1)[:, :, 0]
    grid = backbone.patch_embed.dynamic_feat_size(image.shape[-2:])
    return weights[:, :, backbone.num_prefix_tokens :].unflatten(-1, grid).float()
