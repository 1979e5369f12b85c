"""VideoMAE: hide nine tenths of a clip, the same places in every frame, and regress what is hidden."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from src.datamodules.batches.video import VideoBatch
from src.models.backbones.encoder import Encoder
from src.models.backbones.video_encoder import VideoEncoder
from src.models.backbones.video_vit import sinusoids
from src.models.losses.reconstruction import masked_mse
from src.models.masked.mae import initialize
from src.models.masked.masking import Masking, gather_tokens
from src.models.pretrain_module import PretrainModule, StepOutput
from src.models.video.masking import Decoded, VideoMasking, hidden_cubes, tubes
from src.optim import OptimizerRecipe


class VideoMAE(PretrainModule):
    """VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video Pre-Training (Tong et al.,
    2022); with ``decoded=running_cell_masking`` VideoMAE V2: Scaling Video Masked Autoencoders with Dual Masking (Wang et al.,
    2023). Deviations: targets are normalized as the data gives them, which the standard deviation's 1e-6 alone could
    tell from [0, 1].

    Args:
        backbone: a timm ViT with a `TubeletEmbed` and neither class token nor head. Its position table is replaced by the
            fixed one and its linear layers are initialized anew.
        optimizer: AdamW with betas (0.9, 0.95) in the paper.
        mask_ratio: share of the tubelets that is hidden.
        masking: which they are.
        decoded: which tubelets the decoder predicts.
        decoder_dim, decoder_depth, decoder_heads: of the decoder.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        optimizer: OptimizerRecipe,
        *,
        mask_ratio: float = 0.9,
        masking: VideoMasking = tubes,
        decoded: Decoded = hidden_cubes,
        decoder_dim: int = 384,
        decoder_depth: int = 4,
        decoder_heads: int = 6,
    ) -> None:
        super().__init__(optimizer)
        cubes = backbone.patch_embed
        self.mask_ratio = mask_ratio
        self.masking = masking
        self.decoded = decoded
        self.backbone = backbone
        self.grid: tuple[int, int, int] = cubes.grid
        self.cube: tuple[int, int, int] = (cubes.cube_frames, *cubes.patch_size)
        backbone.pos_embed = sinusoids(backbone.embed_dim, cubes.num_patches)
        self.decoder = VideoMAEDecoder(
            encoder_dim=backbone.embed_dim,
            dim=decoder_dim,
            depth=decoder_depth,
            heads=decoder_heads,
            cubes=cubes.num_patches,
            out_dim=3 * self.cube[0] * self.cube[1] * self.cube[2],
        )
        initialize(self)

    def training_step(self, batch: VideoBatch, batch_idx: int) -> StepOutput:
        video = batch["video"]
        masking = self.masking(len(video), self.grid, self.mask_ratio, video.device)
        visible = self.encode(video, masking)
        decoded = self.decoded(masking, self.grid)
        prediction = self.decoder(visible, masking.keep, decoded)
        target = normalize_cubes(cubify(video, self.cube))[0].flatten(2)
        # of what is decoded the hidden part alone counts
        loss = masked_mse(prediction, gather_tokens(target, decoded), masking.mask.gather(1, decoded))
        return {"loss": loss, "embedding": visible.detach().float().mean(dim=1)}

    def encode(self, video: Tensor, masking: Masking) -> Tensor:
        """The visible tubelets through the ViT: [B, V, D]."""
        vit = self.backbone
        x = gather_tokens(vit.patch_embed(video) + vit.get_parameter("pos_embed"), masking.keep)
        return vit.norm(vit.blocks(x))

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": VideoEncoder(self.backbone)}

    def visualize(self, batch: VideoBatch) -> Mapping[str, Tensor]:
        """The clips as stills: three rows each, a frame of each tubelet a column."""
        return {name: shown.flatten(0, 1)[:, :: self.cube[0]] for name, shown in self.visualize_video(batch).items()}

    def visualize_video(self, batch: VideoBatch) -> Mapping[str, Tensor]:
        """Side by side the clip, what the encoder saw, and the reconstruction: predicted tubelets among the visible
        ones."""
        video = batch["video"]
        masking = self.masking(len(video), self.grid, self.mask_ratio, video.device)
        decoded = self.decoded(masking, self.grid)
        prediction = self.decoder(self.encode(video, masking), masking.keep, decoded).float()
        cubes = cubify(video, self.cube)
        _, mean, std = normalize_cubes(cubes)
        shown = cubes.float() * (1 - masking.mask[..., None, None])
        predicted = shown.flatten(2).scatter(1, decoded.unsqueeze(-1).expand_as(prediction), prediction)
        predicted = predicted.view_as(shown) * std + mean
        hidden = masking.mask[..., None, None] > 0
        rows = [uncubify(each, self.cube, self.grid) for each in (cubes, shown, torch.where(hidden, predicted, shown))]
        return {"reconstruction": torch.stack(rows, dim=1)}


class VideoMAEDecoder(nn.Module):
    """Predicts tubelets from the visible ones and their own places.

    Args:
        encoder_dim: width of the visible tokens.
        dim, depth, heads: of the decoder's transformer.
        tubelets: of a clip.
        out_dim: values of a tubelet.
    """

    def __init__(self, *, encoder_dim: int, dim: int, depth: int, heads: int, cubes: int, out_dim: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = sinusoids(dim, cubes)
        self.blocks = nn.Sequential(*[Block(dim, heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)])
        self.norm = LayerNorm(dim)
        self.pred = nn.Linear(dim, out_dim)

    def forward(self, visible: Tensor, places: Tensor, decoded: Tensor) -> Tensor:
        """
        Args:
            visible: [B, V, encoder_dim].
            places: int64 [B, V], theirs.
            decoded: int64 [B, M], places to predict.

        Returns:
            [B, M, out_dim].
        """
        positions = self.pos_embed.expand(len(visible), -1, -1)
        x = self.embed(visible)
        asked = self.mask_token + gather_tokens(positions, decoded)
        x = torch.cat([x + gather_tokens(positions, places), asked.to(x.dtype)], dim=1)
        return self.pred(self.norm(self.blocks(x)[:, -decoded.shape[1] :]))


def cubify(video: Tensor, cube: tuple[int, int, int]) -> Tensor:
    """[B, T, C, H, W] -> [B, N, P, C], the tubelets' P pixels laid out (frame, row, column)."""
    t, p, q = cube
    return rearrange(video, "b (n t) c (h p) (w q) -> b (n h w) (t p q) c", t=t, p=p, q=q)


def uncubify(cubes: Tensor, cube: tuple[int, int, int], grid: tuple[int, int, int]) -> Tensor:
    """The inverse of `cubify`."""
    (t, p, q), (n, h, w) = cube, grid
    return rearrange(cubes, "b (n h w) (t p q) c -> b (n t) c (h p) (w q)", n=n, h=h, w=w, t=t, p=p, q=q)


def normalize_cubes(cubes: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Each tubelet's channels to zero mean and unit variance, each on its own, in float32: (normalized, mean, std)."""
    cubes = cubes.float()
    mean = cubes.mean(dim=2, keepdim=True)
    std = cubes.var(dim=2, keepdim=True).sqrt() + eps
    return (cubes - mean) / std, mean, std
