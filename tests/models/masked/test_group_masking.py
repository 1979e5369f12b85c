from typing import Any

import pytest
import torch

from src.errors import SettingError
from src.models.masked.group_masking import Corruption, group_masks

OPTIONS: dict[str, Any] = {"fill": "noise", "drop_share": 0.75, "alien_share": 0.3}


def seeds(count: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0))


def test_masks_cover_a_share_between_the_two_and_at_most_one_rectangle_more():
    masks = group_masks(seeds(100), (32, 48), (0.3, 0.6))
    share = masks.float().mean(dim=(1, 2, 3))
    assert 0.3 <= share.min() < 0.38
    assert 0.52 < share.max() < 0.6 + 0.3 * 0.3
    assert group_masks(seeds(50), (32, 32), (0.3, 0.3)).float().mean(dim=(1, 2, 3)).min() >= 0.3


def test_a_mask_depends_on_its_own_seed_alone():
    masks = group_masks(seeds(6), (32, 32), (0.3, 0.6))
    assert torch.equal(group_masks(seeds(6).flip(0), (32, 32), (0.3, 0.6)).flip(0), masks)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 6


def test_aligned_masks_are_of_whole_patches_and_the_largest_block_sets_their_size():
    masks = group_masks(seeds(40), (64, 64), (0.3, 0.3), align=8)
    patches = masks.view(40, 8, 8, 8, 8)
    assert torch.equal(patches.all(dim=(2, 4)), patches.any(dim=(2, 4)))
    assert not torch.equal(group_masks(seeds(1), (64, 64), (0.3, 0.3)), masks[:1])

    def neighbors(masks: torch.Tensor) -> float:
        """Share of masked patches whose right neighbor is masked too."""
        grid = masks.view(len(masks), 8, 8, 8, 8).any(dim=(2, 4))
        return ((grid[..., :-1] & grid[..., 1:]).sum() / grid[..., :-1].sum()).item()

    single = group_masks(seeds(40), (64, 64), (0.3, 0.3), align=8, max_block=0.125)
    assert single.sum(dim=(1, 2, 3)).tolist() == [20 * 64] * 40  # 20 of 64 patches is the first count above 30 %
    groups = group_masks(seeds(40), (64, 64), (0.3, 0.3), align=8, max_block=0.5)
    assert neighbors(single) < 0.4 < 0.55 < neighbors(groups)


def test_half_of_the_views_have_parts_of_the_same_view_of_another_image_and_the_others_noise():
    """Image n is the constant n, and its second view the constant 100 + n."""
    torch.manual_seed(0)
    views = torch.arange(40.0).view(40, 1, 1, 1, 1) + torch.tensor([0.0, 100.0]).view(1, 2, 1, 1, 1)
    views = views.expand(-1, -1, 3, 32, 32)
    corrupted, masks = Corruption(**OPTIONS)(views)
    assert torch.equal(corrupted[~masks.expand_as(views)], views[~masks.expand_as(views)])
    aliens = 0
    for b in range(40):
        for v in range(2):
            inside, share = corrupted[b, v][masks[b, v].expand(3, -1, -1)], masks[b, v].float().mean()
            if len(inside.unique()) == 1:  # from one image
                aliens += 1
                assert 0.3 <= share < 0.4
                assert 100 * v <= inside[0] < 100 * v + 40
                assert inside[0] == inside[0].round()
            else:
                assert 0.5 <= share < 0.85
                assert abs(inside.mean()) < 0.2
                assert inside.std().item() == pytest.approx(1.0, abs=0.1)
    assert 25 < aliens < 55


def test_without_aliens_every_view_has_the_fill():
    views = torch.full((4, 2, 3, 16, 16), 5.0)
    corrupted, masks = Corruption("zeros", drop_share=0.4, alien_share=0.0)(views)
    assert torch.equal(corrupted == 0, masks.expand_as(views))
    assert masks.float().mean(dim=(2, 3, 4)).min() >= 0.4


@pytest.mark.parametrize(
    ("share", "options", "message"),
    [
        ((0.5, 0.3), {}, r"model\.drop_share, model\.alien_share: \[0\.5, 0\.3\]"),
        ((0.5, 1.0), {}, r"model\.drop_share"),
        ((0.3, 0.3), {"max_block": 0.0}, r"model\.max_block=0\.0"),
        ((0.3, 0.3), {"align": 5}, r"model\.align=5 must divide the sides of an image of 16x16"),
        ((0.3, 0.3), {"align": 0}, r"model\.align=0"),
    ],
)
def test_bad_values_are_refused(share, options, message):
    with pytest.raises(SettingError, match=message):
        group_masks(seeds(1), (16, 16), share, **options)
