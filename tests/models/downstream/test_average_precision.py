"""Average precision of boxes and masks, worked by hand, and over two processes that share unevenly."""

from __future__ import annotations

import pytest
import torch

from src.errors import SettingError
from src.models.downstream import average_precision
from src.models.downstream.average_precision import AveragePrecision
from tests.distributed import in_two_processes

SIDE = 40


def things(*boxes: tuple[int, int, int, int], labels: list[int], scores: list[float] | None = None) -> dict:
    masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    found = {"boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4), "labels": torch.tensor(labels).long()}
    return {**found, "masks": masks} | ({} if scores is None else {"scores": torch.tensor(scores)})


def judged(found: list[dict], there: list[dict], **options) -> dict[str, float]:
    metric = AveragePrecision(**options)
    metric.update(found, there)
    return {name: round(value.item(), 4) for name, value in metric.scores().items()}


A, B = (2, 2, 22, 22), (10, 20, 38, 38)


def test_what_is_right_counts_whole_and_what_is_wrong_nothing():
    there = [things(A, B, labels=[0, 1]), things(labels=[])]
    right = [things(A, B, labels=[0, 1], scores=[0.9, 0.6]), things(labels=[], scores=[])]
    assert set(judged(right, there).values()) == {1.0}
    other_class = [things(A, B, labels=[1, 0], scores=[0.9, 0.6]), things(labels=[], scores=[])]
    assert set(judged(other_class, there).values()) == {0.0}
    nothing = [things(labels=[], scores=[])] * 2
    assert set(judged(nothing, there).values()) == {0.0}


def test_a_box_that_overlaps_by_two_thirds_counts_at_the_overlaps_below():
    by_hand = {"ap": 0.4, "ap50": 1.0, "ap75": 0.0}
    # 20 x 20 and shifted by 4: 16 * 20 / (2 * 400 - 320) = 2 / 3, above the thresholds 0.50, 0.55, 0.60 and 0.65
    scores = judged([things((6, 2, 26, 22), labels=[0], scores=[0.9])], [things(A, labels=[0])])
    assert scores == {f"{kind}_{name}": value for kind in ("box", "mask") for name, value in by_hand.items()}


def test_masks_are_judged_apart_from_boxes():
    found = things(A, labels=[0], scores=[0.9])
    found["masks"][0, :, :12] = False  # the right half is left: an overlap of 0.5
    scores = judged([found], [things(A, labels=[0])])
    assert scores["box_ap"] == 1.0
    assert scores["mask_ap"] == 0.1
    assert judged([found], [things(A, labels=[0])], masks=False) == {"box_ap": 1.0, "box_ap50": 1.0, "box_ap75": 1.0}


def test_a_false_one_that_is_surer_halves_the_precision():
    found = [things((25, 2, 38, 15), A, labels=[0, 0], scores=[0.9, 0.8])]
    assert judged(found, [things(A, labels=[0])])["box_ap"] == 0.5


def test_what_is_found_in_a_crowd_is_no_mistake():
    there = things(A, (20, 20, 40, 40), labels=[0, 0])
    there["iscrowd"] = torch.tensor([0, 1])
    found = [things((22, 22, 32, 32), A, labels=[0, 0], scores=[0.9, 0.8])]
    assert judged(found, [there])["box_ap"] == 1.0


def test_without_a_thing_to_find_there_is_no_score():
    assert judged([things(A, labels=[0], scores=[0.9])], [things(labels=[])]) == {}


PICTURES = [
    (things(A, B, labels=[0, 1], scores=[0.9, 0.6]), things(A, B, labels=[0, 1])),
    (things(labels=[], scores=[]), things(labels=[])),
    (things((6, 2, 26, 22), labels=[0], scores=[0.7]), things(A, labels=[0])),
]


def of_share(rank: int) -> dict[str, torch.Tensor]:
    metric = AveragePrecision()
    for found, there in PICTURES[rank::2] if rank == 0 else PICTURES[1:2]:
        metric.update([found], [there])
    return metric.scores()


def test_two_processes_with_different_numbers_of_pictures_judge_all_of_them():
    found, there = zip(*PICTURES, strict=True)
    alone = judged(list(found), list(there))
    assert 0 < alone["mask_ap"] < 1
    for scores in in_two_processes(of_share):
        assert {name: round(value.item(), 4) for name, value in scores.items()} == alone


def test_a_process_without_any_picture_does_not_keep_the_others_waiting():
    found, there = zip(*PICTURES, strict=True)
    for scores in in_two_processes(of_all_or_nothing):
        assert {name: round(value.item(), 4) for name, value in scores.items()} == judged(list(found), list(there))


def of_all_or_nothing(rank: int) -> dict[str, torch.Tensor]:
    metric = AveragePrecision()
    for found, there in PICTURES if rank else []:
        metric.update([found], [there])
    return metric.scores()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(average_precision, "_PYCOCOTOOLS_AVAILABLE", False)
    with pytest.raises(SettingError, match=r"needs the extra 'detection': pip install -e '\.\[detection\]'"):
        AveragePrecision()
