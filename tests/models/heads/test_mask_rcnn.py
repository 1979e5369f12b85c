"""Mask R-CNN's heads on maps that somebody else made, in the pixels of the images as they came."""

from __future__ import annotations

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from src.errors import SettingError
from src.models.heads.mask_rcnn import MaskRCNNOnMaps

STRIDES = (4, 8)


def heads(**kwargs) -> MaskRCNNOnMaps:
    torch.manual_seed(0)
    small = {"anchor_sizes": (8, 16, 32), "width": 8, "hidden": 16, "candidates": (20, 20), "proposals": (20, 20)}
    small |= {"regions": 8, "anchors": 16}
    return MaskRCNNOnMaps(8, STRIDES, 3, **small | kwargs)


def maps(side: int = 32, batch: int = 2, channels: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sides = {"0": side // 4, "1": side // 8, "pool": side // 16}
    return {name: torch.randn(batch, channels, size, size, generator=generator) for name, size in sides.items()}


def kinds(module: nn.Module) -> list[str]:
    return [type(each).__name__ for each in module.modules() if not list(each.children())]


def test_the_heads_of_vitdet_and_those_of_torchvision():
    plain, deep = heads(), heads(conv_heads=True)
    assert kinds(plain.roi_heads.box_head) == ["Linear", "Linear"]
    assert kinds(deep.roi_heads.box_head) == ["Conv2d", "LayerNorm2d", "ReLU"] * 4 + ["Flatten", "Linear", "ReLU"]
    assert kinds(plain.roi_heads.mask_head) == ["Conv2d", "ReLU"] * 4
    assert kinds(deep.roi_heads.mask_head) == ["Conv2d", "LayerNorm2d", "ReLU"] * 4
    assert [kinds(each.rpn.head.conv) for each in (plain, deep)] == [["Conv2d", "ReLU"], ["Conv2d", "ReLU"] * 2]
    assert all(norm.weight.shape == (8,) for norm in deep.modules() if isinstance(norm, LayerNorm2d))
    assert deep.roi_heads.box_predictor.cls_score.out_features == 4  # three classes and the background
    assert deep.roi_heads.mask_predictor.mask_fcn_logits.out_channels == 4
    assert not heads(masks=False).roi_heads.has_mask()


def test_without_numbers_of_its_own_it_is_torchvisions_mask_rcnn_with_the_proposals_of_detectron2():
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    with torch.device("meta"):
        ours = MaskRCNNOnMaps(256, (4, 8, 16, 32), 90)
        theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    for part in ("rpn", "roi_heads"):
        mine, other = getattr(ours, part), getattr(theirs, part)
        assert {n: p.shape for n, p in mine.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    assert ours.rpn.anchor_generator.sizes == theirs.rpn.anchor_generator.sizes
    assert ours.rpn._pre_nms_top_n == theirs.rpn._pre_nms_top_n == {"training": 2000, "testing": 1000}
    assert ours.rpn._post_nms_top_n == {"training": 1000, "testing": 1000}
    assert ours.roi_heads.score_thresh == theirs.roi_heads.score_thresh


def test_regions_are_cut_where_they_lie_though_pictures_are_smaller_than_the_canvas():
    model = heads()
    columns = torch.arange(16.0).expand(1, 1, 16, 16)  # stride 4: position k of the map reads k
    pool = model.roi_heads.box_roi_pool
    cut = pool({"0": columns, "1": columns[..., ::2, ::2]}, [torch.tensor([[8.0, 8.0, 22.0, 22.0]])], [(24, 24)])
    # seven parts of two pixels, half a position, each: their middles lie at 8 / 4 + 0.25 + 0.5 k, and position 2 is
    # what is read at 2.5
    torch.testing.assert_close(cut[0, 0], (1.75 + 0.5 * torch.arange(7.0)).expand(7, 7))


def test_a_region_is_sampled_at_every_position_it_covers():
    """A region of 21 positions has three in each of its seven parts, of whose squares two samples miss the mean."""
    squares = torch.arange(24.0).pow(2).expand(2, 1, 24, 24)
    pool = heads().roi_heads.box_roi_pool
    box = torch.tensor([[0.0, 0.0, 84.0, 84.0]])
    cut = pool({"0": squares, "1": squares[..., ::2, ::2]}, [box[:0], box], [(96, 96)] * 2)
    expected = torch.arange(21.0).pow(2).view(7, 3).mean(dim=1)
    torch.testing.assert_close(cut[0, 0], expected.expand(7, 7))


def test_a_region_is_cut_from_the_map_of_its_size_and_its_own_image():
    model = MaskRCNNOnMaps(1, (4, 8, 16, 32), 1, anchor_sizes=(8,) * 5, width=8, hidden=8)
    pool = model.roi_heads.box_roi_pool
    maps = {str(n): torch.full((2, 1, 128 >> n, 128 >> n), float(n)) for n in range(4)}
    maps = {name: value + torch.tensor([0.0, 10.0]).view(2, 1, 1, 1) for name, value in maps.items()}
    sides = torch.tensor([100.0, 112.0, 224.0, 448.0, 500.0])  # 224 pixels belong to stride 16
    boxes = torch.stack([torch.zeros(5), torch.zeros(5), sides, sides], dim=1)
    cut = pool(maps, [boxes[:3], boxes[3:]], [(512, 512)] * 2)
    assert cut.shape == (5, 1, 7, 7)
    assert cut[:, 0, 3, 3].tolist() == [0, 1, 2, 13, 13]


def test_nothing_is_found_in_the_filling():
    model = heads(min_score=0.0).eval()
    whole, part = model(maps(64), [(64, 64), (24, 40)], (64, 64))
    assert len(part["boxes"]) > 0
    assert part["boxes"][:, [0, 2]].max() <= 40
    assert part["boxes"][:, [1, 3]].max() <= 24
    assert whole["boxes"].max() > 40
    assert part["masks"].shape[1:] == (64, 64)
    assert part["masks"].dtype == torch.bool
    assert set(part["labels"].tolist()) <= {0, 1, 2}


def test_half_precision_does_not_move_boxes():
    """In bfloat16 there is no 1009 or 1025: what is proposed stays on the anchors' grid all the same."""
    model = heads(anchor_sizes=(10, 18, 34), candidates=(1000, 1000), proposals=(1000, 1000)).eval()
    nn.init.zeros_(model.rpn.head.bbox_pred.weight)
    large = {"0": torch.randn(1, 8, 8, 280), "1": torch.randn(1, 8, 4, 140), "pool": torch.randn(1, 8, 2, 70)}
    with torch.autocast("cpu", torch.bfloat16):
        half = {name: each.to(torch.bfloat16) for name, each in large.items()}
        sizes = [(32, 1120)]
        wide = {name: each.float() for name, each in half.items()}
        (proposals,), _ = model.rpn(model._canvas(wide, sizes), wide, None)
        found = model(half, sizes, (32, 1120))
    assert proposals.dtype == torch.float32
    centers = (proposals[:, 0] + proposals[:, 2]) / 2
    inside = (proposals[:, 0] > 1024) & (proposals[:, 2] < 1120)
    assert inside.sum() > 20
    assert torch.equal(centers[inside] % 4, torch.zeros(int(inside.sum())))
    assert all(found[0][name].dtype == torch.float32 for name in ("boxes", "scores"))


def test_an_empty_picture_teaches_that_there_is_nothing_and_a_full_one_reaches_every_weight():
    model = heads(conv_heads=True)
    box, mask = torch.tensor([[4.0, 4.0, 20.0, 24.0]]), torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[:, 4:24, 4:20] = True
    thing = {"boxes": box, "labels": torch.tensor([2]), "masks": mask}
    nothing = {name: value[:0] for name, value in thing.items()}
    sizes = [(32, 32)] * 2
    losses = model.losses(maps(), sizes, [nothing, nothing])
    assert losses.keys() == {"objectness", "proposals", "classes", "boxes", "masks"}
    assert [losses[name].item() for name in ("proposals", "boxes", "masks")] == [0.0, 0.0, 0.0]
    assert losses["objectness"] > 0
    assert losses["classes"] > 0
    torch.stack(list(losses.values())).sum().backward()
    # DDP waits for every gradient, in an empty batch too
    assert all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters())
    model.zero_grad()
    torch.stack(list(model.losses(maps(), sizes, [thing, nothing]).values())).sum().backward()
    assert all(each.grad.abs().sum() > 0 for each in model.parameters())


def test_as_many_anchor_sizes_as_maps_are_needed():
    with pytest.raises(SettingError, match=r"model.heads.anchor_sizes must have .* 3 maps, got \[8, 16\]"):
        heads(anchor_sizes=(8, 16))
