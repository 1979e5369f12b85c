"""A plain ViT for large images: most blocks attend within windows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from einops import rearrange
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from src.errors import SettingError
from src.models.backbones.plain_vit import check_plain_vit
from src.models.backbones.positions import accept_any_image_size, interpolated_positions, position_count


class WindowedViT(nn.Module):
    """The last feature map of a ViT, as in Exploring Plain Vision Transformer Backbones for Object Detection (Li et
    al., 2022): patches without class token or final norm, with attention in windows that do not overlap, except in
    ``global_blocks`` blocks, the last of as many equal parts of the depth. Deviations: no relative positional
    embeddings.

    The weights are the ViT's, under the same names. The positional embedding keeps the ViT's own size, and every
    forward pass interpolates it to the image's, bicubic without antialiasing.

    Args:
        backbone: a timm ViT, changed in place: it takes images of any size, and parameters that the map does not depend
            on (class token, final norm, head) take no gradient.
        window: side of a window in patches; None for global attention in all blocks. The paper's is 14.
        global_blocks: number of blocks with global attention.

    Raises:
        SettingError: not a plain ViT, or a bad number.
    """

    def __init__(self, backbone: nn.Module, *, window: int | None = 14, global_blocks: int = 4) -> None:
        super().__init__()
        if not isinstance(backbone, VisionTransformer) or not hasattr(backbone.blocks[0], "attn"):
            raise SettingError(
                f"backbone: model.pyramid=SimplePyramid needs a plain timm ViT, not a {type(backbone).__name__}; for a "
                "ConvNet use model.pyramid=ConvPyramid"
            )
        check_plain_vit(backbone, "model.pyramid=SimplePyramid", square_patches=True)
        if backbone.pos_embed is None:
            raise SettingError("backbone.pos_embed: model.pyramid=SimplePyramid needs a ViT with positional embeddings")
        depth = len(backbone.blocks)
        if window is not None and (window < 1 or not 0 <= global_blocks <= depth):
            raise SettingError(
                f"model.pyramid: window={window} must be at least 1 and global_blocks={global_blocks} at most the "
                f"{depth} blocks there are"
            )
        self.backbone = accept_any_image_size(backbone)
        self.window = window
        self.global_blocks = frozenset((part + 1) * depth // global_blocks - 1 for part in range(global_blocks))
        used = ("patch_embed.", "pos_embed", "norm_pre.", "blocks.")
        for name, parameter in backbone.named_parameters():
            if not name.startswith(used):
                parameter.requires_grad_(False)  # DDP would wait for its gradient

    @property
    def patch_size(self) -> int:
        return int(self.backbone.patch_embed.patch_size[0])

    def forward(self, image: Tensor) -> Tensor:
        """image: [B, 3, H, W] of whole patches -> [B, D, H / patch, W / patch]."""
        vit = self.backbone
        patches = vit.patch_embed(image)
        rows, columns = grid = (patches.shape[1], patches.shape[2])
        table = vit.get_parameter("pos_embed")[:, position_count(vit) :]
        positions = interpolated_positions(table, vit.patch_embed.grid_size, grid)
        tokens = vit.norm_pre(vit.pos_drop(patches.flatten(1, 2) + positions))
        for number, block in enumerate(vit.blocks):
            window = None if number in self.global_blocks else self.window
            if vit.grad_checkpointing and tokens.requires_grad:
                tokens = checkpoint(_run, block, tokens, grid, window, use_reentrant=False)
            else:
                tokens = _run(block, tokens, grid, window)
        return rearrange(tokens, "b (h w) d -> b d h w", h=rows, w=columns)


def _run(block: nn.Module, tokens: Tensor, grid: tuple[int, int], window: int | None) -> Tensor:
    attention: nn.Module = block.attn  # type: ignore[assignment]
    with nullcontext() if window is None else in_windows(attention, grid, window):
        return block(tokens)


@contextmanager
def in_windows(attention: nn.Module, grid: tuple[int, int], window: int) -> Iterator[None]:
    """While active, ``attention`` of tokens [B, h * w, D] is restricted to windows of ``window`` x ``window``.

    Windows that reach over the border are padded with zeros, which are attended to like any token, as in the authors'
    code.
    """

    def partition(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return windows_of(arguments[0], grid, window), *arguments[1:]

    def merge(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return tokens_of(output, grid, window)

    hooks = [attention.register_forward_pre_hook(partition), attention.register_forward_hook(merge)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def windows_of(tokens: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Partitions tokens into windows: [B, h * w, D] in raster order -> [B * windows, window * window, D], padded with
    zeros at the right and at the bottom."""
    tokens = tokens.unflatten(1, grid)
    tokens = F.pad(tokens, (0, 0, 0, -grid[1] % window, 0, -grid[0] % window))
    return rearrange(tokens, "b (i r) (j c) d -> (b i j) (r c) d", r=window, c=window)


def tokens_of(windows: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """The inverse of `windows_of`; removes the padding."""
    down, across = -(-grid[0] // window), -(-grid[1] // window)
    tokens = rearrange(windows, "(b i j) (r c) d -> b (i r) (j c) d", i=down, j=across, r=window, c=window)
    return tokens[:, : grid[0], : grid[1]].flatten(1, 2)
