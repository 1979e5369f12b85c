import copy
import math
from typing import Any

import pytest
import torch

from src.errors import SettingError
from src.models.joint_embedding.pixpro import PixPro, consistency, crop_corners, matching_positions, propagate
from src.sync_batchnorm import SyncBatchNormPlugin
from tests.distributed import in_two_processes
from tests.models.joint_embedding import toy


def pixpro(**options: Any) -> PixPro:
    torch.manual_seed(0)
    sizes = {"hidden_dim": 8, "projection_dim": 5}
    method = PixPro(toy.resnet(), toy.optimizer(), **{**sizes, **options}).double()
    for parameter in method.teacher.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return method


def batch(count: int = 4) -> dict[str, torch.Tensor]:
    """Views of 64 pixels, whose map has 2 x 2 positions; the second is cropped to the right of the first."""
    generator = torch.Generator().manual_seed(2)
    boxes = torch.tensor([[[0.0, 0, 40, 40], [10, 0, 50, 40]]]).repeat(count, 1, 1)
    boxes[1, 1] = torch.tensor([200.0, 200, 240, 240])  # does not overlap
    flipped = torch.zeros(count, 2, dtype=torch.bool)
    flipped[2, 0] = True
    views = torch.randn(count, 2, 3, 64, 64, generator=generator, dtype=torch.float64)
    return toy.batch(count) | {"views": views, "boxes": boxes.double(), "flipped": flipped}


def unit(row: list[float]) -> list[float]:
    return [value / math.hypot(*row) for value in row]


def dot(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def centers(box: list[float], flipped: bool) -> list[tuple[float, float]]:
    """Distances of 2 x 2 positions in source pixels; a mirrored view begins at its right edge."""
    left, top, right, bottom = box
    columns = [left + (right - left) * share for share in ((0.75, 0.25) if flipped else (0.25, 0.75))]
    return [(x, top + (bottom - top) * share) for share in (0.25, 0.75) for x in columns]


def test_a_step_is_the_paper_written_as_loops():
    method, images = pixpro(instance_weight=0.3), batch()
    reference = copy.deepcopy(method)
    output = method.training_step(images, 0)
    student, teacher = reference.student, reference.teacher
    maps = [student["encoder"](view).patches for view in images["views"].unbind(1)]
    slow = [teacher["encoder"](view).patches for view in images["views"].unbind(1)]
    pixel, instance, overlapping = 0.0, 0.0, 0
    for q in range(2):
        projected = student["projector"](maps[q].flatten(0, 1))
        values = reference.value(projected).unflatten(0, (4, 4)).tolist()
        projected = projected.unflatten(0, (4, 4)).tolist()
        targets = teacher["projector"](slow[1 - q].flatten(0, 1)).unflatten(0, (4, 4)).tolist()
        for image in range(4):
            own, other = (
                centers(images["boxes"][image, view].tolist(), bool(images["flipped"][image, view]))
                for view in (q, 1 - q)
            )
            total, count = 0.0, 0
            for i in range(4):
                weights = [max(dot(unit(projected[image][i]), unit(x)), 0) ** 2 for x in projected[image]]
                y = [0.0] * 5
                for weight, value in zip(weights, values[image], strict=True):
                    y = [a + weight * b for a, b in zip(y, unit(value), strict=True)]
                for j in range(4):
                    # cells of 20 x 20 pixels
                    if math.dist(own[i], other[j]) / math.hypot(20, 20) < 0.7:
                        total, count = total + dot(unit(y), unit(targets[image][j])), count + 1
            pixel -= 2 * total / max(count, 1) / 4
            overlapping += count > 0
        pooled = reference.predictor(student["instance_projector"](maps[q].flatten(0, 1))).unflatten(0, (4, 4)).mean(1)
        target = teacher["instance_projector"](slow[1 - q].flatten(0, 1)).unflatten(0, (4, 4)).mean(1)
        instance -= sum(2 * dot(unit(a), unit(b)) / 4 for a, b in zip(pooled.tolist(), target.tolist(), strict=True))
    assert overlapping == 6
    assert output["logs"]["overlap"].item() == 3 / 4
    # the authors add 1e-6 to the number of matches
    assert output["logs"]["pixel"].item() == pytest.approx(pixel, rel=1e-5)
    assert output["logs"]["instance"].item() == pytest.approx(instance, rel=1e-10)
    assert output["loss"].item() == pytest.approx(pixel + 0.3 * instance, rel=1e-5)
    output["loss"].backward()
    assert {name for name, p in method.named_parameters() if p.grad is not None} == {
        name for name, _ in method.named_parameters() if not name.startswith("teacher.")
    }


def test_positions_match_where_they_show_the_same_place():
    """A grid of 2 rows and 3 columns of cells of 10 pixels."""
    whole = [0.0, 0, 30, 20]
    for first, second, expected in (
        ((whole, False), (whole, False), torch.eye(6).bool()),
        ((whole, False), (whole, True), torch.eye(6).bool().view(6, 2, 3).flip(2).flatten(1)),
        ((whole, True), (whole, True), torch.eye(6).bool()),
        # moved by one cell to the right: its first column is the first view's second
        ((whole, False), ([10.0, 0, 40, 20], False), torch.eye(2).kron(torch.eye(3).roll(1, 0).tril(-1)).bool()),
    ):
        boxes = torch.tensor([[first[0], second[0]]])
        crops = {"boxes": boxes, "flipped": torch.tensor([[first[1], second[1]]])}
        assert torch.equal(matching_positions(crop_corners(crops), (2, 3), 0.7)[0], expected)
    # distances are relative to the larger cells: all of a small crop lies near the cell around it
    boxes = torch.tensor([[[0.0, 0, 300, 200], [10.0, 10, 40, 30]]])
    crops = {"boxes": boxes, "flipped": torch.zeros(1, 2, dtype=torch.bool)}
    match = matching_positions(crop_corners(crops), (2, 3), 0.7)[0]
    assert match[0].all()
    assert not match[1:].any()


def test_propagation_by_hand():
    x = torch.tensor([[[2.0, 0.0], [3.0, 4.0], [-1.0, 0.0]]])
    value = torch.tensor([[[5.0, 0.0], [0.0, 2.0], [1.0, 1.0]]])
    # cosines with the first: 1, 0.6 and -1; the last is clamped to 0
    y = propagate(x, value, 2.0)[0, 0]
    assert torch.allclose(y, torch.tensor([1.0, 0.36]) / math.hypot(1, 0.36))
    assert consistency(y[None, None], torch.tensor([[[3.0, 0.0]]]), torch.ones(1, 1, 1).bool()).item() == pytest.approx(
        -2 / math.hypot(1, 0.36), rel=1e-5
    )
    assert consistency(y[None, None], torch.tensor([[[3.0, 0.0]]]), torch.zeros(1, 1, 1).bool()) == 0


def test_without_a_loss_its_heads_are_not_built():
    whole_images = pixpro(pixel_weight=0.0, instance_weight=1.0)
    assert set(whole_images.student) == {"encoder", "instance_projector"}
    assert "pixel" not in whole_images.training_step(batch(), 0)["logs"]
    assert set(pixpro().student) == {"encoder", "projector"}
    assert not hasattr(pixpro(), "predictor")


def test_pictures_darken_what_the_other_view_does_not_show():
    method, images = pixpro(), batch(3)
    with torch.no_grad():
        pictures = method.visualize(images)["matched"]
    assert torch.equal(pictures[:, :2], images["views"])
    assert torch.equal(pictures[1, 2:], images["views"][1] * 0.25)  # no overlap
    assert torch.equal(pictures[0, 2], images["views"][0, 0])  # every cell of 20 pixels, moved by 10, has a match


def on_each(process: int) -> dict[str, torch.Tensor]:
    method = SyncBatchNormPlugin().apply(pixpro(instance_weight=0.3))
    method.training_step(toy.part_of(batch(), process), 0)["loss"].backward()
    return toy.gradients(method)


def test_two_processes_are_one():
    whole = pixpro(instance_weight=0.3)
    whole.training_step(batch(), 0)["loss"].backward()
    first, second = in_two_processes(on_each)
    for name, gradient in toy.gradients(whole).items():
        assert torch.allclose((first[name] + second[name]) / 2, gradient, rtol=0, atol=1e-8), name


def test_bad_values_and_views_without_crops_are_refused():
    with pytest.raises(SettingError, match=r"data\.train_view\.record_crops: .* set it to true"):
        pixpro().training_step(toy.batch(), 0)
    for options, message in (
        ({"max_distance": 0}, r"model\.max_distance=0 .* must be above 0"),
        ({"value_layers": 3}, r"model\.value_layers=3 must be 0, 1 or 2"),
        ({"pixel_weight": 0.0}, r"model\.pixel_weight=0.0 and model\.instance_weight=0.0"),
    ):
        with pytest.raises(SettingError, match=message):
            pixpro(**options)
