"""Labels wander as the equations say, and the protocol judges the frames that DAVIS does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.datamodules.datamodule import DataModule
from src.datamodules.scenes import render
from src.datamodules.scenes.films import FilmReader, FilmsSource
from src.datamodules.sources.source import Sample, Source, Split
from src.datamodules.views.video import CenterVideoCrop, DenseClip
from src.errors import SettingError
from src.evaluation.features import BadFeatures
from src.evaluation.label_propagation import LabelPropagation, neighborhood
from src.models.backbones.encoder import Features
from tests.evaluation.toy import Squares, random_rows, squares, subject

CPU = torch.device("cpu")


class Walkers(Source):
    """Films of 16 x 16 with a red square and a green one of 4 x 4, which walk 4 pixels a frame past each other."""

    classes = ("walks",)

    def __init__(self, split: Split, *, frames: int = 4, count: int = 2, shown: bool = True) -> None:
        self.frames, self.count, self.shown = frames, count, shown

    def __len__(self) -> int:
        return self.count

    def masks(self, index: int) -> Tensor:
        masks = torch.zeros(self.frames, 2, 16, 16, dtype=torch.bool)
        for frame in range(self.frames if self.shown else 0):
            masks[frame, 0, 4:8, 4 * frame : 4 * frame + 4] = True
            masks[frame, 1, 8:12, 12 - 4 * frame : 16 - 4 * frame] = True
        return masks

    def __getitem__(self, index: int) -> Sample:
        pictures = torch.zeros(self.frames, 3, 16, 16, dtype=torch.uint8)
        pictures[:, 2] = 90
        for thing, color in enumerate(((250, 20, 0), (20, 250, 0))):
            where = self.masks(index)[:, thing]
            for channel, value in enumerate(color):
                pictures[:, channel][where] = value
        return {"image": FilmReader(pictures.numpy().__getitem__, self.frames, 5.0, self.flows), "label": 0}

    def flows(self, numbers: Sequence[int]) -> np.ndarray:
        raise AssertionError("labels are carried on by what patches look like")

    def name(self, index: int) -> str:
        return f"walkers {index}"


class Patches(nn.Module):
    """Mean color of each 4 x 4 patch, or what says nothing of it."""

    def __init__(self, blind: bool = False) -> None:
        super().__init__()
        self.blind = blind

    def forward(self, image: Tensor) -> Features:
        frames = image.shape[1:-3]
        patches = F.avg_pool2d(image.flatten(0, -4), 4).flatten(2).transpose(1, 2).reshape(len(image), -1, 3)
        if self.blind:
            patches = torch.ones_like(patches)
        return Features(patches.mean(dim=1), patches, (*frames, image.shape[-2] // 4, image.shape[-1] // 4))


def judged(encoder: nn.Module, datamodule: Any = None, **options: Any) -> dict[str, float]:
    evaluation = LabelPropagation(partial(Walkers, **options), batch_size=3, radius=30)
    return evaluation(subject({"it": encoder}, datamodule or squares()))


def naive(
    features: Tensor, grid: tuple[int, int], first: Tensor, *, context: int, neighbors: int, radius: int, heat: float
) -> Tensor:
    """Patch by patch, as it is described."""
    labels = [first.tolist()]
    for frame in range(1, len(features)):
        mine = []
        for target in range(grid[0] * grid[1]):
            found = []
            for seen in sorted({0, *range(frame - context, frame)} - set(range(-99, 0))):
                for source in range(grid[0] * grid[1]):
                    apart = [abs(a - b) for a, b in zip(divmod(target, grid[1]), divmod(source, grid[1]), strict=True)]
                    if max(apart) <= radius:
                        cosine = float(F.cosine_similarity(features[frame, target], features[seen, source], dim=0))
                        found.append((cosine, labels[seen][source]))
            best = sorted(found, key=lambda each: -each[0])[:neighbors]
            weights = [math.exp(cosine / heat) for cosine, _ in best]
            mine.append(
                [
                    sum(w * label[c] for w, (_, label) in zip(weights, best, strict=True)) / sum(weights)
                    for c in range(first.shape[1])
                ]
            )
        labels.append(mine)
    return torch.tensor(labels)


def test_propagation_equals_a_patch_by_patch_implementation() -> None:
    features = F.normalize(random_rows(5 * 12, 6, seed=0), dim=1).view(5, 12, 6)
    first = F.one_hot(torch.arange(12) % 3, 3).float()
    evaluation = LabelPropagation(Walkers, context=2, neighbors=4, radius=10, temperature=0.2)
    found = evaluation.propagate(features, (3, 4), first)  # radius 10 of 30 rows is 1 of 3
    expected = naive(features, (3, 4), first, context=2, neighbors=4, radius=1, heat=0.2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.sum(dim=2), torch.ones(5, 12))


def test_a_neighborhood_is_a_square_cut_by_the_image() -> None:
    near = neighborhood((3, 4), 1)
    assert near[0].view(3, 4).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert near[6].view(3, 4).int().tolist() == [[0, 1, 1, 1]] * 3
    assert torch.equal(near, near.T)
    assert neighborhood((3, 4), 9).all()


def test_colors_follow_squares_and_blindness_does_not() -> None:
    """Things as large as patches, told apart by color: every patch is right, and what is smoothed between patches is
    the boundary's, less than a patch away."""
    seeing, blind = judged(Patches()), judged(Patches(blind=True))
    assert seeing["labelpropagation_j"] > 0.6
    assert blind["labelpropagation_j"] < 0.2
    assert seeing["labelpropagation_jf"] == pytest.approx(
        (seeing["labelpropagation_j"] + seeing["labelpropagation_f"]) / 2
    )


def test_every_patch_of_the_right_color_gets_the_right_label() -> None:
    source = Walkers("val")
    masks = source.masks(0)
    frames = source[0]["image"].frames_at([frame / 5 for frame in range(4)])  # type: ignore[union-attr]
    features = Patches()(frames.float()).patches
    found = LabelPropagation(Walkers, radius=30).follow(features, (4, 4), masks[0])
    middles = found[:, 2::4, 2::4]  # of patches
    expected = (masks * torch.tensor([1, 2])[:, None, None]).sum(dim=1)[:, 2::4, 2::4]
    assert torch.equal(middles, expected)
    assert torch.equal(found[0], (masks[0] * torch.tensor([1, 2])[:, None, None]).sum(dim=0))


def test_the_first_and_the_last_frame_are_not_judged_and_things_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found is the truth in frame 1 and nothing in frame 2, and these two are judged: the mean is 1/2."""

    def half(self: LabelPropagation, features: Tensor, grid: tuple[int, int], masks: Tensor) -> Tensor:
        truth = (Walkers("val").masks(0) * torch.tensor([1, 2])[:, None, None]).sum(dim=1)
        truth[[0, 2, 3]] = 0
        return truth

    monkeypatch.setattr(LabelPropagation, "follow", half)
    assert judged(Patches()) == {
        "labelpropagation_jf": 0.5,
        "labelpropagation_j": 0.5,
        "labelpropagation_f": 0.5,
    }


def test_video_encoders_read_clips_of_one_repeated_frame() -> None:
    view = CenterVideoCrop(DenseClip(frames=6, stride=1), 16)
    data = DataModule(
        source=partial(Squares, length=4),
        train_view=view,
        eval_view=view,
        batch_size=2,
        num_workers=0,  # type: ignore[arg-type]
    )
    assert judged(Patches(), data) == pytest.approx(judged(Patches()))
    still = data.as_input(torch.randn(2, 3, 8, 8))
    assert still.shape == (2, 6, 3, 8, 8)
    assert torch.equal(still[:, 0], still[:, 5])


def test_a_film_knows_its_masks_in_every_frame() -> None:
    source = FilmsSource("val", count=2, resolution=24, duration=0.5, rate=8.0)
    masks, film = source.masks(1), source.film(1)
    assert masks.shape == (4, len(film.scene.objects), 24, 24)
    assert int(masks.sum(dim=1).max()) == 1
    assert np.array_equal(masks[3].numpy(), render.instance_masks(film.at(3 / 8), 24))
    found = LabelPropagation(partial(FilmsSource, count=2, resolution=24, duration=0.5, rate=8.0))
    assert 0 < found(subject({"": Patches()}, squares()))["labelpropagation_jf"] < 1


def test_not_applicable_sources_are_refused() -> None:
    with pytest.raises(SettingError, match="videos with masks are needed, which films have and Squares does not"):
        LabelPropagation(partial(Squares, length=3))(subject({"it": Patches()}, squares()))  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="walkers 0 has 2"):
        judged(Patches(), frames=2)
    with pytest.raises(SettingError, match="no object is visible in the first frame"):
        judged(Patches(), shown=False)
    with pytest.raises(SettingError, match="a temperature above 0"):
        LabelPropagation(Walkers, temperature=0.0)

    class Broken(Patches):
        def forward(self, image: Tensor) -> Features:
            features = super().forward(image)
            return Features(features.embedding, features.patches / 0, features.grid)

    with pytest.raises(BadFeatures, match=r"the encoder 'it' .* walkers 0"):
        judged(Broken())
