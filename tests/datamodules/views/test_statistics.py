"""The 27 statistics of a clip, worked by hand for frames of 16 pixels: blocks of 4, rings of 2, triangles of 8."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from src.datamodules.batches.base import validate
from src.datamodules.batches.video import StatisticsBatch
from src.datamodules.scenes.films import FilmsSource
from src.datamodules.scenes.motion import flow as exact_flow
from src.datamodules.views import statistics
from src.datamodules.views.statistics import (
    StatisticsCrop,
    appearance_statistics,
    crop_flow,
    motion_statistics,
    partitions,
)
from src.datamodules.views.video import DenseClip, RandomSquare
from src.errors import SettingError

SIZE = 16


def region_of(partition: int, row: int, column: int) -> list[int]:
    """Returns the numbers, from 1, of the regions of a pixel."""
    return (np.flatnonzero(partitions(SIZE, SIZE)[partition].masks[:, row, column]) + 1).tolist()


def test_blocks_are_numbered_row_by_row() -> None:
    masks = partitions(SIZE, SIZE)[0].masks
    assert masks.sum(axis=(1, 2)).tolist() == [16] * 16
    assert (masks.sum(axis=0) == 1).all()
    assert [region_of(0, *place) for place in ((0, 0), (3, 15), (4, 0), (15, 15))] == [[1], [4], [5], [16]]


def test_rings_are_numbered_from_the_center() -> None:
    masks = partitions(SIZE, SIZE)[1].masks
    # squares of 4, 8, 12 and 16 pixels less what they hold
    assert masks.sum(axis=(1, 2)).tolist() == [16, 48, 80, 112]
    assert [region_of(1, *place) for place in ((7, 8), (6, 6), (5, 9), (4, 8), (3, 8), (1, 1), (15, 4))] == [
        [1],
        [1],
        [2],
        [2],
        [3],
        [4],
        [4],
    ]


def test_triangles_are_halves_of_quarters_and_share_their_diagonals() -> None:
    masks = partitions(SIZE, SIZE)[2].masks
    assert masks.sum(axis=(1, 2)).tolist() == [8 * 9 // 2] * 8
    # left and top of the upper left quarter, top and right of the upper right one, and so on
    inside = [(5, 1), (1, 5), (1, 10), (5, 14), (10, 1), (14, 5), (14, 10), (10, 14)]
    assert [region_of(2, *place) for place in inside] == [[number] for number in range(1, 9)]
    assert [region_of(2, *place) for place in ((3, 3), (3, 12), (12, 3), (12, 12))] == [[1, 2], [3, 4], [5, 6], [7, 8]]


def still(frames: int = 3) -> np.ndarray:
    return np.zeros((frames, 2, SIZE, SIZE), np.float32)


def test_without_motion_boundaries_all_statistics_are_zero() -> None:
    flow = still()
    assert motion_statistics(flow).tolist() == [0.0] * 14
    flow[:, 0], flow[:, 1] = 3.7, -0.3  # a camera's motion has no boundaries
    assert motion_statistics(flow).tolist() == [0.0] * 14


def test_a_step_in_the_horizontal_flow() -> None:
    """u is 0 left of column 13 and 2 from there on, in the last of three frames alone: boundaries on columns 12 and 13.

    A convolution turns its kernel round, so the derivative across is the left neighbor less the right one, over three
    rows: 3 (0 - 2) = -6 at both columns, 180 degrees: the fifth of eight directions.
    """
    flow = still()
    flow[2, 0, :, 13:] = 2.0
    found = motion_statistics(flow).tolist()
    # columns 12 and 13 are in the blocks 4, 8, 12 and 16, of which the first of equals counts
    assert found[0:4] == [4, 5, 0, 0]
    # 24 of the third ring's 80 pixels, 8 of the fourth's 112
    assert found[4:8] == [3, 5, 0, 0]
    # 5 + 6 pixels of the triangle on the right above, 4 + 3 of its neighbor; the diagonal is in both
    assert found[8:12] == [4, 5, 0, 0]
    assert found[12:] == [3, 0]


def test_a_step_in_the_vertical_flow_downwards() -> None:
    """v is 1 above row 3 and 0 below, in all frames, twice as strong in the second. Upper neighbor less the lower one:
    3 (1 - 0) a frame and row, downwards: 90 degrees, the third direction."""
    flow = still()
    flow[:, 1, :3] = 1.0
    flow[1, 1, :3] = 2.0
    found = motion_statistics(flow).tolist()
    # rows 2 and 3: blocks 1 to 4 of equal sums; third ring; triangles 2 (12 pixels of them) and 3 alike
    assert found[2:4] == [1, 3]
    assert found[6:8] == [3, 3]
    assert found[10:12] == [2, 3]
    assert found[12:] == [0, 2]


def test_means_decide_among_rings_and_sums_elsewhere() -> None:
    """Strength 1 on the 16 central pixels, 0.9 on the outer ring's 112: more in sum, less on average."""
    strength = np.zeros((SIZE, SIZE))
    blocks, rings, _ = partitions(SIZE, SIZE)
    strength[rings.masks[0]], strength[rings.masks[3]] = 1.0, 0.9
    boundary = statistics._Boundaries(strength, np.zeros((SIZE, SIZE)), 1)
    assert statistics._strongest(boundary, rings)[0] == 1
    assert statistics._strongest(boundary, rings._replace(unequal=False))[0] == 4
    # a corner block holds 12 pixels of the outer ring, one in the middle 4 of the inner one: sums 10.8 and 4
    assert statistics._strongest(boundary, blocks)[0] == 1


def test_a_pixel_gives_its_strength_to_the_two_directions_it_lies_between() -> None:
    """350 degrees is 7.78 eighths: 0.22 of it goes to the eighth direction and 0.78 to the first, over the end."""
    whole = statistics.Regions(np.ones((1, 1, 3), bool), unequal=False)
    angle = np.array([[350 / 45, 60 / 45, 60 / 45]])
    # 60 degrees: a third to the third direction, two thirds to the second
    for strength, expected in (([2.0, 1.0, 0.0], 1), ([1.0, 1.0, 0.3], 2), ([1.0, 0.0, 3.0], 2)):
        boundary = statistics._Boundaries(np.array([strength]), angle, 1)
        first, rest = strength[0], sum(strength[1:])
        shares = {1: first * 7 / 9, 8: first * 2 / 9, 2: rest * 2 / 3, 3: rest / 3}
        assert max(shares, key=shares.__getitem__) == expected
        assert statistics._strongest(boundary, whole)[1] == expected


def test_boundaries_of_all_frames_are_summed_with_their_signs() -> None:
    flow = still(2)
    flow[0, 0, :, 13:], flow[1, 0, :, 13:] = 2.0, -2.0  # they cancel, but each frame has its own
    assert motion_statistics(flow).tolist() == [0.0] * 12 + [1.0, 0.0]


def test_the_last_field_counts_in_the_sum_but_is_no_candidate_for_the_strongest_frame() -> None:
    flow = still(3)
    flow[0, 0, :, 13:], flow[2, 0, :, :3] = 1.0, -4.0
    assert motion_statistics(flow).tolist()[0] == motion_statistics(flow, frames=2).tolist()[0] == 1
    assert motion_statistics(flow).tolist()[12:] == [3, 0]
    assert motion_statistics(flow, frames=2).tolist()[12:] == [1, 0]


BLUE, GREEN, RED, WHITE, BLACK = (0, 0, 255), (0, 255, 0), (255, 0, 0), (255, 255, 255), (0, 0, 0)


def painted(color: tuple[int, int, int], frames: int = 4) -> np.ndarray:
    return np.broadcast_to(np.array(color, np.uint8).reshape(1, 3, 1, 1), (frames, 3, SIZE, SIZE)).copy()


@pytest.mark.parametrize(
    ("color", "octant"),
    [
        (BLUE, 1),
        ((127, 128, 128), 2),
        ((128, 127, 128), 3),
        (WHITE, 4),
        ((127, 127, 127), 5),
        (GREEN, 6),
        (RED, 7),
        ((128, 128, 127), 8),
    ],
)
def test_the_octants_of_color(color: tuple[int, int, int], octant: int) -> None:
    # all regions overlap wholly, so the first of each is both
    assert appearance_statistics(painted(color)).tolist() == [1, octant, 1, octant] * 3 + [octant]


def test_regions_with_changing_and_constant_colors() -> None:
    """Green, with the block of rows 0-3 and columns 12-15 red at first and blue afterwards."""
    video = painted(GREEN)
    for frame, color in enumerate((RED, BLUE, BLUE, BLUE)):
        video[frame, :, 0:4, 12:16] = np.array(color, np.uint8).reshape(3, 1, 1)
    found = appearance_statistics(video).tolist()
    assert found[0:4] == [4, 1, 1, 6]  # the block changes and is mostly blue; the first one does not
    # 4 of the 80 pixels of the third ring change and 12 of the fourth's 112
    assert found[4:8] == [4, 6, 1, 6]
    # the block lies on the diagonal: 10 of 36 pixels in either triangle, the first of equals counts
    assert found[8:12] == [3, 6, 1, 6]
    assert found[12] == 6


def test_overlap_is_intersection_over_union_averaged_over_channels() -> None:
    """Two frames of four pixels. Red: {0: 4} and {0: 2, 9: 2}: 2 / (4 + 2). Green the same in both: 1. Blue: 0 / 8."""
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[1, 0, :2] = 9
    pixels[1, 2] = 7
    assert statistics._overlap(pixels) == pytest.approx((2 / 6 + 1 + 0) / 3)


def test_a_color_counts_exactly_and_over_all_frames() -> None:
    """Three reds that differ, twice each, against one blue that occurs three times."""
    pixels = np.array([[[200, 201, 202, 0], [200, 201, 202, 0]], [[0] * 4, [0] * 4], [[0, 0, 0, 255], [0, 0, 0, 255]]])
    pixels = np.concatenate([pixels, np.array([[[0]] * 2, [[0]] * 2, [[255], [0]]])], axis=2).transpose(1, 0, 2)
    assert statistics._dominant(pixels.astype(np.uint8)) == 1


def test_a_ring_has_its_own_color_alone() -> None:
    """The second ring is red and the center white."""
    video = painted(GREEN)
    rings = partitions(SIZE, SIZE)[1].masks
    video[:, :, rings[1]] = np.array(RED, np.uint8).reshape(3, 1)
    video[:, :, rings[0]] = np.array(WHITE, np.uint8).reshape(3, 1)
    video[1, :, 5, 5] = 90  # which makes it the one that changes
    found = appearance_statistics(video).tolist()
    assert found[4:6] == [2, 7]


def test_flow_is_cropped_resized_and_mirrored_with_its_frames() -> None:
    flow = torch.arange(8.0).expand(1, 2, 8, 8).clone()  # each column its own number
    flow[:, 1] = 1.0
    box = np.array([2.0, 4.0, 4.0, 4.0])
    torch.testing.assert_close(crop_flow(flow, box, 4, flip=False)[0, 0, 0], torch.tensor([4.0, 5.0, 6.0, 7.0]))
    torch.testing.assert_close(crop_flow(flow, box, 4, flip=True)[0, 0, 0], -torch.tensor([7.0, 6.0, 5.0, 4.0]))
    torch.testing.assert_close(crop_flow(flow, box, 4, flip=True)[0, 1], torch.ones(4, 4))
    # twice as large, so twice as many pixels a step
    torch.testing.assert_close(crop_flow(flow, box, 8, flip=False)[0, 0, 0, 1:7], 2 * (4.25 + 0.5 * torch.arange(6.0)))


def test_statistics_are_taken_after_crop_and_mirror() -> None:
    source = FilmsSource("train", count=2, resolution=24, duration=1.0, rate=8.0)
    view = StatisticsCrop(DenseClip(frames=4, stride=2), RandomSquare(16, share=0.75))
    footage = source[1]["image"]
    numbers = np.array([0.0, 0.25, 0.75, 0.9], np.float32)
    plain = view.from_video(footage, numbers)
    numbers[-1] = 0.1
    mirrored = view.from_video(footage, numbers)
    torch.testing.assert_close(mirrored["video"], plain["video"].flip(-1))
    times = view.clip.times(1.0, 8.0, numbers).tolist()
    # each frame has a field, the last one to the frame after the clip, which is not among the strongest ones
    fields = footage.flow([*times, times[-1] + 0.25])
    moved = crop_flow(fields, np.array([2.0, 4.0, 18.0, 18.0]), 16, flip=False)
    assert len(moved) == 4
    assert torch.equal(plain["motion"], motion_statistics(moved.numpy(), frames=3))
    turned = moved.flip(-1) * torch.tensor([-1.0, 1.0]).view(2, 1, 1)
    torch.testing.assert_close(mirrored["motion"], motion_statistics(turned.numpy(), frames=3))
    assert torch.equal(plain["appearance"], appearance_statistics(plain["video"].numpy()))
    # blocks change sides: number b of a row of four becomes 5 - b
    assert (int(plain["motion"][0]) - 1) % 4 + (int(mirrored["motion"][0]) - 1) % 4 == 3
    batch = {name: value[None] for name, value in plain.items()} | {
        "video": plain["video"][None].float(),
        "label": torch.zeros(1, dtype=torch.int64),
        "index": torch.zeros(1, dtype=torch.int64),
        "replaced": torch.zeros(1, dtype=torch.bool),
    }
    validate(batch, StatisticsBatch)


def test_the_flow_of_a_film_follows_its_frames() -> None:
    source = FilmsSource("val", count=1, resolution=24, duration=1.0, rate=8.0)
    footage = source[0]["image"]
    flow = footage.flow([0.0, 0.25, 0.25, 9.0])
    assert flow.shape == (3, 2, 24, 24)
    film = source.film(0)
    np.testing.assert_array_equal(flow[0].numpy(), exact_flow(film, 0.0, 0.25, 24))
    assert float(flow[1].abs().max()) < 1e-5  # the same frame
    np.testing.assert_array_equal(flow[2].numpy(), exact_flow(film, 0.25, 7 / 8, 24))


def test_sizes_that_are_no_multiple_of_8_are_refused() -> None:
    with pytest.raises(SettingError, match="image_size=20: four rings and sixteen blocks"):
        StatisticsCrop(DenseClip(), RandomSquare(20))
    assert math.isclose(float(RandomSquare(8, share=0.5).boxes(20, 40, np.full((1, 3), 0.5))[0, 0]), 5.0)
    with pytest.raises(SettingError, match=r"share must lie in \(0, 1\]"):
        RandomSquare(8, share=0.0)
