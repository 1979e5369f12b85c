import pytest
import torch

from src.models.masked.block_masking import block_masks


def draws(count: int) -> torch.Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_half_the_crops_lose_exactly_the_share_they_drew():
    uniform = draws(400)
    masks = block_masks(uniform, (14, 14))
    for mask, (chance, amount, _) in zip(masks, uniform.tolist(), strict=True):
        assert mask.sum() == (int((0.1 + 0.4 * amount) * 196) if chance < 0.5 else 0)
    assert 160 < (masks.any(dim=1)).sum() < 240


def test_a_mask_depends_on_its_own_numbers_alone():
    uniform = draws(8)
    uniform[:, 0] = 0.0
    masks = block_masks(uniform, (8, 8))
    assert torch.equal(block_masks(uniform.flip(0), (8, 8)).flip(0), masks)
    assert len({tuple(mask) for mask in masks.tolist()}) == 8


def test_hidden_patches_lie_together():
    uniform = draws(100)
    uniform[:, 0], uniform[:, 1] = 0.0, 0.75  # 40 %

    def neighbors(masks: torch.Tensor) -> float:
        """Share of hidden patches whose right neighbor is hidden too."""
        grid = masks.view(-1, 14, 14)
        return ((grid[..., :-1] & grid[..., 1:]).sum() / grid[..., :-1].sum()).item()

    masks = block_masks(uniform, (14, 14))
    scattered = masks.gather(1, torch.rand(masks.shape, generator=torch.Generator().manual_seed(1)).argsort(dim=1))
    assert neighbors(scattered) == pytest.approx(0.4, abs=0.05)
    assert neighbors(masks) > 0.65


@pytest.mark.parametrize("grid", [(2, 2), (1, 6), (3, 5)])
def test_small_grids_get_their_count_too(grid):
    uniform = torch.tensor([[0.0, 1.0, 0.3]])
    masks = block_masks(uniform, grid, probability=1.0, share=(0.0, 0.5))
    assert masks.sum() == grid[0] * grid[1] // 2


@pytest.mark.parametrize("wrong", [{"probability": 1.5}, {"share": (0.5, 0.1)}, {"share": (0.5, 1.0)}])
def test_a_bad_probability_or_share_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        block_masks(draws(1), (4, 4), **wrong)
