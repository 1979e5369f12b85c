"""Encoder and decoder masks of videos."""

from __future__ import annotations

import pytest
import torch

from src.errors import SettingError
from src.models.video.masking import (
    VideoMasking,
    frame_masking,
    masked_tubelets,
    random_tubelet_masking,
    running_cell_masking,
    tube_masking,
)

GRID = (4, 6, 6)
CPU = torch.device("cpu")


def grid_of(mask: torch.Tensor) -> torch.Tensor:
    return mask.view(-1, *GRID)


@pytest.mark.parametrize(
    ("masking", "visible"), [(tube_masking, 4 * 4), (frame_masking, 36), (random_tubelet_masking, 14)]
)
def test_every_clip_has_the_same_number_of_visible_tubelets_and_its_own_mask(
    masking: VideoMasking, visible: int
) -> None:
    torch.manual_seed(0)
    result = masking(5, GRID, 0.9, CPU)
    assert result.keep.shape == (5, visible)
    assert torch.equal((1 - result.mask).sum(dim=1), torch.full((5,), float(visible)))
    assert torch.equal(result.mask.gather(1, result.keep), torch.zeros(5, visible))
    assert torch.equal(result.mask.gather(1, masked_tubelets(result, GRID)), torch.ones(5, 144 - visible))
    everything = torch.cat([result.keep, masked_tubelets(result, GRID)], dim=1)
    assert torch.equal(everything.sort(dim=1).values, torch.arange(144).expand(5, -1))
    assert torch.equal(everything.gather(1, result.restore), torch.arange(144).expand(5, -1))
    assert len({tuple(row.tolist()) for row in result.mask}) > 1


def test_tubes_mask_a_position_at_all_times_and_frames_all_positions() -> None:
    tube = grid_of(tube_masking(3, GRID, 0.9, CPU).mask)
    assert torch.equal(tube, tube[:, :1].expand_as(tube))
    assert torch.equal(tube[:, 0].sum(dim=(1, 2)), torch.full((3,), 32.0))  # int(0.9 * 36)
    frame = grid_of(frame_masking(3, GRID, 0.5, CPU).mask)
    assert torch.equal(frame, frame[:, :, :1, :1].expand_as(frame))
    assert torch.equal(frame[:, :, 0, 0].sum(dim=1), torch.full((3,), 2.0))


def test_papers_clip_keeps_160_of_1568_tubelets() -> None:
    assert tube_masking(1, (8, 14, 14), 0.9, CPU).keep.shape == (1, 160)


def test_running_cells_predict_every_position_twice_in_any_four_times() -> None:
    torch.manual_seed(1)
    grid = (8, 4, 6)
    masking = tube_masking(16, grid, 0.75, CPU)
    decoded = running_cell_masking(masking, grid)
    assert decoded.shape == (16, 8 * 24 // 2)
    chosen = torch.zeros(16, 8 * 24).scatter(1, decoded, 1.0).view(16, *grid)
    for start in range(5):
        assert torch.equal(chosen[:, start : start + 4].sum(dim=1), torch.full((16, 4, 6), 2.0))
    cells = chosen.view(16, 8, 2, 2, 3, 2).sum(dim=(3, 5))
    assert torch.equal(cells, torch.full_like(cells, 2.0))
    # at each time the authors' queue (two masked, two not) moves by one: what place p is, place p - 1 is next
    queue = chosen.view(16, 8, 2, 2, 3, 2).permute(0, 1, 2, 4, 3, 5).reshape(16, 8, -1, 4)
    assert torch.equal(queue[:, 1:], queue[:, :-1].roll(-1, dims=-1))
    assert len({tuple(row.tolist()) for row in decoded}) == 4  # random first positions


def test_a_ratio_or_grid_that_cannot_be_masked_raises() -> None:
    with pytest.raises(SettingError, match=r"model\.mask_ratio=0\.01 masks 0 of 36"):
        tube_masking(1, GRID, 0.01, CPU)
    with pytest.raises(SettingError, match=r"model\.mask_ratio=0\.1 masks 0 of 4"):
        frame_masking(1, GRID, 0.1, CPU)
    with pytest.raises(SettingError, match="cells of 2x2 do not divide a grid of 3x6"):
        running_cell_masking(tube_masking(1, (2, 3, 6), 0.5, CPU), (2, 3, 6))
