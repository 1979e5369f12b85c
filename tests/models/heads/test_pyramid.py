"""Feature pyramids: strides, widths, what they are made of."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from torch import nn

from src.errors import SettingError
from src.models.heads.pyramid import ConvPyramid, SimplePyramid


def vit(patch: int = 16, **kwargs) -> nn.Module:
    sizes = {"img_size": 64, "patch_size": patch, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **sizes | kwargs)


@pytest.mark.parametrize("patch", [8, 16, 32])
def test_every_level_of_the_simple_pyramid_has_its_stride_for_any_patch_size(patch):
    pyramid = SimplePyramid(vit(patch), channels=10, global_blocks=1)
    maps = pyramid(torch.randn(2, 3, 64, 128))
    assert {name: tuple(each.shape) for name, each in maps.items()} == {
        "0": (2, 10, 16, 32),
        "1": (2, 10, 8, 16),
        "2": (2, 10, 4, 8),
        "3": (2, 10, 2, 4),
        "pool": (2, 10, 1, 2),
    }
    assert torch.equal(maps["pool"], maps["3"][:, :, ::2, ::2])


def test_the_simple_pyramid_is_built_as_vitdet_is():
    pyramid = SimplePyramid(vit(), channels=10, global_blocks=1)
    kinds = [[type(layer).__name__ for layer in level] for level in pyramid.levels]
    out = ["Conv2d", "LayerNorm2d", "Conv2d", "LayerNorm2d"]
    assert kinds == [
        ["ConvTranspose2d", "LayerNorm2d", "GELU", "ConvTranspose2d", *out],
        ["ConvTranspose2d", *out],
        out,
        ["MaxPool2d", *out],
    ]
    quarter, half, one, _ = pyramid.levels
    assert [layer.weight.shape[:2] for layer in quarter if isinstance(layer, nn.ConvTranspose2d)] == [(24, 12), (12, 6)]
    assert half[1].weight.shape == (10, 12, 1, 1)
    assert one[0].weight.shape == (10, 24, 1, 1)
    assert one[2].weight.shape == (10, 10, 3, 3)
    assert one[0].bias is None
    assert one[2].bias is None


def test_the_norm_is_over_the_channels_of_each_position():
    features = torch.randn(2, 10, 3, 3)
    normed = LayerNorm2d(10)(features)
    torch.testing.assert_close(normed.mean(dim=1), torch.zeros(2, 3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(normed.var(dim=1, unbiased=False), torch.ones(2, 3, 3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0"])
def test_the_pyramid_of_a_convnet_reads_its_stages_and_nothing_behind_them(name):
    backbone = timm.create_model(name, num_classes=0)
    modes = [module.training for module in backbone.modules()]
    pyramid = ConvPyramid(backbone, channels=10)
    assert [module.training for module in backbone.modules()] == modes
    maps = pyramid.eval()(torch.randn(1, 3, 64, 64))
    assert [tuple(each.shape) for each in maps.values()] == [(1, 10, side, side) for side in (16, 8, 4, 2, 1)]
    torch.stack([each.sum() for each in maps.values()]).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in pyramid.parameters())


def test_the_pyramid_of_a_resnet_reads_its_stages():
    backbone = timm.create_model("resnet18", num_classes=0).eval()
    x = backbone.maxpool(backbone.act1(backbone.bn1(backbone.conv1(torch.ones(1, 3, 64, 64)))))
    expected = [x := getattr(backbone, f"layer{stage}")(x) for stage in (1, 2, 3, 4)]
    for ours, theirs in zip(ConvPyramid(backbone).eval().maps(torch.ones(1, 3, 64, 64)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_bad_values_are_refused_by_their_key():
    with pytest.raises(SettingError, match=r"backbone.patch_size=14 must be a power of two .* 4, 8, 16, 32"):
        SimplePyramid(vit(14, img_size=56), global_blocks=1)
    with pytest.raises(SettingError, match=r"model.pyramid.strides=\[4, 12\] must be powers of two"):
        SimplePyramid(vit(), strides=[4, 12])
    with pytest.raises(SettingError, match=r"VisionTransformer has maps at strides 16, 16, 16, 16; .* 4, 8, 16, 32"):
        ConvPyramid(vit(depth=4))
    with pytest.raises(SettingError, match=r"image_size: images of 48x64 pixels are not a multiple of 32"):
        SimplePyramid(vit(), global_blocks=1)(torch.randn(1, 3, 48, 64))
