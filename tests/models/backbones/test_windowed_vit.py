"""Attention in windows: the same weights, and nothing seen of other windows."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from src.errors import SettingError
from src.models.backbones.windowed_vit import WindowedViT, in_windows, tokens_of, windows_of


def vit(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **sizes | kwargs).eval()


def picture(rows: int = 32, columns: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(1))


def test_windows_are_cut_in_raster_order_and_put_back():
    tokens = torch.arange(15.0).view(1, 15, 1)  # a grid of 3 x 5
    windows = windows_of(tokens, (3, 5), 2)
    by_hand = [[0, 1, 5, 6], [2, 3, 7, 8], [4, 0, 9, 0], [10, 11, 0, 0], [12, 13, 0, 0], [14, 0, 0, 0]]
    assert windows.squeeze(-1).tolist() == by_hand
    assert torch.equal(tokens_of(windows, (3, 5), 2), tokens)


def test_a_window_as_large_as_the_picture_is_global_attention():
    image = picture()
    everywhere = WindowedViT(vit(), window=None)(image)
    assert torch.equal(WindowedViT(vit(), window=4, global_blocks=0)(image), everywhere)
    assert not torch.allclose(WindowedViT(vit(), window=2, global_blocks=0)(image), everywhere, atol=1e-3)


def test_without_windows_it_is_the_vit_itself_but_for_class_token_and_final_norm():
    plain = vit(class_token=False, global_pool="avg", fc_norm=False)
    expected = plain.norm(
        WindowedViT(vit(class_token=False, global_pool="avg", fc_norm=False), window=None)(picture())
        .flatten(2)
        .transpose(1, 2)
    )
    torch.testing.assert_close(expected, plain.forward_features(picture()))


@pytest.mark.parametrize("size", [(64, 48), (40, 56)], ids=["whole windows", "filled up"])
def test_windows_do_not_see_each_other_without_a_global_block(size):
    model = WindowedViT(vit(), window=2, global_blocks=0)
    image = picture(*size)
    changed = image.clone()
    changed[:, :, 16:32, 16:32] += 1.0  # the window in the second row and column
    differs = (model(image) != model(changed)).any(dim=1)
    expected = torch.zeros_like(differs)
    expected[:, 2:4, 2:4] = True
    assert torch.equal(differs, expected)


def test_a_global_block_passes_information_between_windows():
    model = WindowedViT(vit(), window=2, global_blocks=1)
    image = picture(64, 64)
    changed = image.clone()
    changed[:, :, :16, :16] += 1.0
    assert (model(image) != model(changed)).any(dim=1).all()


@pytest.mark.parametrize(
    ("depth", "count", "expected"), [(12, 4, {2, 5, 8, 11}), (24, 4, {5, 11, 17, 23}), (4, 1, {3})]
)
def test_global_blocks_end_equal_parts_of_the_depth(depth, count, expected):
    assert WindowedViT(vit(depth=depth), global_blocks=count).global_blocks == expected


def test_a_window_that_is_filled_up_attends_to_zeros():
    """Three patches and a zero in a window of 2 x 2, by one head and by hand."""
    attention = vit(num_heads=1).blocks[0].attn
    tokens = torch.randn(1, 3, 24)
    with in_windows(attention, (1, 3), 2):
        windowed = attention(tokens)
    filled = torch.cat([tokens[:, 2:], torch.zeros(1, 3, 24)], dim=1)  # the second window: one patch of four
    query, key, value = F.linear(filled, attention.qkv.weight, attention.qkv.bias).chunk(3, dim=-1)
    weights = (query @ key.transpose(1, 2) / 24**0.5).softmax(dim=-1)
    torch.testing.assert_close(windowed[:, 2], attention.proj(weights @ value)[:, 0])
    assert torch.equal(attention(tokens), vit(num_heads=1).blocks[0].attn(tokens))  # nothing is left behind


def test_positions_are_interpolated_to_the_picture():
    model = WindowedViT(vit(), window=None)
    with torch.no_grad():
        model.backbone.pos_embed[:, 1:] = torch.arange(4.0).repeat(4)[None, :, None]  # the column of a grid of 4 x 4
        for block in model.backbone.blocks:
            block.attn.proj.weight.zero_(), block.attn.proj.bias.zero_()
            block.mlp.fc2.weight.zero_(), block.mlp.fc2.bias.zero_()
        model.backbone.patch_embed.proj.weight.zero_(), model.backbone.patch_embed.proj.bias.zero_()
        found = model(picture(32, 64))
    assert found.shape == (2, 24, 4, 8)
    columns = found[0, 0, 0]
    assert (columns.diff() > 0).all()
    torch.testing.assert_close(columns.flip(0), 3 - columns)  # symmetric
    # half-way between two columns Keys' kernel with a = -0.75 weighs (at +-0.25, +-0.75, 1.25) by hand: column 2 of 8
    # lies at 0.75 of 4, whose neighbors 0, 0, 1, 2 weigh as follows
    near = lambda x: 1.25 * x**3 - 2.25 * x**2 + 1  # noqa: E731
    far = lambda x: -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)  # noqa: E731
    weights = [far(1.75), near(0.75), near(0.25), far(1.25)]
    assert sum(weights) == pytest.approx(1.0)
    assert columns[2].item() == pytest.approx(weights[2] * 1 + weights[3] * 2, rel=1e-5)
    torch.testing.assert_close(found, found[:, :1, :1].expand_as(found))


def test_the_positions_that_are_learned_are_the_vits_own():
    model = WindowedViT(vit(), window=2, global_blocks=1)
    model(picture(64, 48)).square().sum().backward()
    assert model.backbone.pos_embed.shape == (1, 1 + 16, 24)
    gradient = model.backbone.pos_embed.grad
    assert (gradient[0, 1:].abs().sum(dim=1) > 0).all()
    assert gradient[0, 0].abs().sum() == 0  # the class token's


def test_recomputed_activations_are_in_the_same_windows():
    gradients = []
    for recompute in (False, True):
        model = WindowedViT(vit(), window=2, global_blocks=1).train()
        model.backbone.set_grad_checkpointing(recompute)
        model(picture(40, 40)).square().mean().backward()
        gradients.append(model.backbone.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*gradients)


def test_parameters_that_the_map_does_not_depend_on_take_no_gradient():
    model = WindowedViT(vit(reg_tokens=2), window=2, global_blocks=1)
    model(picture()).sum().backward()
    learned = {name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}
    assert learned == {name for name, p in model.backbone.named_parameters() if p.grad is not None}
    frozen = {name.split(".")[0] for name, _ in model.backbone.named_parameters()} - {n.split(".")[0] for n in learned}
    assert frozen == {"cls_token", "reg_token", "norm"}


def test_other_backbones_and_impossible_numbers_are_refused():
    with pytest.raises(SettingError, match=r"backbone: .* needs a plain timm ViT, not a ResNet; .*ConvPyramid"):
        WindowedViT(timm.create_model("resnet18", num_classes=0))
    with pytest.raises(SettingError, match="window=0"):
        WindowedViT(vit(), window=0)
    with pytest.raises(SettingError, match="global_blocks=5"):
        WindowedViT(vit(), global_blocks=5)
