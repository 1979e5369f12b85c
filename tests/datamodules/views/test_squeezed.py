"""Squeezed views keep the whole image, and change its proportions."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from src.datamodules.decoding import EncodedImage
from src.datamodules.views.image import CenterCrop
from src.datamodules.views.squeezed import SqueezedCenterCrop, SqueezedCrop, SqueezedRandAugmentCrop

NONE = np.zeros((1, 0), np.float32)


def stripes() -> torch.Tensor:
    """An image of 8 x 24 pixels in six vertical stripes of four pixels, grey 0, 40, … 200: uint8 [1, 3, 8, 24]."""
    grey = (torch.arange(24) // 4 * 40).to(torch.uint8)
    return grey.expand(1, 3, 8, 24).contiguous()


def encoded(images: torch.Tensor) -> EncodedImage:
    file = io.BytesIO()
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(file, "PNG")
    return EncodedImage(file.getvalue())


def test_the_whole_image_is_squeezed_to_a_square():
    """Stripes of four of 24 columns become two of twelve; a center crop would keep the two in the middle."""
    view = SqueezedCenterCrop(size=12)
    image = view.from_decoded(stripes(), NONE)["image"]
    assert image.shape == (1, 3, 12, 12)
    expected = torch.arange(6).repeat_interleave(2) * 40.0
    assert (image[0, 0, 5].float() - expected).abs().max() <= 4  # bicubic overshoots at edges
    assert torch.equal(image[0], view.from_encoded(encoded(stripes()), NONE[0])["image"])
    assert len(CenterCrop(size=8, share=1.0).from_decoded(stripes(), NONE)["image"][0, 0, 4].unique()) == 2


def test_a_share_crops_the_same_share_of_both_sides():
    """Half of each side: the rows 2 to 6 and the columns 6 to 18, half of a stripe, two whole ones, and a half."""
    view = SqueezedCenterCrop(size=12, share=0.5)
    assert view._box(8, 24) == (2, 6, 4, 12)
    row = view.from_decoded(stripes(), NONE)["image"][0, 0, 6].float()
    assert torch.equal(row.round(), torch.tensor([40.0] * 2 + [80.0] * 4 + [120.0] * 4 + [160.0] * 2))


def test_random_crops_are_taken_of_the_square():
    """ALIGN's 289 out of 346: the box has 289/346 of each side, anywhere."""
    share = 289 / 346
    view = SqueezedCrop(size=12, scale=(share**2, share**2))
    uniform = np.random.default_rng(0).random((200, view.num_uniforms)).astype(np.float32)
    top, left, rows, columns = view.boxes(800, 2400, uniform).T
    assert rows == pytest.approx(800 * share, abs=0.4)
    assert columns == pytest.approx(2400 * share, abs=0.6)
    assert (top.min(), left.min()) == pytest.approx((0, 0), abs=12)
    assert ((top + rows).max(), (left + columns).max()) == pytest.approx((800, 2400), abs=12)
    whole = SqueezedCrop(size=12).boxes(800, 2400, uniform)
    assert (whole == [0, 0, 800, 2400]).all()


def test_rand_augment_of_the_whole_image():
    uniform = np.random.default_rng(0).random((1, SqueezedRandAugmentCrop.num_uniforms)).astype(np.float32)
    plain = SqueezedRandAugmentCrop(size=12, policy=None, flip=0.0).from_decoded(stripes(), uniform)["image"]
    assert torch.equal(plain, SqueezedCenterCrop(size=12).from_decoded(stripes(), NONE)["image"])
    mirrored = SqueezedRandAugmentCrop(size=12, policy=None, flip=1.0).from_decoded(stripes(), uniform)["image"]
    assert torch.equal(mirrored, plain.flip(-1))
    strong = SqueezedRandAugmentCrop(size=12, policy="rand-m10-n2-p1.0").from_decoded(stripes(), uniform)["image"]
    assert not torch.equal(strong, plain)
