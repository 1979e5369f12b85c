"""The layout of a timm model's features, a map or tokens, and the images that it takes. Both are found on torch's meta
device, without computing anything, so that a model that cannot be used is refused before training starts."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from src.errors import SettingError


class SplitFeatures(NamedTuple):
    """The output of ``forward_features`` in parts."""

    prefix: Tensor  # [B, P, D], class token and registers; P is 0 for maps
    patches: Tensor  # [B, rows * columns, D]
    grid: tuple[int, int]  # rows and columns


def split_features(backbone: nn.Module, output: Any, size: tuple[int, int]) -> SplitFeatures:
    """Splits the output of ``forward_features``: tokens [B, P + N, D], a map [B, D, H, W], or a map [B, H, W, D] of a
    model whose ``output_fmt`` says so.

    Args:
        backbone: the model.
        output: of it.
        size: height and width of the images.

    Raises:
        SettingError: the output is nothing of these, or no grid of patches.
    """
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        kind = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise SettingError(f"{_named(backbone)} returns features in {kind}, not one map or one sequence of tokens")
    if output.ndim == 4:
        feature_map = output.permute(0, 3, 1, 2) if _is_channels_last(backbone) else output
        patches = feature_map.flatten(2).transpose(1, 2)
        prefix, grid = patches[:, :0], (int(feature_map.shape[2]), int(feature_map.shape[3]))
    else:
        count = prefix_tokens(backbone)
        prefix, patches = output[:, :count], output[:, count:]
        patch_grid = _grid(backbone, size, patches.shape[1])
        if patch_grid is None:
            raise SettingError(
                f"{_named(backbone)} returns {output.shape[1]} tokens for an image of {size_text(size)} pixels, which "
                f"are no grid of patches after {count} others"
            )
        grid = patch_grid
    if patches.shape[2] != backbone.num_features:
        raise SettingError(
            f"{_named(backbone)} returns features of width {patches.shape[2]}, and its num_features is "
            f"{backbone.num_features}"
        )
    return SplitFeatures(prefix, patches, grid)


def check_image_backbone(backbone: nn.Module) -> None:
    """Checks that ``backbone`` has timm's interface of encoders and returns features that `split_features` splits.

    Raises:
        SettingError: it does not; the message names what it has.
    """
    check_heads_and_rates(backbone)
    if not callable(getattr(backbone, "forward_features", None)) or not isinstance(
        getattr(backbone, "num_features", None), int
    ):
        raise SettingError(f"{_named(backbone)} has no forward_features or num_features, timm's interface of encoders")
    size = _working_size(backbone)
    if size is not None:  # None for a model that only its first batch can check
        split_features(backbone, shapes(backbone, size), size)


def check_heads_and_rates(backbone: nn.Module) -> None:
    """Checks values that timm does not check itself.

    Raises:
        SettingError: a number of heads below 1, a block that is always dropped, or no block.
    """
    blocks = getattr(backbone, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks) == 0:
        raise SettingError("backbone.depth must be at least 1: there are no blocks")
    for module in backbone.modules():
        heads, dropped = getattr(module, "num_heads", 1), getattr(module, "drop_prob", 0.0)
        if isinstance(heads, int) and heads < 1:
            raise SettingError(f"backbone.num_heads must be at least 1, got {heads}")
        if isinstance(dropped, float | int) and not 0 <= dropped < 1:
            raise SettingError(
                f"backbone.drop_path_rate must be at least 0 and less than 1: it would drop a block with probability "
                f"{dropped:g}"
            )


def check_accepts_any_size(backbone: nn.Module) -> None:
    """
    Raises:
        SettingError: ``backbone`` only takes images of one size; the message names an option that changes it.
    """
    size = _working_size(backbone)
    if size is None:
        return
    stride = _stride(backbone)
    smaller = tuple(max(stride, -(-side // 2 // stride) * stride) for side in size)
    other = (size[0] + stride, size[1] + stride) if smaller == size else smaller
    if isinstance(shapes(backbone, other), Exception):
        raise SettingError(
            f"{_named(backbone)} takes images of {size_text(size)} pixels alone, and this method also sends it others"
            f"{_hint(backbone)}"
        )


@contextmanager
def explained(backbone: nn.Module, image: Tensor) -> Iterator[None]:
    """While active, an error of ``backbone`` about images of a size, or a number of channels, that it does not take
    becomes a SettingError."""
    try:
        yield
    except SettingError:
        raise
    except (AssertionError, RuntimeError, IndexError, ValueError) as problem:
        error = wrong_channels(problem, image) or wrong_size(backbone, (image.shape[-2], image.shape[-1]))
        if error is None:
            raise
        raise error from problem


def wrong_channels(problem: Exception, image: Tensor) -> SettingError | None:
    """Returns the error about images of another number of channels than a backbone takes; None if ``problem`` is not
    that of a convolution."""
    channels = re.search(r"to have (\d+) channels, but got (\d+) channels", str(problem))
    if channels is None or int(channels[2]) != image.shape[-3]:
        return None
    return SettingError(
        f"backbone.in_chans: the backbone takes images of {channels[1]} channels, and the data have {channels[2]} "
        "(data.channels)"
    )


def wrong_size(backbone: nn.Module, size: tuple[int, int]) -> SettingError | None:
    """Returns the error about images of a size that ``backbone`` does not take; None if it takes them."""
    if not isinstance(shapes(backbone, size), Exception):
        return None
    own = _working_size(backbone)
    if own is None or own == size:
        return None
    return SettingError(
        f"image_size: {type(backbone).__name__} takes images of {size_text(own)} pixels, not of "
        f"{size_text(size)}{_hint(backbone)}"
    )


def prefix_tokens(backbone: nn.Module) -> int:
    """The number of tokens before those of patches: class token and registers."""
    count = getattr(backbone, "num_prefix_tokens", None)
    return count if isinstance(count, int) else int(isinstance(getattr(backbone, "cls_token", None), Tensor))


def own_size(backbone: nn.Module) -> tuple[int, int] | None:
    """The height and width of images that ``backbone`` was built for; None for a model that does not say."""
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    if size is None:
        size = (getattr(backbone, "pretrained_cfg", None) or {}).get("input_size", (None,))[1:]
    return (int(size[0]), int(size[1])) if isinstance(size, tuple | list) and len(size) == 2 else None


def _working_size(backbone: nn.Module) -> tuple[int, int] | None:
    """A size of images that ``backbone`` takes: the one it was built for, or a multiple of its stride where the model
    does not say. None if none is found."""
    own = own_size(backbone)
    if own is None:
        return None
    stride = _stride(backbone)
    squares = [(number * stride, number * stride) for number in (4, 7, 8, 2, 3, 5, 6, 1, 10, 12)]
    return next((size for size in (own, *squares) if not isinstance(shapes(backbone, size), Exception)), None)


def channels_of(backbone: nn.Module) -> int:
    """The number of channels of images."""
    first = next((module for module in backbone.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)), None)
    return first.in_channels if first is not None else int(getattr(backbone, "in_chans", 3))


def without_values(network: nn.Module) -> Any:
    """Returns a copy of ``network`` whose parameters and buffers are on the meta device: it computes shapes alone."""
    copies: dict[int, Tensor] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        copies[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(network, copies)


def shapes(backbone: nn.Module, size: tuple[int, ...]) -> Any:
    """Returns the features of two images, or the exception that ``backbone`` raises. Computed by a copy without values,
    or by a real one where some of its tensors cannot be on the meta device."""
    first = next(backbone.parameters())
    images = torch.empty(2, channels_of(backbone), *size, device="meta", dtype=first.dtype)
    output = _features(without_values(backbone), images)
    if isinstance(output, Exception) and "meta" in str(output):
        output = _features(copy.deepcopy(backbone), torch.zeros_like(images, device=first.device))
    return output


def _features(network: Any, images: Tensor) -> Any:
    """Returns the features, in evaluation mode, or the exception."""
    for module in network.modules():
        module.training = False
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            return network.forward_features(images)
        except Exception as problem:  # timm's models raise many types
            return problem


def _is_channels_last(backbone: nn.Module) -> bool:
    form = getattr(backbone, "output_fmt", None)
    return str(getattr(form, "value", form)) == "NHWC"


def _grid(backbone: nn.Module, size: tuple[int, int], count: int) -> tuple[int, int] | None:
    """Returns the rows and columns of ``count`` patches of an image."""
    embed: Any = getattr(backbone, "patch_embed", None)
    grids = [tuple(embed.dynamic_feat_size(size))] if hasattr(embed, "dynamic_feat_size") else []
    stride = _stride(backbone)
    grids += [tuple(-(-side // stride) for side in size), tuple(side // stride for side in size)]
    return next((grid for grid in grids if grid[0] * grid[1] == count), None)


def _stride(backbone: nn.Module) -> int:
    info: Any = getattr(backbone, "feature_info", None)
    try:
        return int(max(stage["reduction"] for stage in info))
    except (TypeError, KeyError, ValueError):
        return 32


def _hint(backbone: nn.Module) -> str:
    options = inspect.signature(type(backbone).__init__).parameters
    for name, value in (("strict_img_size", "false"), ("dynamic_img_size", "true")):
        if name in options:
            return f"; ARGS=+backbone.{name}={value} builds it for others too"
    return ""


def _named(backbone: nn.Module) -> str:
    return f"backbone.model_name: {type(backbone).__name__}"


def size_text(size: Sequence[int]) -> str:
    """Formats a size or a grid: (14, 16) -> "14x16"."""
    return "x".join(map(str, size))
