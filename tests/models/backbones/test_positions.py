import copy
import math

import pytest
import timm
import torch

from src.models.backbones.positions import accept_any_image_size, dino_positions, interpolated_positions, sincos_2d


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


def test_rows_first_swaps_what_the_halves_encode():
    table, swapped = (sincos_2d(8, (2, 3), rows_first=rows_first) for rows_first in (False, True))
    assert torch.equal(swapped, table.roll(4, dims=1))
    assert (swapped[:3, 0] == 0).all()  # sines of the first row
    torch.testing.assert_close(swapped[3:, 0], torch.full((3,), math.sin(1.0)))


# made with facebookresearch/dino, vision_transformer.py (interpolate_pos_encoding), commit 7c446df: the table
# sin(5.1 + 0.7 i), i = 0 … 15, of 4 x 4 patches, for images of 2 x 3 and (the first six) of 5 x 4 patches
DINO_SMALLER = [0.11151581226364043, 0.2343549772705538, 0.15484137673677165]
DINO_SMALLER += [-0.5624953202612131, -0.3239591832499417, 0.19103077345946962]
DINO_LARGER = [-1.0542593935734437, -0.5756515164604268, 0.15879755419119493]
DINO_LARGER += [0.8380212838809264, 0.6312286798343477, 0.5640573423969862]


def test_dino_s_positions_are_the_authors():
    table = torch.sin(5.1 + 0.7 * torch.arange(16, dtype=torch.float64)).reshape(1, 16, 1)
    assert dino_positions(table, (4, 4), (2, 3)).flatten().tolist() == pytest.approx(DINO_SMALLER, rel=1e-12)
    assert dino_positions(table, (4, 4), (5, 4)).flatten().tolist()[:6] == pytest.approx(DINO_LARGER, rel=1e-12)
    assert dino_positions(table, (4, 4), (4, 4)) is table
    assert not torch.allclose(dino_positions(table, (4, 4), (2, 8)), table)  # as many patches, another shape


@pytest.mark.parametrize("interpolation", [dino_positions, interpolated_positions])
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"reg_tokens": 2, "no_embed_class": True}])
def test_a_vit_with_another_interpolation_differs_in_positions_alone(options, interpolation):
    """At its own size it is timm's; at another one it is timm's with the authors' table in the place of its own."""
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1, "num_classes": 0, **options}
    vit = timm.create_model("vit_tiny_patch16_224", **small)
    vit = accept_any_image_size(vit, interpolation=interpolation).double()
    plain = timm.create_model("vit_tiny_patch16_224", **small).double()
    plain.load_state_dict(vit.state_dict())
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(vit.forward_features(x), plain.forward_features(x), rtol=1e-12, atol=1e-12)
    crop = timm.create_model("vit_tiny_patch16_224", **{**small, "img_size": (16, 24)}).double()
    own = 0 if options.get("no_embed_class") else 1 + options.get("reg_tokens", 0)
    patches = interpolation(vit.pos_embed[:, own:], (4, 4), (2, 3))
    crop.load_state_dict({**vit.state_dict(), "pos_embed": torch.cat([vit.pos_embed[:, :own], patches], dim=1)})
    copied = copy.deepcopy(vit)  # as a teacher is
    torch.nn.init.zeros_(vit.pos_embed)
    x = torch.randn(1, 3, 16, 24, dtype=torch.float64)
    torch.testing.assert_close(copied.forward_features(x), crop.forward_features(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(vit.forward_features(x), copied.forward_features(x))


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
