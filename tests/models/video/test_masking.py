"""What is hidden of a clip, and what is predicted."""

from __future__ import annotations

import pytest
import torch

from src.errors import SettingError
from src.models.video.masking import VideoMasking, anywhere, frames, hidden_cubes, running_cell_masking, tubes

GRID = (4, 6, 6)
CPU = torch.device("cpu")


def grid_of(mask: torch.Tensor) -> torch.Tensor:
    return mask.view(-1, *GRID)


@pytest.mark.parametrize(("masking", "visible"), [(tubes, 4 * 4), (frames, 36), (anywhere, 14)])
def test_every_clip_has_as_many_visible_cubes_and_its_own(masking: VideoMasking, visible: int) -> None:
    torch.manual_seed(0)
    found = masking(5, GRID, 0.9, CPU)
    assert found.keep.shape == (5, visible)
    assert torch.equal((1 - found.mask).sum(dim=1), torch.full((5,), float(visible)))
    assert torch.equal(found.mask.gather(1, found.keep), torch.zeros(5, visible))
    assert torch.equal(found.mask.gather(1, hidden_cubes(found, GRID)), torch.ones(5, 144 - visible))
    everything = torch.cat([found.keep, hidden_cubes(found, GRID)], dim=1)
    assert torch.equal(everything.sort(dim=1).values, torch.arange(144).expand(5, -1))
    assert torch.equal(everything.gather(1, found.restore), torch.arange(144).expand(5, -1))
    assert len({tuple(row.tolist()) for row in found.mask}) > 1


def test_a_tube_hides_a_place_at_all_times_and_a_frame_all_places() -> None:
    tube = grid_of(tubes(3, GRID, 0.9, CPU).mask)
    assert torch.equal(tube, tube[:, :1].expand_as(tube))
    assert torch.equal(tube[:, 0].sum(dim=(1, 2)), torch.full((3,), 32.0))  # int(0.9 * 36)
    frame = grid_of(frames(3, GRID, 0.5, CPU).mask)
    assert torch.equal(frame, frame[:, :, :1, :1].expand_as(frame))
    assert torch.equal(frame[:, :, 0, 0].sum(dim=1), torch.full((3,), 2.0))


def test_papers_clip_keeps_160_of_1568_cubes() -> None:
    assert tubes(1, (8, 14, 14), 0.9, CPU).keep.shape == (1, 160)


def test_running_cells_decode_every_place_twice_in_any_four_times() -> None:
    torch.manual_seed(1)
    grid = (8, 4, 6)
    masking = tubes(16, grid, 0.75, CPU)
    decoded = running_cell_masking(masking, grid)
    assert decoded.shape == (16, 8 * 24 // 2)
    chosen = torch.zeros(16, 8 * 24).scatter(1, decoded, 1.0).view(16, *grid)
    for start in range(5):
        assert torch.equal(chosen[:, start : start + 4].sum(dim=1), torch.full((16, 4, 6), 2.0))
    cells = chosen.view(16, 8, 2, 2, 3, 2).sum(dim=(3, 5))
    assert torch.equal(cells, torch.full_like(cells, 2.0))
    assert not torch.equal(chosen[:, 0], chosen[:, 1])  # it runs
    assert len({tuple(row.tolist()) for row in decoded}) == 4  # begins


def test_what_cannot_be_hidden_is_refused() -> None:
    with pytest.raises(SettingError, match=r"model\.mask_ratio=0\.01 hides 0 of 36"):
        tubes(1, GRID, 0.01, CPU)
    with pytest.raises(SettingError, match=r"model\.mask_ratio=0\.1 hides 0 of 4"):
        frames(1, GRID, 0.1, CPU)
    with pytest.raises(SettingError, match="running cells of 2x2 do not fill 3x6"):
        running_cell_masking(tubes(1, (2, 3, 6), 0.5, CPU), (2, 3, 6))
