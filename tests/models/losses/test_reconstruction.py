import math

import pytest
import torch

from src.models.losses.reconstruction import masked_mse, normalize_patches, patchify, unpatchify


def test_patchify_lays_patches_out_in_raster_order_and_values_by_row_column_channel():
    image = torch.arange(2 * 3 * 4 * 6, dtype=torch.float64).reshape(2, 3, 4, 6)
    patches = patchify(image, 2)
    for b in range(2):
        for row in range(2):
            for column in range(3):
                expected = [
                    image[b, c, 2 * row + p, 2 * column + q] for p in range(2) for q in range(2) for c in range(3)
                ]
                assert patches[b, 3 * row + column].tolist() == [float(value) for value in expected]
    assert torch.equal(unpatchify(patches, 2, (2, 3)), image)


def test_an_image_that_is_not_a_whole_number_of_patches_is_refused():
    with pytest.raises(ValueError, match=r"image of 4x5 pixels .* patches of 2x2"):
        patchify(torch.zeros(1, 3, 4, 5), 2)


def test_patches_are_normalized_by_the_unbiased_variance_of_all_their_values():
    patches = torch.tensor([[[1.0, 2.0, 3.0, 6.0]]])
    normalized, mean, std = normalize_patches(patches)
    # by hand: mean 3, squared deviations 4 + 1 + 0 + 9 = 14, unbiased variance 14 / 3
    expected_std = math.sqrt(14 / 3 + 1e-6)
    assert mean.item() == 3.0
    assert std.item() == pytest.approx(expected_std, rel=1e-6)
    assert normalized[0, 0].tolist() == pytest.approx([(v - 3) / expected_std for v in (1, 2, 3, 6)], rel=1e-6)
    assert normalize_patches(torch.ones(1, 1, 4))[0].abs().max() == 0  # a flat patch gives zeros, not NaN


def test_normalization_and_loss_are_in_float32_for_any_input():
    patches = torch.full((1, 1, 768), 100.0, dtype=torch.bfloat16)
    patches[..., ::2] = 101.0
    assert normalize_patches(patches)[0].dtype == torch.float32
    half = torch.zeros(1, 2, 4, dtype=torch.bfloat16)
    assert masked_mse(half, half + 1, torch.tensor([[1.0, 0.0]])).dtype == torch.float32


def test_the_loss_is_the_mean_over_hidden_patches_of_the_batch():
    torch.manual_seed(0)
    prediction, target = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]], dtype=torch.float32)
    total, hidden = 0.0, 0
    for b in range(3):
        for n in range(4):
            if mask[b, n]:
                total += sum((float(prediction[b, n, d]) - float(target[b, n, d])) ** 2 for d in range(5)) / 5
                hidden += 1
    assert hidden == 8
    assert masked_mse(prediction, target, mask).item() == pytest.approx(total / hidden, rel=1e-6)
