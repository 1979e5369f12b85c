"""DINOv2: self-distillation of class tokens and masked patches, with balanced targets and spread features."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from src.collectives import reduce_sum
from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder, Features
from src.models.backbones.image_encoder import ImageEncoder, cls_token
from src.models.backbones.positions import accept_any_image_size, dino_positions
from src.models.backbones.weights import Weights, load_into
from src.models.heads.dino import DINOHead
from src.models.joint_embedding.base import JointEmbedding, forward_views_jointly
from src.models.joint_embedding.dino import attended_images, global_views
from src.models.joint_embedding.ibot import check_masks, visible_patches
from src.models.losses.distillation import (
    cross_view_cross_entropy,
    effective_prototypes,
    entropy,
    masked_patch_cross_entropy,
)
from src.models.losses.koleo import koleo
from src.models.losses.swapped import sinkhorn
from src.models.masked.block_masking import block_masks
from src.models.masked.masking import masked_patches
from src.models.pretrain_module import StepOutput
from src.models.teacher import TeacherPair, disable_drop_path, teacher_of
from src.optim import OptimizerRecipe, Rule

BACKBONE = "student.encoder.backbone."


class DINOv2(JointEmbedding):
    """DINOv2: Learning Robust Visual Features without Supervision (Oquab et al., 2023).

    Deviations: masks have exactly the drawn number of patches (see `block_masks`); stochastic depth drops each image of
    a block by chance, where the authors drop a fixed share of the images.

    DINO's loss on class tokens and iBOT's on masked patches, each with a projection head of its own. The teacher's
    scores are balanced over prototypes by three iterations of Sinkhorn-Knopp over the crops, or masked patches, of all
    processes, in the place of a center. KoLeo spreads the class tokens of each global crop. With micro-batches both
    refer to a micro-batch. Training from a run of DINOv2 (``checkpoint``) goes on with its heads and its teacher.

    Args:
        backbone: a timm ViT with a class token and without a head; registers are ``backbone.reg_tokens``.
        optimizer: AdamW in the paper, with a weight decay that rises along a cosine.
        prototypes: K, number of prototypes of the class tokens' head.
        patch_prototypes: number of prototypes of the patches' head.
        hidden_dim: width of the hidden layers of both heads.
        bottleneck_dim, patch_bottleneck_dim: width of the vectors that are compared with prototypes.
        student_temperature, teacher_temperature: scores are divided by them; the paper warms the teacher's up.
        teacher_momentum: momentum of the moving average; the paper raises it to 1 along a cosine.
        sinkhorn_iterations: number of normalizations of the teacher's scores.
        mask_probability: share of the crops that are masked.
        mask_share: smallest and largest share of masked patches in a masked crop, spread evenly over the crops.
        patch_weight: weight of the loss on patches.
        koleo_weight: weight of KoLeo.
        koleo_images: neighbors are sought among so many images, those of one GPU in the authors' runs.
        drop_path: probability with which each block's residual branch is dropped, the same in all blocks.
        layer_decay: factor of the learning rate from each block of the backbone to the one below.
        patch_embed_lr: further factor of the learning rate of the patch embedding.

    Raises:
        SettingError: a bad value or a backbone without a class token; in a step, fewer than two global crops or a
            single image.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        prototypes: int = 131072,
        patch_prototypes: int = 131072,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 384,
        patch_bottleneck_dim: int = 256,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        teacher_momentum: float = 0.994,
        sinkhorn_iterations: int = 3,
        mask_probability: float = 0.5,
        mask_share: tuple[float, float] = (0.1, 0.5),
        patch_weight: float = 1.0,
        koleo_weight: float = 0.1,
        koleo_images: int = 32,
        drop_path: float = 0.0,
        layer_decay: float = 1.0,
        patch_embed_lr: float = 0.2,
    ) -> None:
        super().__init__(optimizer)
        check_masks("DINOv2", backbone, mask_probability, mask_share)
        if min(student_temperature, teacher_temperature) <= 0:
            raise SettingError(
                f"model.student_temperature={student_temperature} and model.teacher_temperature={teacher_temperature} "
                "must be above 0"
            )
        if not 0 < layer_decay <= 1 or not 0 <= drop_path < 1:
            raise SettingError(
                f"model.layer_decay={layer_decay} must lie in (0, 1] and model.drop_path={drop_path} in [0, 1)"
            )
        uniform_drop_path(backbone, drop_path)
        encoder = ImageEncoder(accept_any_image_size(backbone, interpolation=dino_positions), cls_token)
        head = partial(DINOHead, encoder.dim, hidden_dim=hidden_dim, train_gain=True)
        self.student = nn.ModuleDict(
            {
                "encoder": encoder,
                "class_head": head(prototypes, bottleneck_dim=bottleneck_dim),
                "patch_head": head(patch_prototypes, bottleneck_dim=patch_bottleneck_dim),
            }
        )
        self.teacher = disable_drop_path(teacher_of(self.student))
        self.mask_token = nn.Parameter(torch.zeros(1, encoder.dim))
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.teacher_momentum = teacher_momentum
        self.sinkhorn_iterations = sinkhorn_iterations
        self.mask_probability = mask_probability
        self.mask_share = (mask_share[0], mask_share[1])
        self.patch_weight = patch_weight
        self.koleo_weight = koleo_weight
        self.koleo_images = koleo_images
        self.layer_decay = layer_decay
        self.patch_embed_lr = patch_embed_lr

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        views = global_views(batch)
        images, shape = views.flatten(0, 1), views.shape[:2]
        mask = self.draw_masks(images)
        with torch.no_grad():
            teacher: Features = self.teacher["encoder"](images)
            targets = self.balanced(self.teacher["class_head"](teacher.embedding)).unflatten(0, shape)
            patch_targets = self.balanced(self.teacher["patch_head"](teacher.patches[mask]))
        with masked_patches(self.student["encoder"].backbone, mask, self.mask_token):  # type: ignore[arg-type]
            student: Features = self.student["encoder"](images)
        h = student.embedding.unflatten(0, shape)
        local_h = self.local_embeddings(batch, h)
        scores = self.student["class_head"](torch.cat([h, local_h], dim=1))
        patch_scores = self.student["patch_head"](student.patches[mask])
        class_loss = cross_view_cross_entropy(targets, scores, self.student_temperature)
        patch_loss = masked_patch_cross_entropy(patch_targets, patch_scores, mask, self.student_temperature)
        spread = sum((koleo(view, self.koleo_images) for view in h.unbind(dim=1)), start=class_loss.new_zeros(()))
        logs: dict[str, Tensor | float] = {
            "class": class_loss.detach(),
            "patch": patch_loss.detach(),
            "koleo": spread.detach(),
            "masked": mask.float().mean(),
            "teacher_entropy": entropy(targets),
            "effective_prototypes": effective_prototypes(targets.flatten(0, -2).mean(dim=0)),
        }
        return {
            "loss": class_loss + self.patch_weight * patch_loss + self.koleo_weight * spread,
            "logs": logs,
            "embedding": h[:, 0].detach().float(),
            "targets": targets,
        }

    def balanced(self, scores: Tensor) -> Tensor:
        """The teacher's distributions, balanced over the samples of all processes: [M, K] -> [M, K]."""
        return sinkhorn(scores, eps=self.teacher_temperature, iterations=self.sinkhorn_iterations, reduce=reduce_sum)

    def local_embeddings(self, batch: MultiViewBatch, h: Tensor) -> Tensor:
        """The student's class tokens of the L local crops, L possibly 0: [B, L, D]."""
        if "local_views" not in batch:
            return h[:, :0]
        return forward_views_jointly(lambda x: self.student["encoder"](x).embedding, batch["local_views"])

    def draw_masks(self, images: Tensor) -> Tensor:
        """Draws the masks of a step: bool [B, N], True where masked. The share of masked crops is exact, and their
        shares of masked patches lie one in each of as many equal steps of the range."""
        grid = self.student["encoder"].backbone.patch_embed.dynamic_feat_size(images.shape[-2:])  # type: ignore
        count = int(len(images) * self.mask_probability)
        uniform = torch.rand(len(images), 3)
        uniform[:, 0] = (torch.arange(len(images)) >= count).float()
        uniform[:count, 1] = (torch.arange(count) + uniform[:count, 1]) / max(1, count)
        uniform = uniform[torch.randperm(len(images))]
        return block_masks(uniform, grid, share=self.mask_share, smallest=4).to(images.device)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """With a learning rate for each layer of the backbone; heads and the last norm have the recipe's."""
        depth = len(self.student["encoder"].backbone.blocks)  # type: ignore[arg-type, union-attr]
        backbone = BACKBONE.replace(".", r"\.")
        lowest = self.layer_decay ** (depth + 1)
        rules = [
            Rule(rf"^{backbone}patch_embed\.", lr_multiplier=lowest * self.patch_embed_lr),
            Rule(rf"^({backbone}(cls_token|pos_embed|reg_token)|mask_token)$", lr_multiplier=lowest),
            *(
                Rule(rf"^{backbone}blocks\.{block}\.", lr_multiplier=self.layer_decay ** (depth - block))
                for block in range(depth)
            ),
        ]
        return self.optimizer_recipe.build(self, extra_rules=rules)

    def load_start(self, weights: Weights) -> str:
        line = super().load_start(weights)
        others = {name: value for name, value in self.state_dict().items() if ".encoder." not in name}
        found = {name: weights.tensors[name] for name in others if name in weights.tensors}
        if weights.one_encoder or any(name not in found or found[name].shape != others[name].shape for name in others):
            return f"{line}; heads begin anew"
        self.load_state_dict(found, strict=False)
        teacher: Any = self.teacher["encoder"].backbone
        load_into(teacher, weights._replace(prefix=BACKBONE.replace("student", "teacher")))
        return f"{line}; its heads and its teacher"

    def teacher_pairs(self) -> list[TeacherPair]:
        return [TeacherPair(self.student, self.teacher)]

    def encoders(self) -> dict[str, Encoder]:
        return {"student": self.student["encoder"], "teacher": self.teacher["encoder"]}  # type: ignore[dict-item]

    def visualize(self, batch: MultiViewBatch) -> Mapping[str, Tensor]:
        """The views, the masked global crops, and the attention of the teacher's class token, head by head."""
        student: Any = self.student["encoder"].backbone
        teacher: Any = self.teacher["encoder"].backbone
        masked = visible_patches(batch["views"], self.draw_masks, student)
        visualizations = {**super().visualize(batch), "masked": masked}
        attended = attended_images(teacher, batch["views"][:, 0])
        return visualizations if attended is None else {**visualizations, "attention": attended}


def uniform_drop_path(backbone: Any, probability: float) -> None:
    """Gives every block of a ViT the same probability of stochastic depth; timm's rises with the depth."""
    for block in backbone.blocks:
        for name in ("drop_path1", "drop_path2"):
            setattr(block, name, DropPath(probability) if probability else nn.Identity())
