"""GMML: corrupt groups of pixels by noise or by another image, and reconstruct them from several blocks of a ViT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, mean_patch
from src.models.backbones.layout import channels_of
from src.models.backbones.plain_vit import check_plain_vit
from src.models.heads.pixels import PixelHead
from src.models.layers.initialization import start_class_token
from src.models.losses.reconstruction import masked_l1
from src.models.masked.group_masking import Corruption
from src.models.pretrain_module import PretrainModule, StepOutput
from src.optim import OptimizerRecipe


class GMML(PretrainModule):
    """GMML is All you Need (Atito et al., 2022).

    Deviations: no local crops, which the authors' code has switched off.

    The encoder sees the whole corrupted image, without mask tokens. The mean output of several of its blocks goes
    through its last norm and a small head, which reconstructs the pixels.

    Args:
        backbone: a timm ViT without a head, see `check_plain_vit`.
        optimizer: AdamW in the paper.
        blocks: numbers, from 1, of the blocks whose outputs are averaged.
        fill, drop_share, alien_share, align, max_block: see `Corruption`.
        corrupted_only: the loss compares corrupted pixels alone, or else all pixels.

    Raises:
        SettingError: numbers of blocks that the backbone does not have, an unknown fill, a backbone that does more than
            a plain ViT; in a step, those of `group_masks`.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        optimizer: OptimizerRecipe,
        *,
        blocks: Sequence[int] = (6, 8, 10, 12),
        fill: str = "noise",
        drop_share: float = 0.75,
        alien_share: float = 0.3,
        align: int = 1,
        max_block: float = 0.3,
        corrupted_only: bool = True,
    ) -> None:
        super().__init__(optimizer)
        check_plain_vit(backbone, "GMML")
        depth = len(backbone.blocks)
        if not blocks or not all(1 <= number <= depth for number in blocks):
            raise SettingError(f"model.blocks={list(blocks)} must be numbers from 1 to {depth}, the depth of the ViT")
        self.blocks = sorted(set(blocks))
        self.corruption = Corruption(fill, drop_share, alien_share, align, max_block)
        self.corrupted_only = corrupted_only
        self.backbone = backbone
        self.grid: tuple[int, int] = backbone.patch_embed.grid_size
        self.head = PixelHead(backbone.embed_dim, backbone.patch_embed.patch_size, channels_of(backbone))
        start_class_token(backbone)

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        views = batch["views"]
        corrupted, masks = self.corruption(views)
        features = self.encode(corrupted.flatten(0, 1))
        prediction = self.head(features, self.grid)
        counted = masks if self.corrupted_only else torch.ones_like(masks)
        loss = masked_l1(prediction, views.flatten(0, 1), counted.flatten(0, 1), eps=0.0)
        embedding = features.detach().float().mean(dim=1).unflatten(0, views.shape[:2])[:, 0]
        return {"loss": loss, "logs": {"corrupted": masks.float().mean()}, "embedding": embedding}

    def encode(self, images: Tensor) -> Tensor:
        """Encodes images: [B, C, H, W] -> the patches' mean over `blocks` after the last norm, [B, N, D]."""
        indices = [number - 1 for number in self.blocks]
        outputs: Any = self.backbone.forward_intermediates(
            images, indices=indices, output_fmt="NLC", intermediates_only=True
        )
        return self.backbone.norm(torch.stack(outputs).mean(dim=0))

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": ImageEncoder(self.backbone, pool=mean_patch)}

    def visualize(self, batch: MultiViewBatch) -> Mapping[str, Tensor]:
        """The first view, corrupted and reconstructed."""
        views = batch["views"]
        corrupted, _ = self.corruption(views)
        first = corrupted[:, 0]
        prediction = self.head(self.encode(first), self.grid).to(views.dtype)
        return {"reconstruction": torch.stack([views[:, 0], first, prediction], dim=1)}
