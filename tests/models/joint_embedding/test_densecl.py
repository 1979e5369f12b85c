"""DenseCL's matches, loss and queues; what it shares with MoCo v2 is tested beside MoCo."""

import copy
import math
from typing import Any

import pytest
import torch

from src.errors import SettingError
from src.models.joint_embedding.densecl import DenseCL, matched_share, most_similar_position
from tests.distributed import in_two_processes
from tests.models.joint_embedding import toy


def densecl(**options: Any) -> DenseCL:
    torch.manual_seed(0)
    options = {"queue_size": 24, "temperature": 0.3, "projection_dim": 5, **options}
    method = DenseCL(toy.vit(), toy.optimizer(), **options).double()
    for parameter in method.teacher.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return method


def l2_normalize(row: list[float]) -> list[float]:
    return [value / math.hypot(*row) for value in row]


def dot(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def cross_entropy(query: list[float], key: list[float], negatives: list[list[float]]) -> float:
    positive = dot(query, key) / 0.3
    return -positive + math.log(math.exp(positive) + sum(math.exp(dot(query, other) / 0.3) for other in negatives))


def test_a_step_is_the_paper_written_as_loops():
    method, batch = densecl(dense_weight=0.3), toy.batch()
    student, teacher = copy.deepcopy(method.student), copy.deepcopy(method.teacher)
    queue, dense_queue = method.queue.features.tolist(), method.dense_queue.features.clone()
    output = method.training_step(batch, 0)
    on_images, on_positions, means = 0.0, 0.0, []
    for image in range(4):
        first, second = (batch["views"][image, view][None] for view in (0, 1))
        x, y = student["encoder"](first), teacher["encoder"](second)
        query, key = student["projector"](x.embedding)[0], teacher["projector"](y.embedding)[0]
        on_images += cross_entropy(l2_normalize(query.tolist()), l2_normalize(key.tolist()), queue) / 4
        theirs = [l2_normalize(row) for row in y.patches[0].tolist()]
        keys = teacher["dense_projector"](y.patches)[0].tolist()
        for own, projected in zip(
            x.patches[0].tolist(), student["dense_projector"](x.patches)[0].tolist(), strict=True
        ):
            match = max(range(4), key=lambda place: dot(l2_normalize(own), theirs[place]))
            on_positions += cross_entropy(l2_normalize(projected), l2_normalize(keys[match]), dense_queue.tolist()) / 16
        means.append(l2_normalize([sum(column) / 4 for column in zip(*keys, strict=True)]))
    assert output["logs"]["global"].item() == pytest.approx(on_images, rel=1e-10)
    assert output["logs"]["dense"].item() == pytest.approx(on_positions, rel=1e-10)
    assert output["loss"].item() == pytest.approx(0.7 * on_images + 0.3 * on_positions, rel=1e-10)
    # the mean dense projections join their own queue after the step and not before
    assert torch.equal(method.dense_queue.features, dense_queue)
    method.on_before_optimizer_step(None)
    assert torch.allclose(method.dense_queue.features[:4], torch.tensor(means, dtype=torch.float64), atol=1e-12)
    assert torch.equal(method.dense_queue.features[4:], dense_queue[4:])
    assert method.queue.column("index")[:5].tolist() == [0, 1, 2, 3, -1]


def test_gradients_reach_both_projectors_and_not_the_teacher():
    for weight, without in ((0.0, "dense_projector"), (1.0, "projector"), (0.5, None)):
        method = densecl(dense_weight=weight)
        method.training_step(toy.batch(), 0)["loss"].backward()
        trained = {
            name for name, part in method.student.items() if any(p.grad.abs().sum() > 0 for p in part.parameters())
        }
        assert trained == {"encoder", "projector", "dense_projector"} - {without}
        assert not toy.gradients(method.teacher)


def test_a_position_s_match_is_where_its_content_went():
    """In any order of the positions and at any length of the vectors."""
    key = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    order = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    query = torch.stack([3 * rows[places] for rows, places in zip(key, order, strict=True)])
    assert torch.equal(most_similar_position(query, key * torch.rand(2, 9, 1).add(0.1)), order)
    assert matched_share(order) == 1
    assert matched_share(torch.tensor([[2, 2, 2, 2], [0, 1, 1, 0]])) == pytest.approx((1 / 4 + 2 / 4) / 2)


def test_the_global_projector_starts_as_the_authors_do():
    torch.manual_seed(0)
    layers = (
        DenseCL(toy.vit(embed_dim=96), toy.optimizer(), queue_size=8, projection_dim=96).student["projector"].layers
    )
    for layer in (layers[0], layers[2]):
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 96), rel=0.05)  # 9216 values
        assert layer.bias.abs().sum() == 0


def test_pictures_show_the_first_view_made_of_the_second_s_patches():
    method = densecl()
    batch = toy.batch(3)
    batch["views"][:, 1] = batch["views"][:, 0].flip(-1)
    with torch.no_grad():
        matched = method.visualize(batch)["matched"]
        encoders = [method.student["encoder"], method.teacher["encoder"]]
        maps = [encoder(view).patches for encoder, view in zip(encoders, batch["views"].unbind(1), strict=True)]
    assert torch.equal(matched[:, :2], batch["views"])
    match = most_similar_position(*maps)
    for image in range(3):
        for place in range(4):
            row, column = divmod(place, 2)
            source_row, source_column = divmod(int(match[image, place]), 2)
            shown = matched[image, 2, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            source = batch["views"][image, 1]
            source = source[:, 8 * source_row : 8 * source_row + 8, 8 * source_column : 8 * source_column + 8]
            assert torch.equal(shown, source)


def on_each(process: int) -> dict[str, torch.Tensor]:
    method = densecl()
    method.training_step(toy.part_of(toy.batch(6), process), 0)["loss"].backward()
    method.on_before_optimizer_step(None)
    return toy.gradients(method) | {"queue": method.dense_queue.features}


def test_two_processes_are_one():
    whole = densecl()
    whole.training_step(toy.batch(6), 0)["loss"].backward()
    whole.on_before_optimizer_step(None)
    first, second = in_two_processes(on_each)
    for name, gradient in toy.gradients(whole).items():
        assert torch.allclose((first[name] + second[name]) / 2, gradient, rtol=0, atol=1e-10), name
    for part in (first, second):
        assert torch.allclose(part["queue"], whole.dense_queue.features, rtol=0, atol=1e-12)


def test_a_weight_outside_of_0_and_1_is_refused():
    with pytest.raises(SettingError, match=r"model\.dense_weight=1.5 must lie in \[0, 1\]"):
        densecl(dense_weight=1.5)
