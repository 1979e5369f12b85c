"""iBOT: DINO, and the same loss on masked patches, whose targets come from the teacher as an online tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.backbones.encoder import Features
from src.models.backbones.image_encoder import cls_token
from src.models.joint_embedding.center import Center
from src.models.joint_embedding.dino import DINO, global_views
from src.models.losses.distillation import cross_view_cross_entropy, entropy, masked_patch_cross_entropy, sharpen
from src.models.masked.block_masking import block_masks
from src.models.masked.masking import masked_patches, pixel_mask
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe


class iBOT(DINO):
    """Image BERT Pre-Training with Online Tokenizer (Zhou et al., 2021).

    Deviations: masks have exactly the drawn number of patches (see `block_masks`).

    The student encodes masked global crops, the teacher the unmasked ones. The student's class token is compared with
    the teacher's of the *other* crops, as in DINO, and its masked patches with the teacher's patches of the *same*
    crop. Both go through one shared projection head; each has a center. As in the authors' code the mask token replaces
    a patch before positional embeddings are added, and is initialized with zeros.

    Args:
        backbone: a timm ViT with a class token and without a head.
        mask_probability: probability that a crop is masked.
        mask_share: smallest and largest share of masked patches in a masked crop.
        patch_teacher_temperature, patch_center_momentum: as DINO's, for patches.
        patch_weight: weight of the loss on patches.
        others: arguments of `DINO`.

    Raises:
        SettingError: a backbone without a class token or patches, a probability or share out of range; and DINO's.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        prototypes: int = 8192,
        mask_probability: float = 0.5,
        mask_share: tuple[float, float] = (0.1, 0.5),
        patch_teacher_temperature: float = 0.04,
        patch_center_momentum: float = 0.9,
        patch_weight: float = 1.0,
        **others: Any,
    ) -> None:
        check_masks("iBOT", backbone, mask_probability, mask_share)
        if patch_teacher_temperature <= 0:
            raise SettingError(f"model.patch_teacher_temperature={patch_teacher_temperature} must be above 0")
        super().__init__(backbone, optimizer, prototypes=prototypes, **{"pool": cls_token, **others})
        self.mask_token = nn.Parameter(torch.zeros(1, int(backbone.num_features)))  # type: ignore[arg-type]
        self.patch_center = Center(prototypes, patch_center_momentum)
        self.mask_probability = mask_probability
        self.mask_share = (mask_share[0], mask_share[1])
        self.patch_teacher_temperature = patch_teacher_temperature
        self.patch_weight = patch_weight

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        views = global_views(batch)
        images, shape = views.flatten(0, 1), views.shape[:2]
        mask = self.draw_masks(images)
        with masked_patches(self.student["encoder"].backbone, mask, self.mask_token):  # type: ignore[arg-type]
            student: Features = self.student["encoder"](images)
        scores = self.student["head"](student.embedding).unflatten(0, shape)
        patch_scores = self.student["head"](student.patches[mask])
        with torch.no_grad():
            teacher: Features = self.teacher["encoder"](images)
            teacher_scores = self.teacher["head"](teacher.embedding).unflatten(0, shape)
            teacher_patch_scores = self.teacher["head"](teacher.patches)
        targets = sharpen(teacher_scores, self.center(), self.teacher_temperature)
        patch_targets = sharpen(teacher_patch_scores[mask], self.patch_center(), self.patch_teacher_temperature)
        self.center.observe(teacher_scores)
        self.patch_center.observe(teacher_patch_scores)
        all_scores = torch.cat([scores, self.local_scores(batch)], dim=1)
        class_loss = cross_view_cross_entropy(targets, all_scores, self.student_temperature)
        patch_loss = masked_patch_cross_entropy(patch_targets, patch_scores, mask, self.student_temperature)
        logs: dict[str, Tensor | float] = {
            "class": class_loss.detach(),
            "patch": patch_loss.detach(),
            "masked": mask.float().mean(),
            **self.collapse_metrics(targets, scores.detach()),
        }
        if len(patch_targets):
            logs["patch_teacher_entropy"] = entropy(patch_targets)
        return {
            "loss": class_loss + self.patch_weight * patch_loss,
            "logs": logs,
            "embedding": student.embedding.unflatten(0, shape)[:, 0].detach().float(),
            "targets": targets,
        }

    def draw_masks(self, images: Tensor) -> Tensor:
        """Draws the masks of a step: bool [B, N], True where masked."""
        grid = self.student["encoder"].backbone.patch_embed.dynamic_feat_size(images.shape[-2:])  # type: ignore
        uniform = torch.rand(len(images), 3)
        return block_masks(uniform, grid, probability=self.mask_probability, share=self.mask_share).to(images.device)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.patch_center.update()

    def visualize(self, batch: MultiViewBatch) -> Mapping[str, Tensor]:
        """DINO's, and the masked global crops."""
        backbone: nn.Module = self.student["encoder"].backbone  # type: ignore[assignment]
        return {**super().visualize(batch), "masked": visible_patches(batch["views"], self.draw_masks, backbone)}


def check_masks(method: str, backbone: nn.Module, probability: float, share: tuple[float, float]) -> None:
    """
    Raises:
        SettingError: a backbone without a class token or patches, or a probability or share out of range.
    """
    embed = getattr(backbone, "patch_embed", None)
    if getattr(backbone, "cls_token", None) is None or not isinstance(embed, PatchEmbed):
        raise SettingError(
            f"model.backbone: {method} masks the patches of a ViT with a class token, not of a "
            f"{type(backbone).__name__}"
        )
    if not 0 <= probability <= 1 or not 0 <= share[0] <= share[1] < 1:
        raise SettingError(
            f"model.mask_probability={probability} must lie in [0, 1] and "
            f"model.mask_share={list(share)} must satisfy 0 <= smallest <= largest < 1"
        )


def visible_patches(views: Tensor, draw_masks: Callable[[Tensor], Tensor], backbone: nn.Module) -> Tensor:
    """Blackens the masked patches of views: [B, V, 3, H, W] -> [B, V, 3, H, W].

    Args:
        draw_masks: images [B * V, 3, H, W] -> bool [B * V, N], True where masked.
        backbone: the ViT whose patches are masked.
    """
    images = views.flatten(0, 1)
    grid = backbone.patch_embed.dynamic_feat_size(images.shape[-2:])  # type: ignore[operator, union-attr]
    visible = pixel_mask(~draw_masks(images), grid, images.shape[-2:])
    return (images * visible).unflatten(0, views.shape[:2])
