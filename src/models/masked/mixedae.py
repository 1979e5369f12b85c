"""MixedAE: mix the patches of several images, let those of one image recognize each other, reconstruct all images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from src.datamodules.batches.image import ImageBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, mean_patch
from src.models.backbones.plain_vit import check_plain_vit, embed_patches, encode_tokens
from src.models.backbones.positions import fixed_positions, position_count
from src.models.functional import full_precision, l2_normalize
from src.models.losses.contrastive import contrastive_loss
from src.models.losses.reconstruction import masked_mse, normalize_patches, patchify, unpatchify
from src.models.masked.mae import decoder_of, initialize, visible_and_reconstructed
from src.models.masked.masking import Masking, gather_tokens
from src.models.pretrain_module import PretrainModule, StepOutput
from src.optim import OptimizerRecipe


class Mixture(NamedTuple):
    """Encoded mixtures of G groups of images."""

    prefix: Tensor  # [G, P, D], class token and registers
    patches: Tensor  # [G, N, D]
    precision: Tensor  # scalar: share of the most similar keys that are of the query's image, in the last block


class MixedAE(PretrainModule):
    """Mixed Autoencoder for Self-supervised Visual Representation Learning (Chen et al., 2023).

    Deviations: the authors published no code. The temperature and the weight of the contrast, where segment embeddings
    are added, the number of keys of homologous attention and its treatment of the class token are reconstructed. Only
    compose mixing is here, which makes one mixture of each group of images.

    Groups of ``sources`` images are mixed patch by patch: each position of a mixture shows the patch that one of the
    images has there, and each image is shown at equally many. From the second block on, each patch attends to its most
    similar patches alone, as many as an image has in the mixture (homologous attention), and a contrastive loss draws
    patches of one image together. MAE's decoder then reconstructs every image from its patches in the mixture.

    Args:
        backbone: a timm ViT without a head, see `check_plain_vit`. Its positional embedding is replaced by the fixed
            sine-cosine one and its weights are initialized anew.
        optimizer: AdamW with betas (0.9, 0.95) in the paper.
        sources: number of images in a mixture, 1 over the paper's mixing ratio.
        homologous_attention: patches attend to their most similar patches alone, in pretraining.
        segments: add an embedding of its image to each patch, which is learned for each place in the group.
        contrast_weight: weight of the contrastive loss.
        contrast_temperature: similarities are divided by it.
        decoder_dim, decoder_depth, decoder_heads: width, number of blocks and of attention heads of the decoder.
        norm_pix: normalize the pixels of each target patch to zero mean and unit variance.

    Raises:
        SettingError: fewer than two sources, a number of patches that they do not divide or that leaves each a single
            one, a temperature that is not positive, or a backbone that does more than a plain ViT; in a step, a batch
            that is not a whole number of groups.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        optimizer: OptimizerRecipe,
        *,
        sources: int = 4,
        homologous_attention: bool = True,
        segments: bool = True,
        contrast_weight: float = 0.1,
        contrast_temperature: float = 0.25,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        norm_pix: bool = True,
    ) -> None:
        super().__init__(optimizer)
        check_plain_vit(backbone, "MixedAE", square_patches=True)
        self.grid: tuple[int, int] = backbone.patch_embed.grid_size
        patches = self.grid[0] * self.grid[1]
        if sources < 2 or patches % sources or patches < 2 * sources:
            raise SettingError(
                f"model.sources={sources} must be at least 2 and divide the {patches} patches of an image, with at "
                "least 2 patches each"
            )
        if contrast_temperature <= 0:
            raise SettingError(f"model.contrast_temperature={contrast_temperature} must be above 0")
        self.sources = sources
        self.homologous_attention = homologous_attention
        self.contrast_weight = contrast_weight
        self.contrast_temperature = contrast_temperature
        self.norm_pix = norm_pix
        self.patch_size = backbone.patch_embed.patch_size[0]
        self.backbone = backbone
        backbone.pos_embed = fixed_positions(backbone.embed_dim, self.grid, prefix_tokens=position_count(backbone))
        self.decoder = decoder_of(backbone, dim=decoder_dim, depth=decoder_depth, heads=decoder_heads)
        initialize(self)
        self.segments = nn.Parameter(torch.zeros(sources, backbone.embed_dim)) if segments else None
        if self.segments is not None:
            nn.init.normal_(self.segments, std=0.02)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> StepOutput:
        image = batch["image"]
        mixing = self.draw_mixing(image)
        mixture = self.encode(self.mix(image, mixing), mixing)
        masking = masking_of(mixing, self.sources)
        visible = self.unmix(mixture, masking)
        prediction = self.decoder(visible, masking.restore)
        reconstruction = masked_mse(prediction, self.target(image), masking.mask)
        contrast = homologous_contrast(mixture.patches, mixing, self.contrast_temperature)
        return {
            "loss": reconstruction + self.contrast_weight * contrast,
            "logs": {
                "reconstruction": reconstruction.detach(),
                "contrast": contrast.detach(),
                "homologous_precision": mixture.precision,
            },
            "embedding": visible[:, self.backbone.num_prefix_tokens :].detach().float().mean(dim=1),
        }

    def draw_mixing(self, image: Tensor) -> Tensor:
        """Draws the image of each position of each group's mixture: int64 [G, N] of 0 to S - 1, each N / S times."""
        groups, rest = divmod(len(image), self.sources)
        if rest:
            raise SettingError(
                f"data.batch_size: each process and micro-batch needs a whole number of groups of "
                f"model.sources={self.sources} images, got {len(image)} images"
            )
        order = torch.rand(groups, self.grid[0] * self.grid[1], device=image.device).argsort(dim=1)
        return order % self.sources

    def mix(self, image: Tensor, mixing: Tensor) -> Tensor:
        """Mixes groups of images, one after another in the batch: [G * S, C, H, W], int64 [G, N] -> [G, C, H, W]."""
        patches = patchify(image, self.patch_size).unflatten(0, (-1, self.sources))
        place = mixing[:, None, :, None].expand(-1, 1, -1, patches.shape[-1])
        return unpatchify(patches.gather(1, place).squeeze(1), self.patch_size, self.grid)

    def encode(self, mixed: Tensor, mixing: Tensor) -> Mixture:
        """Encodes mixtures: [G, C, H, W], int64 [G, N]."""
        vit = self.backbone
        prefix, patches = embed_patches(vit, mixed)
        if self.segments is not None:
            patches = patches + self.segments[mixing]
        count = mixing.shape[1] // self.sources
        with homologous_attention(vit.blocks, prefix.shape[1], count, active=self.homologous_attention) as keys:
            tokens = encode_tokens(vit, prefix, patches)
        same = mixing[:, :, None] == mixing[:, None, :]
        nearest = keys[0][:, :, prefix.shape[1] :, prefix.shape[1] :]
        precision = (nearest & same.unsqueeze(1)).sum() / nearest.sum()
        prefix, patches = tokens.tensor_split([prefix.shape[1]], dim=1)
        return Mixture(prefix, patches, precision)

    def unmix(self, mixture: Mixture, masking: Masking) -> Tensor:
        """Deals the tokens of mixtures out to their images, each with the mixture's prefix: [G * S, P + N / S, D]."""
        prefix, patches = (tokens.repeat_interleave(self.sources, dim=0) for tokens in mixture[:2])
        return torch.cat([prefix, gather_tokens(patches, masking.keep)], dim=1)

    def target(self, image: Tensor) -> Tensor:
        """The target of the decoder: [B, N, size * size * channels]."""
        patches = patchify(image, self.patch_size)
        return normalize_patches(patches)[0] if self.norm_pix else patches

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": ImageEncoder(self.backbone, pool=mean_patch)}

    def visualize(self, batch: ImageBatch) -> Mapping[str, Tensor]:
        """The image, its group's mixture, its own patches in it, and the reconstruction."""
        image = batch["image"][: len(batch["image"]) // self.sources * self.sources]
        if not len(image):
            return {}
        mixing = self.draw_mixing(image)
        mixed = self.mix(image, mixing)
        masking = masking_of(mixing, self.sources)
        prediction = self.decoder(self.unmix(self.encode(mixed, mixing), masking), masking.restore).float()
        columns = visible_and_reconstructed(image, prediction, masking.mask, self.grid, norm_pix=self.norm_pix)
        return {"reconstruction": torch.stack([image, mixed.repeat_interleave(self.sources, dim=0), *columns], dim=1)}


def masking_of(mixing: Tensor, sources: int) -> Masking:
    """The mixing as a masking of each image, whose patches in the mixture are visible: int64 [G, N] -> of G * S."""
    own = torch.arange(sources, device=mixing.device)[:, None]
    mask = (mixing.unsqueeze(1) != own).flatten(0, 1).float()
    order = mask.argsort(dim=1, stable=True)
    return Masking(keep=order[:, : mixing.shape[1] // sources], restore=order.argsort(dim=1), mask=mask)


@contextmanager
def homologous_attention(
    blocks: nn.Sequential, prefix_tokens: int, count: int, *, active: bool
) -> Iterator[list[Tensor]]:
    """While active, patches attend to their `nearest_keys` alone in every block but the first. Yields a list, to which
    a forward pass adds the nearest keys in the last block; ``active=False`` does nothing else."""
    layers: list[Any] = [block.attn for block in blocks]
    of_last: list[Tensor] = []

    def restrict(layer: nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
        nearest = nearest_keys(layer, arguments[0], prefix_tokens, count)
        if layer is layers[-1]:
            of_last.append(nearest)
        return (arguments, {**options, "attn_mask": nearest}) if active and layer is not layers[0] else None

    # a hook, because a sharded block has its weights in its own forward pass alone
    hooked = dict.fromkeys([*(layers[1:] if active else []), layers[-1]])
    handles = [layer.register_forward_pre_hook(restrict, with_kwargs=True) for layer in hooked]
    try:
        yield of_last
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def nearest_keys(attention: nn.Module, x: Tensor, prefix_tokens: int, count: int) -> Tensor:
    """The keys of homologous attention, bool [G, heads, P + N, P + N], True where a query attends to a key: of the
    patches each patch attends to the ``count`` with the largest logits; prefix tokens attend, and are attended to,
    as ever.

    Args:
        attention: timm's, of a block.
        x: its input, [G, P + N, D].
        prefix_tokens: P.
        count: number of patches.
    """
    layer: Any = attention
    query, key, _ = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    query, key = layer.q_norm(query)[:, :, prefix_tokens:], layer.k_norm(key)[:, :, prefix_tokens:]
    nearest = (query @ key.transpose(-2, -1)).topk(count, dim=-1).indices
    patches = torch.zeros(*query.shape[:3], query.shape[2], dtype=torch.bool, device=x.device)
    return F.pad(patches.scatter_(-1, nearest, True), (prefix_tokens, 0, prefix_tokens, 0), value=True)


@full_precision
def homologous_contrast(patches: Tensor, mixing: Tensor, temperature: float) -> Tensor:
    """Contrastive loss among the patches of one mixture: the positives of a patch are the other patches of its image,
    the negatives those of other images.

    Args:
        patches: [G, N, D].
        mixing: int64 [G, N], the image of each patch.
        temperature: cosine similarities are divided by it.
    """
    z = l2_normalize(patches)
    others = ~torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    same = mixing[:, :, None] == mixing[:, None, :]
    logits = z @ z.transpose(1, 2) / temperature
    return contrastive_loss(logits.flatten(0, 1), (same & others).flatten(0, 1), others.repeat(len(z), 1)).mean()
