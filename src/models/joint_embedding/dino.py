"""DINO: say of every crop what a slow copy of oneself says of the whole image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, cls_token_or_mean
from src.models.backbones.positions import any_size
from src.models.heads.dino import DINOHead
from src.models.joint_embedding.base import JointEmbedding, forward_views_jointly
from src.models.joint_embedding.center import Center
from src.models.losses.distillation import (
    cross_view_cross_entropy,
    divergence,
    effective_prototypes,
    entropy,
    sharpen,
)
from src.models.pretrain_module import StepOutput
from src.models.teacher import TeacherPair, teacher_of
from src.optim import OptimizerRecipe


class DINO(JointEmbedding):
    """Emerging Properties in Self-Supervised Vision Transformers (Caron et al., 2021).

    Deviations: the teacher's temperature rises by steps rather than by epochs.

    The teacher sees the global views alone, and neither drop-path nor gradient. Its scores are centered by their running
    mean, against one prototype taking all, and sharpened by a low temperature, against all being alike. The recipe's
    callbacks clip each parameter's gradient on its own and keep the prototypes still for the first epoch.

    Args:
        backbone: any timm model without a head; a ViT interpolates its positions for local views.
        optimizer: AdamW in the paper, its weight decay raised along a cosine.
        prototypes: K, the width of what is predicted.
        hidden_dim, bottleneck_dim: of the head.
        train_gain: let the prototypes' lengths be learned, as the authors do for ViT-S.
        student_temperature, teacher_temperature: scores are divided by them; the paper warms the second one up.
        teacher_momentum: of the moving average; the paper raises it to 1 along a cosine.
        center_momentum: of the center; with 1 it stays at zero, which is no centering.
        pool: what of the backbone's tokens is compared and evaluated.

    Raises:
        SettingError: a temperature that is not positive; in a step, fewer than two global views.
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
        encoder = ImageEncoder(any_size(backbone), pool)
        head = DINOHead(
            encoder.dim, prototypes, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, train_gain=train_gain
        )
        self.student = nn.ModuleDict({"encoder": encoder, "head": head})
        self.teacher = without_drop_path(teacher_of(self.student))
        self.center = Center(prototypes, center_momentum)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.teacher_momentum = teacher_momentum

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        views = global_views(batch)
        h = forward_views_jointly(lambda x: self.student["encoder"](x).embedding, views)
        scores = torch.cat([self.student["head"](h), self.local_scores(batch)], dim=1)
        with torch.no_grad():
            slow = self.teacher["head"](forward_views_jointly(lambda x: self.teacher["encoder"](x).embedding, views))
        targets = sharpen(slow, self.center(), self.teacher_temperature)
        self.center.observe(slow)
        loss = cross_view_cross_entropy(targets.transpose(0, 1), scores.transpose(0, 1), self.student_temperature)
        return {
            "loss": loss,
            "logs": self.spread(targets, scores[:, : views.shape[1]].detach()),
            "embedding": h[:, 0].detach().float(),
            "targets": targets,
        }

    def local_scores(self, batch: MultiViewBatch) -> Tensor:
        """The student's, of the small views if there are any: [B, L, K], L possibly 0."""
        if "local_views" not in batch:
            return self.center().new_zeros(len(batch["views"]), 0, len(self.center()))
        return self.student["head"](
            forward_views_jointly(lambda x: self.student["encoder"](x).embedding, batch["local_views"])
        )

    def spread(self, targets: Tensor, scores: Tensor) -> dict[str, Tensor | float]:
        """The paper's two signs of collapse, entropy and divergence, and the prototypes in use: [B, V, K] twice."""
        return {
            "teacher_entropy": entropy(targets),
            "divergence": divergence(targets.flip(1), scores, self.student_temperature),
            "effective_prototypes": effective_prototypes(targets.flatten(0, -2).mean(dim=0)),
        }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.center.move()

    def teacher_pairs(self) -> list[TeacherPair]:
        return [TeacherPair(self.student, self.teacher)]

    def encoders(self) -> dict[str, Encoder]:
        return {"student": self.student["encoder"], "teacher": self.teacher["encoder"]}

    def visualize(self, batch: MultiViewBatch) -> Mapping[str, Tensor]:
        """The views and, of a ViT, what the teacher's class token attends to in the first of them, head by head."""
        pictures = dict(super().visualize(batch))
        first = batch["views"][:, 0]
        attention = class_attention(self.teacher["encoder"].backbone, first)
        if attention is not None:
            seen = F.interpolate(attention, size=first.shape[-2:], mode="nearest").unsqueeze(2)
            brightest = seen.amax(dim=(-2, -1), keepdim=True)
            pictures["attention"] = torch.cat([first[:, None], first[:, None] * (seen / brightest)], dim=1)
        return pictures


def global_views(batch: MultiViewBatch) -> Tensor:
    """The views that a teacher sees and a student has to agree with: [B, V, 3, H, W].

    Raises:
        SettingError: there are fewer than two.
    """
    if batch["views"].shape[1] < 2:
        raise SettingError(
            "data.train_view: this method predicts one view of an image from another and needs at least 2 in "
            f"train_view.views, but the batch has {batch['views'].shape[1]}"
        )
    return batch["views"]


def without_drop_path(module: nn.Module) -> Any:
    """``module`` itself, whose paths are all taken, in training too."""
    for child in module.modules():
        if isinstance(child, DropPath):
            child.drop_prob = 0.0
    return module


def class_attention(backbone: nn.Module, image: Tensor) -> Tensor | None:
    """How the class token weighs the patches in the last block, by head: [B, 3, H, W] -> [B, heads, rows, columns].

    None for a backbone that is not a plain ViT with a class token.
    """
    blocks: Any = getattr(backbone, "blocks", None)
    if getattr(backbone, "cls_token", None) is None or not hasattr(getattr(blocks[-1], "attn", None), "qkv"):
        return None
    attn = blocks[-1].attn
    kept: list[Tensor] = []
    handle = attn.qkv.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        backbone.forward_features(image)  # type: ignore[operator]
    finally:
        handle.remove()
    q, k, _ = kept[0].unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    weights = (q[:, :, :1] @ k.transpose(-2, -1) * attn.scale).softmax(dim=-1)[:, :, 0]
    grid = backbone.patch_embed.dynamic_feat_size(image.shape[-2:])  # type: ignore[union-attr,operator]
    return weights[:, :, backbone.num_prefix_tokens :].unflatten(-1, grid).float()
