"""DropPos: drop the positions of most visible patches and classify where each of them was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from src.datamodules.batches.image import ImageBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, mean_patch
from src.models.backbones.plain_vit import check_plain_vit, embed_patches, encode_tokens
from src.models.backbones.positions import fixed_positions, position_count
from src.models.functional import full_precision
from src.models.losses.reconstruction import patchify, unpatchify
from src.models.masked.mae import initialize
from src.models.masked.masking import gather_tokens, random_masking
from src.models.pretrain_module import PretrainModule, StepOutput
from src.optim import OptimizerRecipe


class DropPos(PretrainModule):
    """DropPos: Pre-Training Vision Transformers by Reconstructing Dropped Positions (Wang et al., 2023).

    Deviations: none. As in the authors' code smoothed positions are divided by the sum of the wrong axis, see
    `smoothed_positions`.

    Args:
        backbone: a timm ViT with a class token and without a head, see `check_plain_vit`. Its positional embedding is
            replaced by the fixed sine-cosine one and its weights are initialized anew.
        optimizer: AdamW with betas (0.9, 0.95) in the paper.
        mask_ratio: share of the patches that the encoder does not see.
        position_mask_ratio: share of the visible patches that have a mask token in the place of their position.
        sigma: width of the smoothed targets in patches; 0 for one-hot targets. The recipe lowers it over the run.
        attentive: weight each patch by its similarity to the class token.
        temperature: of these weights' softmax.
        decoder_dim, decoder_depth, decoder_heads: width, number of blocks and of attention heads of the decoder, which
            has no positional embedding.

    Raises:
        SettingError: a ratio outside of (0, 1), or one that masks all positions or none; a temperature that is not
            positive; a backbone without a class token, or one that does more than a plain ViT.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        optimizer: OptimizerRecipe,
        *,
        mask_ratio: float = 0.75,
        position_mask_ratio: float = 0.75,
        sigma: float = 1.0,
        attentive: bool = True,
        temperature: float = 0.1,
        decoder_dim: int = 512,
        decoder_depth: int = 2,
        decoder_heads: int = 16,
    ) -> None:
        super().__init__(optimizer)
        check_plain_vit(backbone, "DropPos", square_patches=True)
        if backbone.cls_token is None:
            raise SettingError("backbone.class_token: DropPos weights patches by a class token; set class_token=true")
        if temperature <= 0:
            raise SettingError(f"model.temperature={temperature} must be above 0")
        self.grid: tuple[int, int] = backbone.patch_embed.grid_size
        visible = int(self.grid[0] * self.grid[1] * (1 - mask_ratio))
        known = int(visible * (1 - position_mask_ratio))
        if not 0 < mask_ratio < 1 or not 0 < position_mask_ratio < 1 or not 0 < known < visible:
            raise SettingError(
                f"model.position_mask_ratio={position_mask_ratio} leaves {known} of {visible} visible patches their "
                f"position (model.mask_ratio={mask_ratio}); at least one must keep it, and not all"
            )
        self.mask_ratio = mask_ratio
        self.position_mask_ratio = position_mask_ratio
        self.sigma = sigma
        self.attentive = attentive
        self.temperature = temperature
        self.patch_size = backbone.patch_embed.patch_size[0]
        self.backbone = backbone
        backbone.pos_embed = fixed_positions(backbone.embed_dim, self.grid, prefix_tokens=position_count(backbone))
        self.position_mask_token = nn.Parameter(torch.zeros(1, 1, backbone.embed_dim))
        self.decoder = PositionDecoder(
            encoder_dim=backbone.embed_dim,
            dim=decoder_dim,
            depth=decoder_depth,
            heads=decoder_heads,
            prefix_tokens=backbone.num_prefix_tokens,
            positions=self.grid[0] * self.grid[1],
        )
        initialize(self)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> StepOutput:
        image = batch["image"]
        keep, dropped = self.draw_masks(image)
        tokens = self.encode(image, keep, dropped)
        logits = self.decoder(tokens)
        weights = dropped * self.attentive_weights(image, keep) if self.attentive else dropped.float()
        loss = position_cross_entropy(logits, keep, weights, smoothed_positions(self.grid, self.sigma).to(logits))
        correct = (logits.detach().argmax(dim=-1) == keep).float()
        patches = tokens[:, self.backbone.num_prefix_tokens :]
        return {
            "loss": loss,
            "logs": {"position_accuracy": (correct * weights).sum() / weights.sum()},
            "embedding": patches.detach().float().mean(dim=1),
        }

    def draw_masks(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Draws the visible patches, int64 [B, V], and which of them lose their position, bool [B, V]."""
        keep = random_masking(len(image), self.grid[0] * self.grid[1], self.mask_ratio, image.device).keep
        dropped = random_masking(len(image), keep.shape[1], self.position_mask_ratio, image.device).mask
        return keep, dropped.bool()

    def encode(self, image: Tensor, keep: Tensor, dropped: Tensor) -> Tensor:
        """Encodes the visible patches, some of them without their position: [B, P + V, D]."""
        prefix, patches = embed_patches(self.backbone, image, positions=False)
        table: Any = self.backbone.pos_embed
        known = gather_tokens(table[:, position_count(self.backbone) :].expand(len(image), -1, -1), keep)
        positions = torch.where(dropped.unsqueeze(-1), self.position_mask_token, known)
        return encode_tokens(self.backbone, prefix, gather_tokens(patches, keep) + positions)

    @torch.no_grad()
    def attentive_weights(self, image: Tensor, keep: Tensor) -> Tensor:
        """Softmax of the similarities between the class token and the patches of the whole image, of the visible ones
        and with a sum of 1: float32 or float64 [B, V]."""
        tokens = self.backbone.forward_features(image)
        class_token, patches = tokens[:, :1], tokens[:, self.backbone.num_prefix_tokens :]
        return similarity_weights(class_token, patches, self.temperature, keep)

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": ImageEncoder(self.backbone, pool=mean_patch)}

    def visualize(self, batch: ImageBatch) -> Mapping[str, Tensor]:
        """The image, its visible patches, those that keep their position, and all visible patches where the decoder
        puts them; of several at one place the last one drawn is shown."""
        image = batch["image"]
        keep, dropped = self.draw_masks(image)
        predicted = self.decoder(self.encode(image, keep, dropped)).argmax(dim=-1)
        patches = gather_tokens(patchify(image, self.patch_size), keep)
        places = torch.where(dropped, predicted, keep)
        columns = [image]
        for position, shown in ((keep, torch.ones_like(dropped)), (keep, ~dropped), (places, torch.ones_like(dropped))):
            canvas = image.new_zeros(len(image), self.grid[0] * self.grid[1], patches.shape[-1])
            for row, order, values in zip(canvas, position, patches * shown.unsqueeze(-1), strict=True):
                row[order] = values
            columns.append(unpatchify(canvas, self.patch_size, self.grid))
        return {"positions": torch.stack(columns, dim=1)}


class PositionDecoder(nn.Module):
    """Classifies the position of each visible patch, without a positional embedding.

    Args:
        encoder_dim: width of the encoder's tokens.
        dim, depth, heads: width, number of blocks and of attention heads of the transformer.
        positions: N, number of patches in an image.
        prefix_tokens: P, number of the encoder's tokens before the patches.
    """

    def __init__(
        self, *, encoder_dim: int, dim: int, depth: int, heads: int, positions: int, prefix_tokens: int = 1
    ) -> None:
        super().__init__()
        self.prefix_tokens = prefix_tokens
        self.embed = nn.Linear(encoder_dim, dim)
        self.blocks = nn.Sequential(*[Block(dim, heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)])
        self.norm = LayerNorm(dim)
        self.pred = nn.Linear(dim, positions)

    def forward(self, visible: Tensor) -> Tensor:
        """[B, P + V, encoder_dim] -> [B, V, N]."""
        return self.pred(self.norm(self.blocks(self.embed(visible))))[:, self.prefix_tokens :]


def smoothed_positions(grid: tuple[int, int], sigma: float) -> Tensor:
    """The target of each position: float64 [N, N], in row i exp(-distance(i, j)^2 / sigma^2) over the sum of column j,
    with distances in patches. One-hot for ``sigma`` 0.

    As in the authors' code; the sum of row i would make it a distribution. At sigma 1 rows sum to 0.9 to 1.1.
    """
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    if sigma == 0:
        return torch.eye(len(places), dtype=torch.float64)
    weights = (-(places[:, None] - places[None]).pow(2).sum(dim=-1) / sigma**2).exp()
    return weights / weights.sum(dim=0)


@full_precision
def similarity_weights(class_token: Tensor, patches: Tensor, temperature: float, keep: Tensor) -> Tensor:
    """See `DropPos.attentive_weights`: [B, 1, D], [B, N, D], int64 [B, V] -> [B, V]."""
    similarity = F.cosine_similarity(class_token, patches, dim=-1)
    weights = (similarity / temperature).softmax(dim=-1).gather(1, keep)
    return weights / weights.sum(dim=-1, keepdim=True)


@full_precision
def position_cross_entropy(logits: Tensor, positions: Tensor, weights: Tensor, targets: Tensor) -> Tensor:
    """Weighted mean over patches of the cross-entropy of predicted positions.

    Args:
        logits: [B, V, N].
        positions: int64 [B, V], true positions.
        weights: [B, V], 0 for patches that do not count.
        targets: [N, N], the target of each position, a row each.
    """
    loss = -(targets[positions] * logits.log_softmax(dim=-1)).sum(dim=-1)
    return (loss * weights).sum() / weights.sum()
