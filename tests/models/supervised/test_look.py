"""LOOK's loss and candidates; the momentum encoder and the queue are tested beside MoCo."""

import math
from typing import Any

import pytest
import torch

from src.datamodules.batches.base import BatchError
from src.errors import SettingError
from src.models.losses.contrastive import leave_one_out
from src.models.supervised.look import LOOK
from tests.distributed import in_two_processes
from tests.models.joint_embedding import toy

T = 0.3


def look(**options: Any) -> LOOK:
    """Images 0 to 19 of three classes are in the queue, four places are empty."""
    torch.manual_seed(0)
    options = {"queue_size": 24, "temperature": T, "projection_dim": 5, "neighbors": 6, **options}
    method = LOOK(toy.vit(), toy.optimizer(), **options).double()
    for parameter in method.teacher.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    method.queue.column("index")[:20] = torch.arange(20)
    method.queue.column("label")[:20] = torch.arange(20) % 3
    return method


def batch(labels: list[int]) -> dict[str, torch.Tensor]:
    return toy.batch(len(labels)) | {"label": torch.tensor(labels)}


def unit(row: list[float]) -> list[float]:
    return [value / math.hypot(*row) for value in row]


def dot(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def test_a_step_is_the_weighted_neighbors_written_as_loops():
    method, images = look(), batch([2, 0, 1, 5])  # nobody else has class 5
    views = images["views"].unbind(1)
    queries = [unit(row) for row in method.student["projector"](method.student["encoder"](views[0]).embedding).tolist()]
    keys = [unit(row) for row in method.teacher["projector"](method.teacher["encoder"](views[1]).embedding).tolist()]
    known = [(row, i % 3, i) for i, row in enumerate(method.queue.features[:20].tolist())]
    known += [(row, label, i) for i, (row, label) in enumerate(zip(keys, [2, 0, 1, 5], strict=True))]
    total = 0.0
    for i, (query, label) in enumerate(zip(queries, [2, 0, 1, 5], strict=True)):
        has_mate = any(theirs == label and index != i for _, theirs, index in known)
        assert has_mate is (label != 5)
        others = sorted(
            ((dot(query, row), theirs) for row, theirs, index in known if index != i or theirs == 5 == label),
            key=lambda pair: -pair[0],
        )
        near = others[:6]
        if not any(theirs == label for _, theirs in near):
            near += [pair for pair in others if pair[1] == label][:1]
        weights = [(math.exp(similarity / T), theirs == label) for similarity, theirs in near]
        total -= math.log(sum(weight for weight, same in weights if same) / sum(weight for weight, _ in weights)) / 4
    output = method.training_step(images, 0)
    assert output["loss"].item() == pytest.approx(total, rel=1e-10)
    assert output["logs"]["with_class_mate"].item() == 3 / 4
    # the labels of the keys are enqueued with them
    method.on_before_optimizer_step(None)
    assert method.queue.column("label")[:5].tolist() == [2, 0, 1, 5, 1]
    output["loss"].backward()
    assert not toy.gradients(method.teacher)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.student.parameters())


def test_in_the_first_step_of_a_run_an_image_without_class_mates_has_its_own_key():
    """Then it is InfoNCE within the batch."""
    method, images = look(), batch([0, 1, 2, 3])
    method.queue.column("label").fill_(-1)
    first, second = images["views"].unbind(1)
    queries = method.student["projector"](method.student["encoder"](first).embedding)
    keys = method.teacher["projector"](method.teacher["encoder"](second).embedding)
    logits = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(keys, dim=1).T / T
    output = method.training_step(images, 0)
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(4)).item()
    assert output["loss"].item() == pytest.approx(expected, rel=1e-10)
    assert output["logs"]["with_class_mate"] == 0


def test_loss_by_hand():
    candidates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [1.0, 0.0]])
    classes, excluded = torch.tensor([0, 1, 1, 1]), torch.tensor([[False, False, False, True]])
    query = torch.tensor([[1.0, 0.0]])

    def loss(label: int, neighbors: int, **options: int) -> float:
        return leave_one_out(
            query, candidates, torch.tensor([label]), classes, excluded, neighbors=neighbors, temperature=0.5, **options
        ).item()

    e = math.exp
    # the nearest is class 0; the nearest of class 1 is a neighbor whatever k is, and the excluded one never
    assert loss(0, 1) == pytest.approx(0, abs=1e-6)
    assert loss(1, 1) == pytest.approx(-math.log(e(1.2) / (e(2) + e(1.2))), abs=1e-6)
    assert loss(1, 9) == pytest.approx(-math.log((e(1.2) + 1) / (e(2) + e(1.2) + 1)), abs=1e-6)
    assert loss(1, 9, max_entries=1) == pytest.approx(loss(1, 9))
    assert loss(7, 2) == 0  # nobody of its class


def on_each(process: int) -> dict[str, torch.Tensor]:
    method = look()
    method.training_step(toy.part_of(batch([2, 0, 1, 2, 0, 0]), process), 0)["loss"].backward()
    return toy.gradients(method)


def test_two_processes_are_one():
    whole = look()
    whole.training_step(batch([2, 0, 1, 2, 0, 0]), 0)["loss"].backward()
    first, second = in_two_processes(on_each)
    for name, gradient in toy.gradients(whole).items():
        assert torch.allclose((first[name] + second[name]) / 2, gradient, rtol=0, atol=1e-10), name


def test_missing_labels_and_no_neighbors_are_refused():
    with pytest.raises(BatchError, match="LOOK learns from labels; 1 of 3 samples of a batch have none"):
        look().training_step(batch([0, -1, 1]), 0)
    with pytest.raises(SettingError, match=r"model\.neighbors=0 must be at least 1"):
        look(neighbors=0)
