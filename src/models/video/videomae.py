"""VideoMAE: masks 90 % of a clip, the same positions in every frame, and reconstructs the masked pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from src.datamodules.batches.video import VideoBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.plain_vit import check_plain_vit, embed_patches, encode_tokens
from src.models.backbones.video_encoder import VideoEncoder
from src.models.backbones.video_vit import TubeletEmbed, sinusoids
from src.models.functional import at_least_float32
from src.models.losses.reconstruction import masked_mse
from src.models.masked.mae import initialize
from src.models.masked.masking import Masking, gather_tokens
from src.models.pretrain_module import PretrainModule, StepOutput
from src.models.video.masking import DecoderMasking, VideoMasking, masked_tubelets, tube_masking
from src.optim import OptimizerRecipe


class VideoMAE(PretrainModule):
    """VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video Pre-Training (Tong et al.,
    2022). With ``decoder_masking=running_cell_masking`` it is VideoMAE V2: Scaling Video Masked Autoencoders with Dual
    Masking (Wang et al., 2023). Deviations: the warm-up reaches its peak one step later.

    Args:
        backbone: a timm ViT with a `TubeletEmbed` and neither class token nor head. Its positional embedding is
            replaced by the fixed one, and its linear layers are initialized anew.
        optimizer: AdamW with betas (0.9, 0.95) in the paper.
        mask_ratio: share of the tubelets that the encoder does not see.
        masking: chooses these tubelets.
        decoder_masking: chooses the tubelets that the decoder predicts.
        pixel_std: see `normalize_tubelets`.
        decoder_dim, decoder_depth, decoder_heads: of the decoder's transformer.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        optimizer: OptimizerRecipe,
        *,
        mask_ratio: float = 0.9,
        masking: VideoMasking = tube_masking,
        decoder_masking: DecoderMasking = masked_tubelets,
        pixel_std: Sequence[float] | None = None,
        decoder_dim: int = 384,
        decoder_depth: int = 4,
        decoder_heads: int = 6,
    ) -> None:
        super().__init__(optimizer)
        check_plain_vit(backbone, "VideoMAE", embed=TubeletEmbed)
        if backbone.num_prefix_tokens:
            raise SettingError(
                f"backbone.class_token, backbone.reg_tokens: VideoMAE needs a ViT of tubelets alone, and this has "
                f"{backbone.num_prefix_tokens} tokens before them; set class_token=false and reg_tokens=0"
            )
        embed = backbone.patch_embed
        self.mask_ratio = mask_ratio
        self.masking = masking
        self.decoder_masking = decoder_masking
        self.pixel_std = pixel_std
        self.backbone = backbone
        self.grid: tuple[int, int, int] = embed.grid
        self.tubelet: tuple[int, int, int] = (embed.tubelet_frames, *embed.patch_size)
        backbone.pos_embed = sinusoids(backbone.embed_dim, embed.num_patches)
        self.decoder = VideoMAEDecoder(
            encoder_dim=backbone.embed_dim,
            dim=decoder_dim,
            depth=decoder_depth,
            heads=decoder_heads,
            tubelets=embed.num_patches,
            out_dim=embed.projection.in_channels * self.tubelet[0] * self.tubelet[1] * self.tubelet[2],
        )
        initialize(backbone)
        self.decoder.initialize()

    def training_step(self, batch: VideoBatch, batch_idx: int) -> StepOutput:
        video = batch["video"]
        masking = self.masking(len(video), self.grid, self.mask_ratio, video.device)
        visible = self.encode(video, masking)
        decoded = self.decoder_masking(masking, self.grid)
        prediction = self.decoder(visible, masking.keep, decoded)
        target = normalize_tubelets(to_tubelets(video, self.tubelet), self.pixel_std)[0].flatten(2)
        # only masked tubelets enter the loss; with V2's decoder mask some of the decoded ones are visible
        loss = masked_mse(prediction, gather_tokens(target, decoded), masking.mask.gather(1, decoded))
        return {"loss": loss, "embedding": visible.detach().float().mean(dim=1)}

    def encode(self, video: Tensor, masking: Masking) -> Tensor:
        """Encodes the visible tubelets: [B, T, 3, H, W] -> [B, V, D]."""
        none, tubelets = embed_patches(self.backbone, video)
        return encode_tokens(self.backbone, none, gather_tokens(tubelets, masking.keep))

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": VideoEncoder(self.backbone)}

    def visualize(self, batch: VideoBatch) -> Mapping[str, Tensor]:
        """The videos of `visualize_video` as images: three rows each, one frame of each tubelet a column."""
        return {name: rows.flatten(0, 1)[:, :: self.tubelet[0]] for name, rows in self.visualize_video(batch).items()}

    def visualize_video(self, batch: VideoBatch) -> Mapping[str, Tensor]:
        """The clip, the visible tubelets, and the reconstruction with the visible tubelets filled in."""
        video = batch["video"]
        masking = self.masking(len(video), self.grid, self.mask_ratio, video.device)
        decoded = self.decoder_masking(masking, self.grid)
        prediction = self.decoder(self.encode(video, masking), masking.keep, decoded).float()
        tubelets = to_tubelets(video, self.tubelet)
        _, mean, std = normalize_tubelets(tubelets, self.pixel_std)
        visible = tubelets.float() * (1 - masking.mask[..., None, None])
        predicted = visible.flatten(2).scatter(1, decoded.unsqueeze(-1).expand_as(prediction), prediction)
        predicted = predicted.view_as(visible) * std + mean
        reconstruction = torch.where(masking.mask[..., None, None] > 0, predicted, visible)
        columns = [from_tubelets(x, self.tubelet, self.grid) for x in (tubelets, visible, reconstruction)]
        return {"reconstruction": torch.stack(columns, dim=1)}


class VideoMAEDecoder(nn.Module):
    """Predicts tubelets from the visible ones and the positional embeddings of both.

    Args:
        encoder_dim: width of the visible tokens.
        dim, depth, heads: of the decoder's transformer.
        tubelets: number of tubelets in a clip.
        out_dim: number of values in a tubelet.
    """

    def __init__(self, *, encoder_dim: int, dim: int, depth: int, heads: int, tubelets: int, out_dim: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = sinusoids(dim, tubelets)
        self.blocks = nn.Sequential(*[Block(dim, heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)])
        self.norm = LayerNorm(dim)
        self.pred = nn.Linear(dim, out_dim)

    def initialize(self) -> None:
        """Initializes blocks and prediction as the encoder's. `embed` keeps torch's initialization, and the mask token
        is normal, truncated at one standard deviation of 0.02, as in the authors' code."""
        for part in (self.blocks, self.norm, self.pred):
            initialize(part)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, visible: Tensor, positions: Tensor, decoded: Tensor) -> Tensor:
        """
        Args:
            visible: [B, V, encoder_dim].
            positions: int64 [B, V], positions of the visible tubelets.
            decoded: int64 [B, M], positions to predict.

        Returns:
            [B, M, out_dim].
        """
        pos_embed = self.pos_embed.expand(len(visible), -1, -1)
        x = self.embed(visible)
        mask_tokens = self.mask_token + gather_tokens(pos_embed, decoded)
        x = torch.cat([x + gather_tokens(pos_embed, positions), mask_tokens.to(x.dtype)], dim=1)
        return self.pred(self.norm(self.blocks(x)[:, -decoded.shape[1] :]))


def to_tubelets(video: Tensor, tubelet: tuple[int, int, int]) -> Tensor:
    """Cuts clips into tubelets: [B, T, C, H, W] -> [B, N, P, C], where P is (frame, row, column) in a tubelet."""
    t, p, q = tubelet
    return rearrange(video, "b (n t) c (h p) (w q) -> b (n h w) (t p q) c", t=t, p=p, q=q)


def from_tubelets(tubelets: Tensor, tubelet: tuple[int, int, int], grid: tuple[int, int, int]) -> Tensor:
    """Inverts `to_tubelets`: [B, N, P, C] -> [B, T, C, H, W]."""
    (t, p, q), (n, h, w) = tubelet, grid
    return rearrange(tubelets, "b (n h w) (t p q) c -> b (n t) c (h p) (w q)", n=n, h=h, w=w, t=t, p=p, q=q)


def normalize_tubelets(
    tubelets: Tensor, pixel_std: Sequence[float] | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalizes each channel of each tubelet to zero mean and unit variance: (normalized, mean, std), in float32 or
    float64.

    Args:
        tubelets: [B, N, P, C], see `to_tubelets`.
        pixel_std: standard deviation of each channel that the data divided pixels in [0, 1] by, ``data.std``; None for
            pixels that are not divided.
        eps: added to the standard deviation of pixels in [0, 1].

    Raises:
        SettingError: not a deviation for each channel.
    """
    tubelets = at_least_float32(tubelets)
    divisor = tubelets.new_ones(tubelets.shape[-1]) if pixel_std is None else tubelets.new_tensor(list(pixel_std))
    if len(divisor) != tubelets.shape[-1]:
        raise SettingError(
            f"model.pixel_std={divisor.tolist()} must have a value for each of the {tubelets.shape[-1]} channels of a "
            "frame, as data.std has"
        )
    mean = tubelets.mean(dim=2, keepdim=True)
    std = tubelets.var(dim=2, keepdim=True).sqrt() + eps / divisor
    return (tubelets - mean) / std, mean, std
