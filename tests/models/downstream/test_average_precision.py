"""Tests of average precision by hand, and over two processes with different numbers of images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from src.errors import SettingError
from src.models.downstream import average_precision
from src.models.downstream.average_precision import AveragePrecision
from tests.distributed import in_two_processes

SIDE = 40


def objects(*boxes: tuple[int, int, int, int], labels: list[int], scores: list[float] | None = None) -> dict:
    masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    fields = {"boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4), "labels": torch.tensor(labels).long()}
    return {**fields, "masks": masks} | ({} if scores is None else {"scores": torch.tensor(scores)})


def scores_of(predictions: list[dict], targets: list[dict], **options) -> dict[str, float]:
    metric = AveragePrecision(**options)
    metric.update(predictions, targets)
    return {name: round(value.item(), 4) for name, value in metric.scores().items()}


A, B = (2, 2, 22, 22), (10, 20, 38, 38)


def test_correct_detections_score_one_and_wrong_ones_zero():
    targets = [objects(A, B, labels=[0, 1]), objects(labels=[])]
    right = [objects(A, B, labels=[0, 1], scores=[0.9, 0.6]), objects(labels=[], scores=[])]
    assert set(scores_of(right, targets).values()) == {1.0}
    other_class = [objects(A, B, labels=[1, 0], scores=[0.9, 0.6]), objects(labels=[], scores=[])]
    assert set(scores_of(other_class, targets).values()) == {0.0}
    nothing = [objects(labels=[], scores=[])] * 2
    assert set(scores_of(nothing, targets).values()) == {0.0}


def test_an_overlap_of_two_thirds_counts_at_the_thresholds_below():
    by_hand = {"ap": 0.4, "ap50": 1.0, "ap75": 0.0}
    # 20 x 20 and shifted by 4: 16 * 20 / (2 * 400 - 320) = 2 / 3, above the thresholds 0.50, 0.55, 0.60 and 0.65
    scores = scores_of([objects((6, 2, 26, 22), labels=[0], scores=[0.9])], [objects(A, labels=[0])])
    assert scores == {f"{kind}_{name}": value for kind in ("box", "mask") for name, value in by_hand.items()}


def by_pycocotools(predictions: list[dict], targets: list[dict]) -> dict[str, float]:
    """pycocotools itself on COCO's annotations, with its own parameters."""
    annotations, detections = [], []
    for number, (predicted, true) in enumerate(zip(predictions, targets, strict=True), start=1):
        for kept, fields in ((annotations, true), (detections, predicted)):
            for row, (x0, y0, x1, y1) in enumerate(fields["boxes"].double().tolist()):
                box = [x0, y0, x1 - x0, y1 - y0]
                common = {"image_id": number, "category_id": int(fields["labels"][row]), "bbox": box, "iscrowd": 0}
                extra = {"score": float(fields["scores"][row])} if "scores" in fields else {}
                kept.append({**common, **extra, "id": len(kept) + 1, "area": box[2] * box[3]})
    truth, found = COCO(), COCO()
    images = [{"id": number} for number in range(1, len(targets) + 1)]
    categories = [{"id": label} for label in sorted({each["category_id"] for each in annotations})]
    for coco, rows in ((truth, annotations), (found, detections)):
        coco.dataset = {"images": images, "categories": categories, "annotations": rows}
        coco.createIndex()
    evaluation = COCOeval(truth, found, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return dict(zip(("box_ap", "box_ap50", "box_ap75"), evaluation.stats[:3].tolist(), strict=True))


@pytest.mark.parametrize("seed", [0, 1])
def test_ap_is_pycocotools_where_overlaps_and_recalls_tie_with_thresholds(seed, capsys):
    """Boxes of width 20 that cover 60, 70, 80 and 90 % of an object, and numbers of objects that divide 100."""
    random = np.random.default_rng(seed)
    predictions, targets = [], []
    for _ in range(10):
        widths = random.choice([11, 12, 13, 14, 15, 16, 17, 18, 19, 20], size=2)
        true = [(0, 0, 20, 20), (0, 20, 20, 40)]
        found = [(0, 0, int(widths[0]), 20), (0, 20, int(widths[1]), 40)]
        targets.append(objects(*true, labels=[0, 1]))
        predictions.append(objects(*found, labels=[0, 1], scores=random.random(2).tolist()))
    metric = AveragePrecision(masks=False)
    metric.update(predictions, targets)
    expected = by_pycocotools(predictions, targets)
    assert {name: value.item() for name, value in metric.scores().items()} == pytest.approx(expected, abs=1e-7)
    # one overlap a threshold, by hand: with a width of 12 the overlap 12 / 20 counts at 0.50, 0.55 and 0.60
    assert scores_of([objects((0, 0, 12, 20), labels=[0], scores=[0.9])], [objects((0, 0, 20, 20), labels=[0])])[
        "box_ap"
    ] == pytest.approx(0.3)


def test_masks_are_scored_separately_from_boxes():
    predictions = objects(A, labels=[0], scores=[0.9])
    predictions["masks"][0, :, :12] = False  # the right half remains, an IoU of 0.5
    scores = scores_of([predictions], [objects(A, labels=[0])])
    assert scores["box_ap"] == 1.0
    assert scores["mask_ap"] == 0.1
    assert scores_of([predictions], [objects(A, labels=[0])], masks=False) == {
        "box_ap": 1.0,
        "box_ap50": 1.0,
        "box_ap75": 1.0,
    }


def test_a_false_positive_with_a_higher_score_halves_the_precision():
    predictions = [objects((25, 2, 38, 15), A, labels=[0, 0], scores=[0.9, 0.8])]
    assert scores_of(predictions, [objects(A, labels=[0])])["box_ap"] == 0.5


def test_a_detection_within_a_crowd_is_no_false_positive():
    targets = objects(A, (20, 20, 40, 40), labels=[0, 0])
    targets["iscrowd"] = torch.tensor([0, 1])
    predictions = [objects((22, 22, 32, 32), A, labels=[0, 0], scores=[0.9, 0.8])]
    assert scores_of(predictions, [targets])["box_ap"] == 1.0


def test_without_objects_there_is_no_score():
    assert scores_of([objects(A, labels=[0], scores=[0.9])], [objects(labels=[])]) == {}


IMAGES = [
    (objects(A, B, labels=[0, 1], scores=[0.9, 0.6]), objects(A, B, labels=[0, 1])),
    (objects(labels=[], scores=[]), objects(labels=[])),
    (objects((6, 2, 26, 22), labels=[0], scores=[0.7]), objects(A, labels=[0])),
]


def scores_of_share(rank: int) -> dict[str, torch.Tensor]:
    metric = AveragePrecision()
    for predictions, targets in IMAGES[rank::2] if rank == 0 else IMAGES[1:2]:
        metric.update([predictions], [targets])
    return metric.scores()


def test_two_processes_with_different_numbers_of_images_score_all_of_them():
    predictions, targets = zip(*IMAGES, strict=True)
    alone = scores_of(list(predictions), list(targets))
    assert 0 < alone["mask_ap"] < 1
    for scores in in_two_processes(scores_of_share):
        assert {name: round(value.item(), 4) for name, value in scores.items()} == alone


def test_a_process_without_images_does_not_block_the_others():
    predictions, targets = zip(*IMAGES, strict=True)
    for scores in in_two_processes(scores_of_all_or_none):
        assert {name: round(value.item(), 4) for name, value in scores.items()} == scores_of(
            list(predictions), list(targets)
        )


def scores_of_all_or_none(rank: int) -> dict[str, torch.Tensor]:
    metric = AveragePrecision()
    for predictions, targets in IMAGES if rank else []:
        metric.update([predictions], [targets])
    return metric.scores()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(average_precision, "_PYCOCOTOOLS_AVAILABLE", False)
    with pytest.raises(SettingError, match=r"needs the extra 'detection': pip install -e '\.\[detection\]'"):
        AveragePrecision()
