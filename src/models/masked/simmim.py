"""SimMIM: replace large random squares of patches by a mask token, regress their pixels with one linear layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from src.datamodules.batches.image import ImageBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder, Features
from src.models.backbones.image_encoder import ImageEncoder, mean_patch
from src.models.backbones.layout import channels_of, size_text
from src.models.losses.reconstruction import masked_l1
from src.models.masked.masking import masked_patches, pixel_mask, square_masks
from src.models.pretrain_module import PretrainModule, StepOutput
from src.optim import OptimizerRecipe


class SimMIM(PretrainModule):
    """SimMIM: A Simple Framework for Masked Image Modeling (Xie et al., 2021).

    Deviations: the schedule is one step ahead of the authors', whose first two steps have the same rate.

    The encoder takes visible patches and mask tokens alike. A 1x1 convolution predicts, from each position of its last
    feature map, all pixels below that position.

    Args:
        backbone: a timm model without a head whose patches are embedded one by one: in the paper a Swin transformer, or
            a ViT with a relative position bias that all blocks share (timm's `Beit`). A ViT's weights are initialized
            anew.
        optimizer: AdamW in the paper.
        mask_ratio: share of the squares that is masked.
        mask_size: side of a masked square in pixels, a multiple of the patch size.

    Raises:
        SettingError: a ratio outside of (0, 1), a backbone without patches, or a size of image, square and patch that
            does not divide the next larger one.
    """

    def __init__(
        self, backbone: nn.Module, optimizer: OptimizerRecipe, *, mask_ratio: float = 0.6, mask_size: int = 32
    ) -> None:
        super().__init__(optimizer)
        if not 0 < mask_ratio < 1:
            raise SettingError(f"model.mask_ratio={mask_ratio} must lie between 0 and 1")
        embed: Any = getattr(backbone, "patch_embed", None)
        if not isinstance(embed, PatchEmbed):
            raise SettingError(
                "backbone.model_name: SimMIM masks the patches of a ViT or a Swin transformer, not of a "
                f"{type(backbone).__name__}"
            )
        self.encoder = ImageEncoder(backbone, mean_patch)
        self.mask_ratio = mask_ratio
        self.grid: tuple[int, int] = embed.grid_size
        self.square = squares_of(embed.img_size, embed.patch_size, mask_size)
        stride = int(backbone.feature_info[-1]["reduction"])  # type: ignore[index]
        if embed.img_size[0] % stride or embed.img_size[1] % stride:
            raise SettingError(
                f"image_size: an image of {size_text(embed.img_size)} pixels is not a whole number of the backbone's "
                f"strides of {stride} pixels"
            )
        channels = channels_of(backbone)
        self.mask_token = nn.Parameter(torch.zeros(1, embed.proj.out_channels))
        self.decoder = nn.Sequential(
            nn.Conv2d(self.encoder.dim, stride**2 * channels, kernel_size=1), nn.PixelShuffle(stride)
        )
        is_vit = isinstance(backbone, Beit | VisionTransformer)
        limit = 0.02 if is_vit else 2.0
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-limit, b=limit)
        if is_vit:
            initialize(backbone)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> StepOutput:
        image = batch["image"]
        mask = self.draw_masks(image)
        features, prediction = self.reconstruct(image, mask)
        loss = masked_l1(prediction, image, pixel_mask(mask, self.grid, image.shape[-2:]))
        return {"loss": loss, "embedding": features.embedding.detach().float()}

    def draw_masks(self, image: Tensor) -> Tensor:
        """Draws the masks of a step: bool [B, N], True where masked."""
        return square_masks(len(image), self.grid, self.square, self.mask_ratio, image.device)

    def reconstruct(self, image: Tensor, mask: Tensor) -> tuple[Features, Tensor]:
        """Encodes masked images and predicts all pixels: [B, C, H, W], bool [B, N] -> features, [B, C, H, W]."""
        with masked_patches(self.encoder.backbone, mask, self.mask_token):
            features: Features = self.encoder(image)
        return features, self.decoder(features.patches.transpose(1, 2).unflatten(2, features.grid))

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": self.encoder}

    def visualize(self, batch: ImageBatch) -> Mapping[str, Tensor]:
        """The image, its visible patches, and the reconstruction: visible patches and predicted pixels."""
        image = batch["image"]
        mask = self.draw_masks(image)
        hidden = pixel_mask(mask, self.grid, image.shape[-2:])
        prediction = self.reconstruct(image, mask)[1].to(image.dtype)
        columns = [image, image * ~hidden, torch.where(hidden, prediction, image)]
        return {"reconstruction": torch.stack(columns, dim=1)}


def squares_of(image: tuple[int, int], patch: tuple[int, int], mask_size: int) -> tuple[int, int]:
    """Returns the rows and columns of patches in a square of ``mask_size`` pixels.

    Raises:
        SettingError: the square is not a whole number of patches, or the image not one of squares.
    """
    if mask_size < 1 or any(mask_size % side for side in patch):
        raise SettingError(
            f"model.mask_size={mask_size} must be a multiple of the patch size {size_text(patch)} (backbone.patch_size)"
        )
    if any(side % mask_size for side in image):
        raise SettingError(
            f"model.mask_size={mask_size} does not divide an image of {size_text(image)} pixels (image_size)"
        )
    return mask_size // patch[0], mask_size // patch[1]


@torch.no_grad()
def initialize(vit: nn.Module) -> None:
    """Initializes a ViT as BEiT's and SimMIM's code does: weights and the class token normal with a standard deviation
    of 0.02, truncated at one deviation, biases with zeros; the last layers of block n (from 1) divided by
    sqrt(2 n)."""
    for module in vit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in vit.named_parameters():
        if name in ("cls_token", "pos_embed"):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.02, b=0.02)
    blocks: Any = vit.blocks
    for number, block in enumerate(blocks, start=1):
        block.attn.proj.weight.div_(math.sqrt(2 * number))
        block.mlp.fc2.weight.div_(math.sqrt(2 * number))
