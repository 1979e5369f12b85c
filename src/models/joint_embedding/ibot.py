"""iBOT: DINO, and the same for hidden patches, whose classes an online tokenizer tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.backbones.encoder import Features
from src.models.backbones.image_encoder import cls_token
from src.models.joint_embedding.center import Center
from src.models.joint_embedding.dino import DINO, global_views
from src.models.losses.distillation import cross_view_cross_entropy, entropy, masked_patch_cross_entropy, sharpen
from src.models.masked.block_masking import block_masks
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe


class iBOT(DINO):
    """Image BERT Pre-Training with Online Tokenizer (Zhou et al., 2021).

    Deviations: the temperatures rise by steps rather than by epochs; masks hide exactly as many patches as was drawn
    (see `block_masks`).

    The student sees global views with some patches hidden and has to agree with the teacher, which sees them whole,
    twice over: its class token with the teacher's of the *other* views, as in DINO, and its hidden patches with the
    teacher's patches of the *same* view. Both are scored by one head; each has a center. As in the authors' code the
    mask token takes a patch's place before positions are added, and it begins at zero.

    Args:
        backbone: a ViT of timm with a class token and without a head.
        mask_probability: that a view has patches hidden.
        mask_share: smallest and largest share of them then.
        patch_teacher_temperature, patch_center_momentum: DINO's, for patches.
        patch_weight: of the patches' loss.
        others: DINO's.

    Raises:
        SettingError: a backbone without a class token or patches, a probability or a share that cannot be; and DINO's.
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
        if getattr(backbone, "cls_token", None) is None or not hasattr(backbone, "patch_embed"):
            raise SettingError(
                f"model.backbone: iBOT hides the patches of a ViT with a class token; {type(backbone).__name__} is none"
            )
        if not 0 <= mask_probability <= 1 or not 0 <= mask_share[0] <= mask_share[1] < 1:
            raise SettingError(
                f"model.mask_probability={mask_probability} must lie in [0, 1] and "
                f"model.mask_share={list(mask_share)} be 0 <= smallest <= largest < 1"
            )
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
        with hidden(self.student["encoder"].backbone, mask, self.mask_token):  # type: ignore[arg-type]
            seen: Features = self.student["encoder"](images)
        scores = self.student["head"](seen.embedding).unflatten(0, shape)
        patch_scores = self.student["head"](seen.patches[mask])
        with torch.no_grad():
            whole: Features = self.teacher["encoder"](images)
            slow = self.teacher["head"](whole.embedding).unflatten(0, shape)
            slow_patches = self.teacher["head"](whole.patches)
        targets = sharpen(slow, self.center(), self.teacher_temperature)
        patch_targets = sharpen(slow_patches[mask], self.patch_center(), self.patch_teacher_temperature)
        self.center.observe(slow)
        self.patch_center.observe(slow_patches)
        every = torch.cat([scores, self.local_scores(batch)], dim=1)
        on_class = cross_view_cross_entropy(targets.transpose(0, 1), every.transpose(0, 1), self.student_temperature)
        on_patches = masked_patch_cross_entropy(patch_targets, patch_scores, mask, self.student_temperature)
        logs: dict[str, Tensor | float] = {
            "class": on_class.detach(),
            "patch": on_patches.detach(),
            "hidden": mask.float().mean(),
            **self.spread(targets, scores.detach()),
        }
        if len(patch_targets):
            logs["patch_teacher_entropy"] = entropy(patch_targets)
        return {
            "loss": on_class + self.patch_weight * on_patches,
            "logs": logs,
            "embedding": seen.embedding.unflatten(0, shape)[:, 0].detach().float(),
            "targets": targets,
        }

    def draw_masks(self, images: Tensor) -> Tensor:
        """bool [B, N], True where hidden, from the step's randomness."""
        grid = self.student["encoder"].backbone.patch_embed.dynamic_feat_size(images.shape[-2:])  # type: ignore
        numbers = torch.rand(len(images), 3)
        return block_masks(numbers, grid, probability=self.mask_probability, share=self.mask_share).to(images.device)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.patch_center.move()

    def visualize(self, batch: MultiViewBatch) -> Mapping[str, Tensor]:
        """DINO's, and the global views as the student sees them."""
        views = batch["views"]
        images = views.flatten(0, 1)
        mask = self.draw_masks(images)
        grid = self.student["encoder"].backbone.patch_embed.dynamic_feat_size(images.shape[-2:])  # type: ignore
        height, width = images.shape[-2] // grid[0], images.shape[-1] // grid[1]
        shown = (~mask).view(-1, 1, *grid).repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)
        return {**super().visualize(batch), "masked": (images * shown).unflatten(0, views.shape[:2])}


@contextmanager
def hidden(backbone: nn.Module, mask: Tensor, token: Tensor) -> Iterator[None]:
    """Puts ``token`` [1, D] in the place of the patches where ``mask`` [B, N] is True, before positions are added."""

    def hide(module: nn.Module, inputs: Any, patches: Tensor) -> Tensor:
        rows = patches.flatten(1, -2)
        return torch.where(mask.unsqueeze(-1), token.to(rows.dtype), rows).view_as(patches)

    patch_embed: Any = backbone.patch_embed
    handle = patch_embed.register_forward_hook(hide)
    try:
        yield
    finally:
        handle.remove()
