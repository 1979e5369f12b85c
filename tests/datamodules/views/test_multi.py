import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from src.datamodules.batches.base import BatchError, validate
from src.datamodules.batches.image import MultiViewBatch
from src.datamodules.datamodule import DataModule
from src.datamodules.decoding import EncodedImage
from src.datamodules.sources.source import Source
from src.datamodules.views.color import Color
from src.datamodules.views.image import CenterCrop, RandomResizedCrop
from src.datamodules.views.multi import Augmented, MultiView
from src.randomness import uniform

STRONG = Color(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grey=0.2, blur=0.5)
PLAIN = Color()
MIXED = MultiView(
    {"first": Augmented(RandomResizedCrop(24), STRONG), "second": Augmented(RandomResizedCrop(24), PLAIN)},
    {"small": Augmented(RandomResizedCrop(12, scale=(0.05, 0.4)), STRONG, count=3)},
)


def pictures(count: int, size: int = 40) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def draws(view, epoch: int, indices: list[int], seed: int = 0) -> np.ndarray:
    return uniform(seed, [epoch] * len(indices), indices, view.num_uniforms)


def test_views_of_one_size_share_a_tensor_and_equal_their_kind_alone():
    rows = draws(MIXED, 0, [0, 1, 2, 3])
    batch = MIXED.from_decoded(pictures(4), rows)
    assert batch["views"].shape == (4, 2, 3, 24, 24)
    assert batch["local_views"].shape == (4, 3, 3, 12, 12)
    kinds = [*MIXED.views.values(), *[MIXED.local_views["small"]] * 3]
    views = [*batch["views"].unbind(1), *batch["local_views"].unbind(1)]
    for place, (kind, view) in enumerate(zip(kinds, views, strict=True)):
        own = rows[:, place * Augmented.num_uniforms : (place + 1) * Augmented.num_uniforms]
        assert torch.equal(view, kind.from_decoded(pictures(4), own)["image"])


def test_views_of_one_kind_are_independent():
    """Flips agree half the time, and box positions are uncorrelated."""
    view = MultiView({"both": Augmented(RandomResizedCrop(8, scale=(0.2, 0.5)), PLAIN, count=2)})
    ramp = torch.arange(40, dtype=torch.uint8).mul(6).expand(600, 3, 40, 40).contiguous()  # brighter to the right
    both = view.from_decoded(ramp, draws(view, 0, list(range(600))))["views"].float()
    flipped = both[:, :, 0, 0, 0] > both[:, :, 0, 0, -1]
    agree = (flipped[:, 0] == flipped[:, 1]).float().mean().item()
    assert abs(agree - 0.5) < 4 * (0.25 / 600) ** 0.5
    middle = both.mean(dim=(2, 3, 4))
    correlation = torch.corrcoef(middle.T)[0, 1].item()
    assert middle.std(dim=0).min() > 10  # the boxes do move
    assert abs(correlation) < 4 / 600**0.5


def test_a_sample_s_views_depend_on_seed_epoch_and_index_alone():
    images = pictures(6)
    whole = MIXED.from_decoded(images, draws(MIXED, 3, [0, 1, 2, 3, 4, 5]))
    torch.manual_seed(1), np.random.seed(1)
    copied = pickle.loads(pickle.dumps(MIXED))
    part = copied.from_decoded(images[[4, 1]], draws(MIXED, 3, [4, 1]))
    for name in ("views", "local_views"):
        assert (part[name].int() - whole[name][[4, 1]].int()).abs().max() <= 1
    later = MIXED.from_decoded(images, draws(MIXED, 4, [0, 1, 2, 3, 4, 5]))["views"]
    reseeded = MIXED.from_decoded(images, draws(MIXED, 3, [0, 1, 2, 3, 4, 5], seed=1))["views"]
    for other in (later, reseeded):
        assert all(not torch.equal(a, b) for a, b in zip(whole["views"][:, 0], other[:, 0], strict=True))


def test_a_file_and_its_pixels_give_the_same_views_up_to_rounding():
    pixels = np.random.default_rng(1).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    mild = Color(brightness=0.4, grey=0.2, blur=0.5)
    view = MultiView(
        {"both": Augmented(RandomResizedCrop(24), mild, count=2)},
        {"small": Augmented(RandomResizedCrop(12), mild, count=2)},
    )
    row = draws(view, 0, [2])
    encoded = view.from_encoded(EncodedImage(buffer.getvalue()), row[0])
    decoded = view.from_decoded(torch.from_numpy(pixels).permute(2, 0, 1)[None], row)
    for name in ("views", "local_views"):
        # PIL keeps 8 bits between its passes, and brightness multiplies the difference by at most 1.4
        assert (encoded[name].int() - decoded[name][0].int()).abs().max() <= 3
    alone = view.views["both"].from_encoded(EncodedImage(buffer.getvalue()), row[0, : Augmented.num_uniforms])["image"]
    assert (alone.int() - encoded["views"][0].int()).abs().max() <= 3


def test_views_reach_the_method_normalized_with_label_and_index():
    class Eight(Source):
        classes = ("a",)
        images = pictures(8).numpy()
        labels = np.arange(8)

        def __len__(self):
            return 8

        def __getitem__(self, index):
            raise AssertionError("images are in memory")

        def name(self, index):
            return str(index)

    data = DataModule(
        source=lambda split: Eight(),
        train_view=MIXED,
        eval_view=CenterCrop(24),
        batch_size=4,
        num_workers=0,
    )
    raw = next(iter(data.train_dataloader()))
    shown = raw["views"].clone()
    batch = data.on_after_batch_transfer(raw, 0)
    validate(batch, MultiViewBatch)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (shown[1, 1, :, 2, 3].float() / 255 - mean) / std
    assert torch.allclose(batch["views"][1, 1, :, 2, 3], expected, atol=1e-6)
    assert torch.equal(batch["label"], batch["index"])
    assert data.batch_type is MultiViewBatch


def whole_batch() -> dict[str, torch.Tensor]:
    return {
        "views": torch.zeros(3, 2, 3, 8, 8),
        "label": torch.zeros(3, dtype=torch.int64),
        "index": torch.zeros(3, dtype=torch.int64),
        "replaced": torch.zeros(3, dtype=torch.bool),
    }


def test_local_views_are_optional_but_checked():
    batch = whole_batch()
    validate(batch, MultiViewBatch)
    validate({**batch, "local_views": torch.zeros(3, 6, 3, 4, 4)}, MultiViewBatch)
    with pytest.raises(BatchError, match=r"batch\['local_views'\] has B = 2 where 3 is expected"):
        validate({**batch, "local_views": torch.zeros(2, 6, 3, 4, 4)}, MultiViewBatch)
    with pytest.raises(BatchError, match=r"batch\['views'\] must have the axes \[B, V, C, H, W\]"):
        validate({**batch, "views": torch.zeros(3, 3, 8, 8)}, MultiViewBatch)
    with pytest.raises(BatchError, match="needs the field 'views'"):
        validate({name: value for name, value in batch.items() if name != "views"}, MultiViewBatch)


def test_a_view_with_nan_is_named():
    batch = whole_batch()
    batch["views"][1, 0, 2, 3, 4] = float("nan")
    with pytest.raises(BatchError, match=r"batch\['views'\] holds NaN"):
        validate(batch, MultiViewBatch)


def test_groups_of_several_sizes_or_without_views_are_refused():
    with pytest.raises(ValueError, match=r"views must be views of one size, got 24x24, 32x32"):
        MultiView({"a": Augmented(RandomResizedCrop(24)), "b": Augmented(RandomResizedCrop(32))})
    with pytest.raises(ValueError, match="local_views must be views of one size, got none"):
        MultiView({"a": Augmented(RandomResizedCrop(24))}, {})
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        Augmented(RandomResizedCrop(24), count=0)


def coordinates(height: int, width: int) -> torch.Tensor:
    """An image whose red channel is the column and whose green channel is the row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows, torch.zeros_like(rows)]).to(torch.uint8)


def recording(flip: float = 0.5) -> MultiView:
    return MultiView(
        {"both": Augmented(RandomResizedCrop(8, scale=(0.1, 0.9), flip=flip), count=2)},
        {"small": Augmented(RandomResizedCrop(4, scale=(0.05, 0.2), flip=flip), count=3)},
        record_crops=True,
    )


def test_recorded_crops_at_hand_worked_numbers():
    """Half the area of 20 x 20 at ratio 1 is a square of 14; the numbers 0.5 and 0 put it at x = 3, y = 0."""
    view = MultiView({"one": Augmented(RandomResizedCrop(14, scale=(0.4, 0.6), ratio=(1.0, 1.0)))}, record_crops=True)
    row = np.zeros(view.num_uniforms, np.float32)
    row[[0, 3]] = 0.5  # area and place from the left
    row[RandomResizedCrop.num_uniforms - 1] = 0.7
    made = view.from_decoded(coordinates(20, 20)[None], row[None])
    assert made["boxes"].tolist() == [[[3.0, 0.0, 17.0, 14.0]]]
    assert made["flipped"].tolist() == [[False]]
    assert torch.equal(made["views"][0, 0], coordinates(20, 20)[:, :14, 3:17])
    row[RandomResizedCrop.num_uniforms - 1] = 0.2
    mirrored = view.from_decoded(coordinates(20, 20)[None], row[None])
    assert mirrored["flipped"].tolist() == [[True]]
    assert mirrored["boxes"].tolist() == [[[3.0, 0.0, 17.0, 14.0]]]  # a mirror does not move the box
    assert torch.equal(mirrored["views"][0, 0], coordinates(20, 20)[:, :14, 3:17].flip(-1))


@pytest.mark.parametrize("kind", ["decoded", "encoded"])
def test_recorded_boxes_and_flips_match_the_pixels(kind):
    """The means of a crop's columns and rows are the center of its box, and mirrored columns decrease."""
    view, image = recording(), coordinates(48, 72)
    if kind == "decoded":
        rows = draws(view, 0, list(range(40)))
        batch = view.from_decoded(image.expand(40, -1, -1, -1).contiguous(), rows)
    else:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
        made = [view.from_encoded(EncodedImage(buffer.getvalue()), row) for row in draws(view, 0, list(range(40)))]
        batch = view.collate(made)
    for prefix, count in (("", 2), ("local_", 3)):
        views, boxes, flipped = (batch[f"{prefix}{name}"] for name in ("views", "boxes", "flipped"))
        assert boxes.shape == (40, count, 4)
        assert flipped.shape == (40, count)
        assert 0.2 < flipped.float().mean() < 0.8
        pixels = views.float().mean(dim=(3, 4))
        center = (boxes[..., :2] + boxes[..., 2:] - 1) / 2
        assert (pixels[..., :2] - center).abs().max() < 0.75
        falls = views[:, :, 0, :, 0].float().mean(dim=2) > views[:, :, 0, :, -1].float().mean(dim=2)
        assert torch.equal(falls, flipped)
        assert (boxes[..., :2] >= 0).all()
        assert (boxes[..., 2:] <= torch.tensor([72.0, 48.0])).all()


class Wide(Source):
    """Images of two sizes, read one at a time; without labels."""

    def __init__(self, split="train"):
        self.split = split

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"image": coordinates(20 + index % 2, 30)}

    def name(self, index):
        return str(index)


def test_recording_crops_changes_no_pixel_and_boxes_do_not_depend_on_workers():
    def batches(view, workers):
        data = DataModule(
            source=Wide, train_view=view, eval_view=CenterCrop(8), batch_size=4, seed=2, num_workers=workers
        )
        return data, list(data.train_dataloader())

    data, alone = batches(recording(), 0)
    _, shared = batches(recording(), 2)
    plain = MultiView(recording().views, recording().local_views)
    _, without = batches(plain, 0)
    for one, two, three in zip(alone, shared, without, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert not {"boxes", "flipped", "local_boxes", "local_flipped", "label"} & three.keys()
        assert all(torch.equal(one[name], three[name]) for name in three)
        batch = data.on_after_batch_transfer(one, 0)
        validate(batch, MultiViewBatch)
        half = {name: batch[name].half() for name in ("views", "local_views")}
        validate({**batch, **half}, MultiViewBatch, torch.float16)  # boxes stay exact
        with pytest.raises(BatchError, match=r"batch\['boxes'\] has V = 1 where 2 is expected"):
            validate({**batch, "boxes": batch["boxes"][:, :1]}, MultiViewBatch)
