import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from src.datamodules.decoding import EncodedImage
from src.datamodules.views.image import CenterCrop, RandomResizedCrop
from src.datamodules.views.resample import resample_boxes
from src.randomness import uniform


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (count, 3, height // 4, width // 4), dtype=np.uint8)
    return torch.from_numpy(coarse.repeat(4, axis=2).repeat(4, axis=3))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [16, 33, 96])  # shrinking, odd, enlarging
def test_resampling_a_batch_equals_pil_box_by_box(size, interpolation):
    images = pictures(3, 48, 64)
    boxes = np.array([[0, 0, 48, 64], [5, 9, 31, 22], [17.5, 30.25, 20, 28.5]])
    found = resample_boxes(images, boxes, size, interpolation=interpolation)
    resampling = Image.Resampling[interpolation.upper()]
    for image, (top, left, height, width), result in zip(images, boxes, found, strict=True):
        pil = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected = pil.resize((size, size), resampling, box=(left, top, left + width, top + height))
        difference = np.abs(result.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int))
        # PIL rounds its weights to fixed point, which may tip a rounding in either pass
        assert difference.max() <= 2
        assert difference.mean() < 0.06


def test_flipping_mirrors_the_result():
    images = pictures(2, 32, 32)
    boxes = np.array([[2, 3, 20, 25], [2, 3, 20, 25]], float)
    plain = resample_boxes(images, boxes, 16)
    flipped = resample_boxes(images, boxes, 16, flip=np.array([True, False]))
    assert torch.equal(flipped[0], plain[0].flip(-1))
    assert torch.equal(flipped[1], plain[1])


def test_boxes_have_torchvision_s_distribution():
    view = RandomResizedCrop(size=8, scale=(0.2, 1.0))
    boxes = view.boxes(60, 90, uniform(0, [0] * 20_000, range(20_000), view.num_uniforms))
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= 60).all()
    assert (boxes[:, 1] + boxes[:, 3] <= 90).all()
    torch.manual_seed(0)
    blank = torch.zeros(3, 60, 90)
    transform = v2.RandomResizedCrop(8, scale=(0.2, 1.0))
    made = [transform.make_params([blank]) for _ in range(4000)]
    reference = np.array([[each["top"], each["left"], each["height"], each["width"]] for each in made])
    for column in range(4):
        mine, theirs = boxes[:, column], reference[:, column]
        tolerance = 4 * theirs.std() * (1 / len(mine) + 1 / len(theirs)) ** 0.5
        assert abs(mine.mean() - theirs.mean()) < tolerance
        assert mine.std() == pytest.approx(theirs.std(), rel=0.06)


def test_a_narrow_image_falls_back_to_its_center():
    view = RandomResizedCrop(size=8, scale=(0.9, 1.0))
    assert view.boxes(10, 100, uniform(0, [0], [0], view.num_uniforms)).tolist() == [[0, 43, 10, 13]]


def test_flips_happen_with_their_probability_and_follow_the_numbers():
    view = RandomResizedCrop(size=8, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.25)
    images = pictures(400, 8, 8)
    numbers = uniform(0, [0] * 400, range(400), view.num_uniforms)
    made = view.from_decoded(images, numbers)["image"]
    mirrored = torch.tensor(
        [torch.equal(a, b.flip(-1)) and not torch.equal(a, b) for a, b in zip(made, images, strict=True)]
    )
    assert torch.equal(mirrored, torch.from_numpy(numbers[:, -1] < 0.25))
    assert abs(int(mirrored.sum()) - 100) < 35  # four standard deviations


def test_a_single_image_gets_the_view_it_gets_in_a_batch():
    view = RandomResizedCrop(size=16)
    images = pictures(4, 32, 32)
    numbers = uniform(0, [3] * 4, range(4), view.num_uniforms)
    together = view.from_decoded(images, numbers)["image"]
    assert torch.equal(view.from_decoded(images[2:3], numbers[2:3])["image"][0], together[2])


def test_the_center_crop_is_the_resized_center():
    images = pictures(1, 64, 96)
    found = CenterCrop(size=28, share=0.875).from_decoded(images, np.zeros((1, 0)))["image"][0]
    pil = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    expected = np.asarray(pil.resize((28, 28), Image.Resampling.BICUBIC, box=(20, 4, 76, 60)))
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected.astype(int)).max() <= 1
    untouched = CenterCrop(size=64, share=1.0).from_decoded(pictures(1, 64, 64), np.zeros((1, 0)))["image"]
    assert torch.equal(untouched, pictures(1, 64, 64))


def test_the_crop_s_interpolation_reaches_files_and_decoded_images_alike():
    """Two gray levels side by side, enlarged: a triangle stays between them, a cubic kernel overshoots."""
    pixels = np.full((8, 8, 3), 60, np.uint8)
    pixels[:, 4:] = 180
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    numbers = np.full((1, RandomResizedCrop.num_uniforms), 0.5)
    for interpolation, low, high in (("bilinear", 60, 180), ("bicubic", 51, 189)):
        view = RandomResizedCrop(32, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, interpolation=interpolation)
        made = [
            view.from_decoded(images, numbers)["image"][0],
            view.from_encoded(EncodedImage(file.getvalue()), numbers[0])["image"],
            view.from_pil(Image.fromarray(pixels), numbers[0]),
        ]
        for image in made:
            assert (int(image.min()), int(image.max())) == (low, high)


def test_a_scale_outside_of_0_to_1_and_an_unknown_interpolation_are_refused():
    with pytest.raises(ValueError, match="scale"):
        RandomResizedCrop(size=8, scale=(0.5, 1.5))
    with pytest.raises(ValueError, match="interpolation must be bilinear or bicubic, got 'nearest'"):
        RandomResizedCrop(size=8, interpolation="nearest")
