"""Masked autoencoder: mask most patches of an image, encode the others, regress the pixels of the masked ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from src.datamodules.batches.image import ImageBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, mean_patch
from src.models.backbones.layout import channels_of
from src.models.backbones.plain_vit import check_plain_vit, embed_patches, encode_tokens
from src.models.backbones.positions import fixed_positions, position_count
from src.models.losses.reconstruction import masked_mse, normalize_patches, patchify, unpatchify
from src.models.masked.masking import Masking, gather_tokens, random_masking
from src.models.pretrain_module import PretrainModule, StepOutput
from src.optim import OptimizerRecipe


class MAE(PretrainModule):
    """Masked Autoencoders Are Scalable Vision Learners (He et al., 2021). Deviations: none.

    Args:
        backbone: a timm ViT without a head, with a class token in the paper, see `check_plain_vit`. Its positional
            embedding is replaced by the fixed sine-cosine one and its weights are initialized anew.
        optimizer: AdamW with betas (0.9, 0.95) in the paper.
        mask_ratio: share of the patches that is masked.
        decoder_dim, decoder_depth, decoder_heads: width, number of blocks and of attention heads of the decoder.
        norm_pix: normalize the pixels of each target patch to zero mean and unit variance.

    Raises:
        SettingError: a mask ratio outside of (0, 1), an image that is not a whole number of patches, or a backbone that
            does more than a plain ViT.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        optimizer: OptimizerRecipe,
        *,
        mask_ratio: float = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        norm_pix: bool = True,
    ) -> None:
        super().__init__(optimizer)
        if not 0 < mask_ratio < 1:
            raise SettingError(f"model.mask_ratio={mask_ratio} must lie between 0 and 1")
        check_plain_vit(backbone, "MAE", square_patches=True)
        image, patch = backbone.patch_embed.img_size, backbone.patch_embed.patch_size
        if image[0] < patch[0] or image[0] % patch[0] or image[1] % patch[1]:
            raise SettingError(
                f"image_size: an image of {image[0]}x{image[1]} pixels is not a whole number of patches of "
                f"{patch[0]}x{patch[1]} (backbone.patch_size)"
            )
        self.mask_ratio = mask_ratio
        self.norm_pix = norm_pix
        self.backbone = backbone
        self.patch_size = backbone.patch_embed.patch_size[0]
        self.grid: tuple[int, int] = backbone.patch_embed.grid_size
        backbone.pos_embed = fixed_positions(backbone.embed_dim, self.grid, prefix_tokens=position_count(backbone))
        self.decoder = decoder_of(backbone, dim=decoder_dim, depth=decoder_depth, heads=decoder_heads)
        initialize(self)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> StepOutput:
        image = batch["image"]
        masking = random_masking(len(image), self.grid[0] * self.grid[1], self.mask_ratio, image.device)
        visible = self.encode(image, masking)
        prediction = self.decoder(visible, masking.restore)
        loss = masked_mse(prediction, self.target(image), masking.mask)
        # evaluation reads the mean patch of the whole image; of the visible patches here
        patches = visible[:, self.backbone.num_prefix_tokens :]
        return {"loss": loss, "embedding": patches.detach().float().mean(dim=1)}

    def encode(self, image: Tensor, masking: Masking) -> Tensor:
        """The P prefix tokens (a class token, registers) and the visible patches through the ViT: [B, P + V, D]."""
        prefix, patches = embed_patches(self.backbone, image)
        return encode_tokens(self.backbone, prefix, gather_tokens(patches, masking.keep))

    def target(self, image: Tensor) -> Tensor:
        """The target of the decoder: [B, N, size * size * channels]."""
        patches = patchify(image, self.patch_size)
        return normalize_patches(patches)[0] if self.norm_pix else patches

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": ImageEncoder(self.backbone, pool=mean_patch)}

    def visualize(self, batch: ImageBatch) -> Mapping[str, Tensor]:
        """The image, its visible patches, and the reconstruction: visible and predicted patches."""
        image = batch["image"]
        masking = random_masking(len(image), self.grid[0] * self.grid[1], self.mask_ratio, image.device)
        prediction = self.decoder(self.encode(image, masking), masking.restore).float()
        columns = visible_and_reconstructed(image, prediction, masking.mask, self.grid, norm_pix=self.norm_pix)
        return {"reconstruction": torch.stack([image, *columns], dim=1)}


def visible_and_reconstructed(
    image: Tensor, prediction: Tensor, mask: Tensor, grid: tuple[int, int], *, norm_pix: bool
) -> tuple[Tensor, Tensor]:
    """Returns the visible patches of images, and these with the predicted ones between them: [B, C, H, W] each.

    Args:
        image: [B, C, H, W].
        prediction: of every patch, [B, N, size * size * C]; of its normalized pixels with ``norm_pix``.
        mask: [B, N], 1 where masked.
        grid: rows and columns of patches.
    """
    size = image.shape[-1] // grid[1]
    patches, mask = patchify(image, size), mask.unsqueeze(-1)
    if norm_pix:
        _, mean, std = normalize_patches(patches)
        prediction = prediction * std + mean
    visible = patches * (1 - mask)
    visible, reconstruction = (
        unpatchify(x, size, grid).to(image.dtype) for x in (visible, visible + prediction * mask)
    )
    return visible, reconstruction


def decoder_of(backbone: VisionTransformer, *, dim: int, depth: int, heads: int) -> MAEDecoder:
    """Returns a decoder of the tokens of a ViT into the pixels of its patches."""
    embed = backbone.patch_embed
    return MAEDecoder(
        encoder_dim=backbone.embed_dim,
        dim=dim,
        depth=depth,
        heads=heads,
        prefix_tokens=backbone.num_prefix_tokens,
        grid=embed.grid_size,
        out_dim=embed.patch_size[0] ** 2 * channels_of(backbone),
    )


class MAEDecoder(nn.Module):
    """Puts mask tokens in the place of masked patches, and predicts every patch.

    Args:
        encoder_dim: width of the encoder's tokens.
        dim, depth, heads: width, number of blocks and of attention heads of the transformer.
        prefix_tokens: P, number of the encoder's tokens before the patches.
        grid: rows and columns of patches.
        out_dim: number of values in a patch.
    """

    def __init__(
        self,
        *,
        encoder_dim: int,
        dim: int,
        depth: int,
        heads: int,
        grid: tuple[int, int],
        out_dim: int,
        prefix_tokens: int = 1,
    ) -> None:
        super().__init__()
        self.prefix_tokens = prefix_tokens
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = fixed_positions(dim, grid, prefix_tokens=prefix_tokens)
        self.blocks = nn.Sequential(*[Block(dim, heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)])
        self.norm = LayerNorm(dim)
        self.pred = nn.Linear(dim, out_dim)

    def forward(self, visible: Tensor, restore: Tensor) -> Tensor:
        """visible: [B, P + V, encoder_dim], restore: int64 [B, N] -> [B, N, out_dim], raster order."""
        prefix, visible = self.embed(visible).tensor_split([self.prefix_tokens], dim=1)
        mask_tokens = self.mask_token.expand(len(visible), restore.shape[1] - visible.shape[1], -1)
        patches = gather_tokens(torch.cat([visible, mask_tokens.to(visible.dtype)], dim=1), restore)
        x = torch.cat([prefix, patches], dim=1) + self.pos_embed
        return self.pred(self.norm(self.blocks(x)))[:, self.prefix_tokens :]


def initialize(model: nn.Module) -> None:
    """Initializes linear layers and the patch embedding Xavier-uniformly, biases with zeros, tokens with N(0, 0.02)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif name.endswith("patch_embed.proj"):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
    for name, parameter in model.named_parameters():
        if name.endswith(("cls_token", "mask_token")):
            nn.init.normal_(parameter, std=0.02)
