"""Maps of encoders, against what the encoders' own layers give."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from src.errors import SettingError
from src.models.backbones.feature_maps import FeatureMaps


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **shape | options)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=0, channels=[8, 16, 24, 32])


def pictures(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_a_vit_s_maps_are_its_blocks_in_even_steps() -> None:
    backbone = vit().eval()
    maps = FeatureMaps(backbone, count=3).eval()
    assert maps.indices == (1, 3, 5)
    assert (maps.channels, maps.strides, maps.flat) == ((24, 24, 24), (8, 8, 8), True)
    outputs: dict[int, Tensor] = {}
    for number, block in enumerate(backbone.blocks):  # type: ignore[arg-type]
        block.register_forward_hook(lambda _m, _i, output, number=number: outputs.update({number: output}))
    with torch.no_grad():
        found = maps(pictures())
        beside = maps.with_class_token(pictures())
    for each, (patches, cls), number in zip(found, beside, (1, 3, 5), strict=True):
        expected = outputs[number][:, 1:].transpose(1, 2).reshape(2, 24, 4, 4)
        torch.testing.assert_close(each, expected)
        torch.testing.assert_close(patches, expected)
        torch.testing.assert_close(cls, outputs[number][:, 0])


def test_a_vit_s_maps_of_another_size_have_positions_interpolated_without_antialiasing() -> None:
    backbone = vit().eval()
    smaller = vit(img_size=16).eval()
    table = backbone.pos_embed  # type: ignore[union-attr]
    grid = table[:, 1:].transpose(1, 2).reshape(1, 24, 4, 4)  # type: ignore[index]
    patches = torch.nn.functional.interpolate(grid, size=(2, 2), mode="bicubic").flatten(2).transpose(1, 2)
    pos_embed = torch.cat([table[:, :1], patches], dim=1)  # type: ignore[index]
    smaller.load_state_dict({**backbone.state_dict(), "pos_embed": pos_embed})
    with torch.no_grad():
        found, expected = (FeatureMaps(each, count=1).eval()(pictures(16)) for each in (backbone, smaller))
    torch.testing.assert_close(found, expected)


def test_blocks_are_those_that_are_named_and_may_be_normed() -> None:
    assert FeatureMaps(vit(depth=12)).indices == (2, 5, 8, 11)  # DPT's
    backbone = vit().eval()
    chosen = FeatureMaps(backbone, blocks=[2, 5], norm=True).eval()
    assert chosen.indices == (2, 5)
    with torch.no_grad():
        last = chosen(pictures())[-1]
        tokens = backbone.forward_features(pictures())  # type: ignore[operator]
    torch.testing.assert_close(last, tokens[:, 1:].transpose(1, 2).reshape(2, 24, 4, 4))


def test_a_convnet_s_maps_are_its_stages_from_stride_4_on() -> None:
    backbone: Any = resnet().eval()
    maps = FeatureMaps(backbone).eval()
    assert (maps.channels, maps.strides, maps.flat) == ((8, 16, 24, 32), (4, 8, 16, 32), False)
    x = backbone.maxpool(backbone.act1(backbone.bn1(backbone.conv1(pictures(64)))))
    for layer, found in zip((1, 2, 3, 4), maps(pictures(64)), strict=True):
        x = getattr(backbone, f"layer{layer}")(x)
        torch.testing.assert_close(found, x)
    assert FeatureMaps(resnet(), count=2).strides == (16, 32)


@pytest.mark.parametrize("name", ["convnext_atto", "mnasnet_small", "efficientnet_b0"])
def test_channels_and_strides_are_those_of_the_maps(name: str) -> None:
    maps = FeatureMaps(timm.create_model(name, num_classes=0)).eval()
    assert maps.strides == (4, 8, 16, 32)
    with torch.no_grad():
        shapes = [each.shape for each in maps(pictures(64))]
    assert shapes == [
        (2, width, 64 // stride, 64 // stride) for width, stride in zip(maps.channels, maps.strides, strict=True)
    ]


def test_pictures_of_other_sizes_are_taken() -> None:
    maps = FeatureMaps(vit(), count=1).eval()
    image = torch.randn(1, 3, 24, 48)
    assert maps(image)[0].shape == (1, 24, 3, 6)
    with pytest.raises(SettingError, match="not a whole number of patches"):
        maps(torch.randn(1, 3, 20, 32))


@pytest.mark.parametrize("backbone", [vit, resnet, lambda: timm.create_model("convnext_atto", num_classes=0)])
def test_only_parameters_that_maps_depend_on_take_gradients(backbone: Any) -> None:
    """What takes a gradient and gets none would stop a run on several devices."""
    model = backbone()
    maps = FeatureMaps(model, count=2).train()
    assert any(not parameter.requires_grad for parameter in model.parameters()) == isinstance(
        model, timm.models.VisionTransformer | timm.models.ConvNeXt
    )
    sum(each.square().sum() for each in maps(pictures(64))).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_parameters_after_the_last_map_take_no_gradient() -> None:
    model = vit()
    maps = FeatureMaps(model, blocks=[0, 2]).train()
    assert len(maps(pictures())) == 2
    names = {name.split(".")[1] for name, each in model.named_parameters() if each.requires_grad and "blocks" in name}
    assert names == {"0", "1", "2"}
    assert len(model.blocks) == 6  # type: ignore[arg-type]  # it is still whole for those who export it


def test_a_frozen_backbone_stays_as_it_is() -> None:
    model = resnet()
    maps = FeatureMaps(model, frozen=True)
    maps.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = maps(pictures(64))
    assert not any(each.requires_grad for each in (*found, *model.parameters()))
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureMaps(resnet(), blocks=[1]), r"model.blocks=\[1\]: a ConvNet has stages, not blocks"),
        (
            lambda: FeatureMaps(vit(), blocks=[3, 6]),
            r"model.blocks=\[3, 6\]: indices of blocks in rising order, from 0 to 5",
        ),
        (lambda: FeatureMaps(vit(), blocks=[3, 1]), "in rising order"),
        (lambda: FeatureMaps(vit(depth=2), count=4), "a ViT of 2 blocks cannot give 4 maps"),
        (lambda: FeatureMaps(vit(), count=0), "at least one map"),
        (lambda: FeatureMaps(nn.Linear(2, 2)), "Linear has no feature maps"),
    ],
)
def test_bad_backbones_and_blocks_are_refused(make: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make()
