import io
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from src.datamodules.decoding import EncodedImage
from src.datamodules.views.augment import RandAugmentCrop, _at_least_one_bit
from src.datamodules.views.image import RandomResizedCrop
from src.randomness import uniform


def pictures(count: int, size: int = 40) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def draws(view, epoch: int, indices: list[int], seed: int = 0) -> np.ndarray:
    return uniform(seed, [epoch] * len(indices), indices, view.num_uniforms)


def test_a_view_depends_on_epoch_and_index_alone():
    view, images = RandAugmentCrop(24), pictures(6)
    whole = view.from_decoded(images, draws(view, 3, [0, 1, 2, 3, 4, 5]))["image"]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # what is around does not matter
    part = view.from_decoded(images[[4, 1]], draws(view, 3, [4, 1]))["image"]
    assert torch.equal(part, whole[[4, 1]])
    other_epoch = view.from_decoded(images, draws(view, 4, [0, 1, 2, 3, 4, 5]))["image"]
    assert all(not torch.equal(a, b) for a, b in zip(whole, other_epoch, strict=True))


def test_equal_images_at_different_indices_get_different_views():
    view = RandAugmentCrop(24)
    same = pictures(1).repeat(8, 1, 1, 1)
    result = view.from_decoded(same, draws(view, 0, list(range(8))))["image"]
    assert len({picture.numpy().tobytes() for picture in result}) == 8


def test_global_generators_are_unchanged():
    view = RandAugmentCrop(24)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    view.from_decoded(pictures(4), draws(view, 0, [0, 1, 2, 3]))
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_a_file_and_its_pixels_give_the_same_view_up_to_rounding():
    pixels = np.random.default_rng(1).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    view = RandAugmentCrop(24, policy=None, erase=0.0)
    row = draws(view, 0, [2])
    encoded = view.from_encoded(EncodedImage(buffer.getvalue()), row[0])["image"]
    decoded = view.from_decoded(torch.from_numpy(pixels).permute(2, 0, 1)[None], row)["image"][0]
    assert encoded.dtype == torch.uint8
    assert (encoded.int() - decoded.int()).abs().max() <= 1


def test_without_policy_and_erasing_the_view_is_a_random_crop():
    strong, plain = RandAugmentCrop(24, policy=None, erase=0.0), RandomResizedCrop(24, scale=(0.08, 1.0))
    numbers = draws(strong, 0, [0, 1, 2])
    expected = plain.from_decoded(pictures(3), numbers[:, : plain.num_uniforms])["image"]
    assert torch.equal(strong.from_decoded(pictures(3), numbers)["image"], expected)


def test_erasing_changes_one_rectangle_to_noise_and_no_other_pixel():
    plain, erasing = RandAugmentCrop(32, policy=None, erase=0.0), RandAugmentCrop(32, policy=None, erase=1.0)
    grey = torch.full((40, 3, 40, 40), 120, dtype=torch.uint8)
    numbers = draws(erasing, 0, list(range(40)))
    changed = (erasing.from_decoded(grey, numbers)["image"] != plain.from_decoded(grey, numbers)["image"]).any(dim=1)
    noise = []
    for index, where in enumerate(changed):
        rows, columns = where.any(dim=1).nonzero().flatten(), where.any(dim=0).nonzero().flatten()
        area = len(rows) * len(columns)
        assert len(rows) == rows[-1] - rows[0] + 1
        assert where.sum() >= 0.9 * area  # noise may hit the old value
        assert 0.01 <= area / 32**2 <= 0.4
        noise.append(erasing.from_decoded(grey, numbers)["image"][index][:, where] if index < 8 else torch.zeros(3, 0))
    values = torch.cat(noise, dim=1).float() / 255
    # standard normal after normalization: the mean color, one standard deviation wide, cut at black and white
    torch.testing.assert_close(values.mean(dim=1), torch.tensor([0.485, 0.456, 0.406]), atol=0.03, rtol=0)
    torch.testing.assert_close(values.std(dim=1), torch.tensor([0.22, 0.215, 0.21]), atol=0.025, rtol=0)


def test_the_share_of_erased_images_is_the_probability():
    view = RandAugmentCrop(16, policy=None, erase=0.25)
    grey = torch.full((400, 3, 16, 16), 120, dtype=torch.uint8)
    result = view.from_decoded(grey, draws(view, 0, list(range(400))))["image"]
    share = (result != 120).flatten(1).any(dim=1).float().mean().item()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


def test_strongest_posterization_keeps_a_bit():
    class Operation:
        def __call__(self, level, settings):
            return (4 - int(level / 10 * 4),)

    assert [_at_least_one_bit(Operation(), level, {})[0] for level in (0, 5, 9.9, 10)] == [4, 2, 1, 1]
    view = RandAugmentCrop(16, policy="rand-m10-mstd0-inc1", erase=0.0)
    view.from_decoded(pictures(64, 16), draws(view, 0, list(range(64))))  # level 10 throughout: 0 bits would be refused


def test_autoaugment_follows_the_sample_s_numbers_and_mirrors():
    view = RandAugmentCrop(16, scale=(1.0, 1.0), policy="original", erase=0.0, flip=0.0)
    given, numbers = pictures(32, 16), draws(view, 0, list(range(32)))
    found = view.from_decoded(given, numbers)["image"]
    assert torch.equal(found, view.from_decoded(given, numbers)["image"])
    one = view.from_decoded(given[3:4], numbers[3:4])["image"]
    assert torch.equal(found[3:4], one)
    plain = RandAugmentCrop(16, scale=(1.0, 1.0), policy=None, erase=0.0, flip=0.0).from_decoded(given, numbers)[
        "image"
    ]
    assert 8 < sum(not torch.equal(*pair) for pair in zip(found, plain, strict=True)) < 32
    mirrored = RandAugmentCrop(16, scale=(1.0, 1.0), policy=None, erase=0.0, flip=1.0).from_decoded(given, numbers)[
        "image"
    ]
    assert torch.equal(mirrored, plain.flip(-1))


def test_a_worker_process_gets_the_same_view():
    view = RandAugmentCrop(24)
    numbers = draws(view, 1, [0, 1])
    copied = pickle.loads(pickle.dumps(view))
    assert torch.equal(
        copied.from_decoded(pictures(2), numbers)["image"], view.from_decoded(pictures(2), numbers)["image"]
    )


def test_invalid_settings_are_refused():
    with pytest.raises(ValueError, match=r"erase is a probability, got 1.5"):
        RandAugmentCrop(24, erase=1.5)
    with pytest.raises(ValueError, match=r"timm's 'rand-…', got 'strong'"):
        RandAugmentCrop(24, policy="strong")
