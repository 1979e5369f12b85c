import math

import pytest
import timm
import torch

from src.models.backbones.positions import accept_any_image_size, sincos_2d


def test_the_table_channel_by_channel():
    table = sincos_2d(16, (3, 5), prefix_tokens=1)
    assert table.shape == (16, 16)
    assert table[0].abs().max() == 0
    for row in range(3):
        for column in range(5):
            expected = []
            for coordinate in (column, row):  # columns first
                frequencies = [10000 ** (-k / 4) for k in range(4)]
                expected += [math.sin(coordinate * f) for f in frequencies]
                expected += [math.cos(coordinate * f) for f in frequencies]
            assert table[1 + row * 5 + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_width_that_is_not_a_multiple_of_four_is_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d(18, (2, 2))


def test_a_view_of_parts_of_patches_is_refused_by_its_keys():
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1}
    vit = accept_any_image_size(timm.create_model("vit_tiny_patch16_224", **small))
    assert vit.forward_features(torch.zeros(1, 3, 16, 24)).shape == (1, 1 + 2 * 3, 16)
    with pytest.raises(
        ValueError, match=r"local_image_size: a view of 16x20 pixels is not a whole number of patches of 8x8"
    ):
        vit.forward_features(torch.zeros(1, 3, 16, 20))
