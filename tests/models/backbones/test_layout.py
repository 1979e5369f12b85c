"""The features of timm's models as an `ImageEncoder` reads them, and the models it refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from timm.models.volo import VOLO
from torch import nn

from src.errors import SettingError
from src.models.backbones.image_encoder import ImageEncoder, cls_token, mean_patch
from src.models.backbones.layout import check_accepts_any_size, check_image_backbone
from src.models.backbones.plain_vit import check_plain_vit
from src.models.backbones.positions import accept_any_image_size
from tests.toys import small_vit


def swin(**options: Any) -> nn.Module:
    small: dict[str, Any] = {"depths": (1, 1), "embed_dim": 8, "num_heads": (1, 2), "window_size": 2, "img_size": 16}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **{**small, **options})


def images(*size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (partial(swin, img_size=(16, 32)), (16, 32)),
        (partial(timm.create_model, "test_mambaout", num_classes=0), (32, 96)),
    ],
)
def test_maps_with_the_channels_last_are_read_by_place(make: Any, size: tuple[int, int]) -> None:
    network = make()
    encoder = ImageEncoder(network).eval()
    with torch.no_grad():
        features, output = encoder(images(*size)), network.forward_features(images(*size))  # type: ignore[operator]
    rows, columns = features.grid
    assert output.shape == (2, rows, columns, encoder.dim)
    assert columns == size[1] // size[0] * rows
    for row in range(rows):
        for column in range(columns):
            assert torch.equal(features.patches[:, row * columns + column], output[:, row, column])
    torch.testing.assert_close(features.embedding, output.mean(dim=(1, 2)))


def test_tokens_without_timms_attributes() -> None:
    """An MLP mixer names no prefix tokens and has another patch embedding; a VOLO has a class token that it does not
    count."""
    mixer = MlpMixer(img_size=(32, 48), patch_size=16, num_blocks=1, embed_dim=8, num_classes=0).eval()  # type: ignore
    features = ImageEncoder(mixer)(images(32, 48))
    assert features.grid == (2, 3)
    torch.testing.assert_close(features.embedding, mixer.forward_features(images(32, 48)).mean(dim=1))
    widths = {"embed_dims": (8, 16, 16, 16), "num_heads": (1, 2, 2, 2), "layers": (1, 1, 1, 1), "num_classes": 0}
    volo = VOLO(img_size=32, outlook_attention=(True, False, False, False), **widths).eval()  # type: ignore[arg-type]
    features, output = ImageEncoder(volo, cls_token)(images(32, 32)), volo.forward_features(images(32, 32))
    assert torch.equal(features.embedding, output[:, 0])
    assert torch.equal(features.patches, output[:, 1:])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("coat_tiny", {"depths": (1, 1, 1, 1)}, "backbone.model_name: CoaT returns features in a list, not one map"),
        (
            "pit_ti_224",
            {"depths": (1, 1, 1)},
            "PoolingVisionTransformer returns 1 tokens for an image of 224x224",
        ),
    ],
)
def test_features_that_are_no_map_are_refused_when_the_encoder_is_built(name: str, options: Any, message: str) -> None:
    try:
        network = timm.create_model(name, num_classes=0, **options)
    except TypeError:
        network = timm.create_model(name, num_classes=0)
    with pytest.raises(SettingError, match=message):
        ImageEncoder(network)


def test_a_network_that_is_no_encoder_is_refused() -> None:
    with pytest.raises(SettingError, match=r"backbone\.model_name: Linear has no forward_features or num_features"):
        ImageEncoder(nn.Linear(2, 2))


def test_the_check_changes_neither_the_network_nor_random_numbers() -> None:
    network = timm.create_model("test_resnet", num_classes=0).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    check_accepts_any_size(ImageEncoder(network).backbone)
    assert torch.equal(torch.rand(3), expected)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_images_of_a_size_that_a_model_does_not_take_are_refused_in_words() -> None:
    with pytest.raises(SettingError, match=r"SwinTransformer takes images of 16x16 pixels, not of 16x24; .*strict_img"):
        ImageEncoder(swin())(images(16, 24))
    with pytest.raises(SettingError, match=r"image_size: VisionTransformer takes images of 16x16 pixels, not of 16x24"):
        ImageEncoder(small_vit())(images(16, 24))
    with pytest.raises(SettingError, match=r"backbone.in_chans: .* of 3 channels"):  # this is not about the size
        ImageEncoder(small_vit())(images(16, 16, channels=1))


def test_models_of_one_size_are_refused_where_crops_have_several() -> None:
    with pytest.raises(SettingError, match=r"SwinTransformer takes images of 16x16 pixels alone.*strict_img_size="):
        accept_any_image_size(swin())
    with pytest.raises(SettingError, match="MaxxVit takes images of 160x160 pixels alone"):
        accept_any_image_size(timm.create_model("test_coatnet", num_classes=0))
    for network in (swin(strict_img_size=False), small_vit(), timm.create_model("test_resnet", num_classes=0)):
        encoder = ImageEncoder(accept_any_image_size(network), mean_patch)
        assert encoder(images(16, 32)).embedding.shape == (2, encoder.dim)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(channels: int) -> None:
    for network in (swin(in_chans=channels), small_vit(in_chans=channels)):
        assert ImageEncoder(network)(images(16, 16, channels=channels)).embedding.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": -1}, "backbone.num_heads must be at least 1, got -1"),
        ({"depth": 0}, "backbone.depth must be at least 1"),
        ({"drop_path_rate": 1.5}, "backbone.drop_path_rate must be .* less than 1: .* with probability 1.5"),
    ],
)
def test_values_that_timm_does_not_check_are_refused(options, message):
    with pytest.raises(SettingError, match=message):
        check_image_backbone(small_vit(**{"depth": 2, **options}))
    with pytest.raises(SettingError, match=message):
        check_plain_vit(small_vit(**{"depth": 2, **options}), "MAE")


def test_images_of_another_number_of_channels_are_refused_by_their_keys():
    encoder = ImageEncoder(small_vit(in_chans=1))
    with pytest.raises(SettingError, match=r"backbone.in_chans: .* images of 1 channels, and the data have 3"):
        encoder(torch.zeros(1, 3, 16, 16))
