import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from src.datamodules.views.color import (
    Color,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    gaussian_blur,
    luma,
    solarize,
)
from src.randomness import uniform


def pictures(count: int = 5, size: int = 12) -> Tensor:
    """Random pixels; the first image has grays, black, white, and colors with two equal largest channels."""
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    images[0, :, 0] = 0.3
    images[0, :, 1] = 0.0
    images[0, :, 2] = 1.0
    images[0, 0, 3], images[0, 1, 3] = 0.9, 0.9
    images[0, 1, 4], images[0, 2, 4] = 0.1, 0.1
    return images


def eight_bit(count: int, size: int = 16) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def numbers(count: int, draws: int = Color.num_uniforms, seed: int = 0) -> np.ndarray:
    return uniform(seed, [0] * count, range(count), draws)


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (adjust_brightness, tv.adjust_brightness, [0.2, 0.9, 1.0, 1.5, 1.8]),
        (adjust_contrast, tv.adjust_contrast, [0.0, 0.4, 1.0, 1.6, 1.8]),
        (adjust_saturation, tv.adjust_saturation, [0.0, 0.4, 1.0, 1.6, 1.8]),
        (adjust_hue, tv.adjust_hue, [0.5, -0.2, 0.0, 0.1, -0.5]),
    ],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_each_image_changes_as_in_torchvision_with_its_factor(ours, theirs, factors):
    images = pictures()
    result = ours(images, torch.tensor(factors))
    for image, factor, changed in zip(images, factors, result, strict=True):
        assert torch.allclose(changed, theirs(image, factor), atol=2e-6)


def test_grayscale_and_solarization_equal_torchvision():
    images = pictures()
    assert torch.allclose(luma(images), tv.rgb_to_grayscale(images), atol=1e-6)
    assert torch.equal(solarize(images), tv.solarize(images, 0.5))


@pytest.mark.parametrize(("size", "kernel"), [(24, 3), (64, 7), (96, 9)])
def test_the_blur_equals_torchvision_with_a_kernel_of_a_tenth_of_the_side(size, kernel):
    images, sigma = pictures(3, size), [0.1, 0.8, 2.0]
    result = gaussian_blur(images, torch.tensor(sigma))
    for image, width, blurred in zip(images, sigma, result, strict=True):
        assert torch.allclose(blurred, tv.gaussian_blur(image, [kernel, kernel], [width, width]), atol=2e-6)


def test_color_applies_torchvision_s_functions_in_the_drawn_order_with_the_drawn_factors():
    recipe = Color(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grey=0.2, blur=0.5, solarize=0.3)
    count = 40
    images, rows = eight_bit(count), numbers(count)
    result = recipe(images, rows)
    seen = set()
    for image, row, changed in zip(images, rows, result, strict=True):
        x = image.float() / 255
        factors = [0.2 + 1.6 * row[4], 0.2 + 1.6 * row[5], 0.2 + 1.6 * row[6], -0.2 + 0.4 * row[7]]
        changes = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
        order = np.argsort(row[8:12])
        if row[0] < 0.8:
            seen.add(tuple(order.tolist()))
            for operation in order:
                x = changes[operation](x, float(factors[operation]))
        if row[1] < 0.2:
            x = tv.rgb_to_grayscale(x, 3)
        if row[2] < 0.5:
            x = tv.gaussian_blur(x, [3, 3], [0.1 + 1.9 * float(row[12])] * 2)
        if row[3] < 0.3:
            x = tv.solarize(x, 0.5)
        # solarization turns a rounding at its threshold into nearly nothing, since 1 - 0.5 = 0.5
        assert (changed.float() - 255 * x).abs().max() <= 0.51
    assert len(seen) > 10  # of 24 orders


def test_negative_factors_are_clamped_as_in_torchvision():
    strong = Color(brightness=2.0, jitter=1.0)
    rows = numbers(2)
    rows[0, 4], rows[1, 4] = 0.0, 0.5
    image = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    assert strong(image, rows)[:, 0, 0, 0].tolist() == [0, 150]  # factors from [0, 3]


def test_zero_strength_or_probability_changes_nothing():
    images, rows = eight_bit(6), numbers(6)
    assert torch.equal(Color()(images, rows), images)
    assert torch.equal(Color(brightness=0.8, hue=0.2, jitter=0.0)(images, rows), images)


def test_colors_do_not_depend_on_the_rest_of_the_batch():
    recipe = Color(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grey=0.2, blur=0.5, solarize=0.2)
    images, rows = eight_bit(30, 64), numbers(30)
    whole = recipe(images, rows)
    for index in (0, 7, 16, 29):
        alone = recipe(images[index : index + 1], rows[index : index + 1])[0]
        assert (alone.int() - whole[index].int()).abs().max() <= 1


def test_changes_are_independent_and_have_their_probability():
    count = 2000
    images = torch.tensor([200, 40, 90], dtype=torch.uint8).view(1, 3, 1, 1).expand(count, 3, 24, 24).contiguous()
    rows = numbers(count)
    grey = (Color(grey=0.2)(images, rows).amax(dim=1) == Color(grey=0.2)(images, rows).amin(dim=1)).flatten(1).all(1)
    inverted = Color(solarize=0.4)(images, rows)[:, 0, 0, 0] == 55
    jittered = Color(brightness=0.5, jitter=0.8)(images, rows)[:, 0, 0, 0] != 200
    for share, p in ((grey, 0.2), (inverted, 0.4), (jittered, 0.8), (grey & inverted, 0.08), (grey & jittered, 0.16)):
        assert abs(share.float().mean().item() - p) < 4 * (p * (1 - p) / count) ** 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blur": 1.5}, "blur is a probability, got 1.5"),
        ({"hue": 0.6}, r"hue=0.6 within \[0, 0.5\]"),
        ({"brightness": -1}, "brightness=-1"),
        ({"sigma": (0.0, 2.0)}, "sigma must be 0 < low"),
    ],
)
def test_invalid_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Color(**settings)
