import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from src.errors import SettingError
from src.models.joint_embedding.nnclr import NNCLR, nearest_neighbors
from src.sync_batchnorm import SyncBatchNormPlugin
from tests.distributed import in_two_processes
from tests.models.joint_embedding import toy
from tests.models.joint_embedding.runs import ViewData, train


def nnclr(**options: Any) -> NNCLR:
    torch.manual_seed(0)
    sizes = {"queue_size": 24, "hidden_dim": 8, "predictor_dim": 7, "projection_dim": 5, "temperature": 0.3}
    return NNCLR(toy.vit(), toy.optimizer(), **{**sizes, **options}).double()


def l2_normalize(row: list[float]) -> list[float]:
    return [value / math.hypot(*row) for value in row]


def dot(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def expected_loss(method: NNCLR, batch: dict[str, torch.Tensor]) -> tuple[float, list[list[int]]]:
    """The paper's pseudocode, image after image; and the position of each view's neighbor in the queue."""
    queue = method.queue.features.tolist()
    z, p = [], []
    for view in (0, 1):
        projection = method.projector(method.encoder(batch["views"][:, view]).embedding)
        z.append([l2_normalize(row) for row in projection.tolist()])
        p.append([l2_normalize(row) for row in method.predictor(projection).tolist()])
    nearest = [[max(range(len(queue)), key=lambda q: dot(row, queue[q])) for row in rows] for rows in z]
    loss = 0.0
    for view in (0, 1):
        for image, row in enumerate(z[view]):
            positive = queue[nearest[view][image]] if method.neighbors else row
            logits = [dot(positive, other) / 0.3 for other in p[1 - view]]
            loss += (math.log(sum(map(math.exp, logits))) - logits[image]) / len(z[view]) / 2
    return loss, nearest


@pytest.mark.parametrize("neighbors", [True, False])
def test_a_step_is_the_paper_written_as_loops(neighbors):
    method, batch = nnclr(neighbors=neighbors), toy.batch(6)
    method.queue.filled.fill_(24)
    method.queue.column("label").copy_(torch.arange(24) % 2)
    queue = method.queue.features.clone()
    loss, nearest = expected_loss(copy.deepcopy(method), batch)
    z = torch.nn.functional.normalize(method.projector(method.encoder(batch["views"][:, 0]).embedding), dim=1)
    output = method.training_step(batch, 0)
    assert output["loss"].item() == pytest.approx(loss, rel=1e-10)
    even = sum(position % 2 == 0 for rows in nearest for position in rows)  # all of the toy's labels are 0
    assert output["logs"]["neighbor_accuracy"].item() == pytest.approx(even / 12)
    # the first view's projections are enqueued after the step and not before
    assert torch.equal(method.queue.features, queue)
    method.on_before_optimizer_step(None)
    assert torch.allclose(method.queue.features[:6], z, rtol=0, atol=1e-12)
    assert torch.equal(method.queue.features[6:], queue[6:])


def test_gradients_come_through_the_predictions_alone():
    method, batch = nnclr(neighbors=False), toy.batch(6)
    reference = copy.deepcopy(method)
    with torch.no_grad():
        fixed = [reference.projector(reference.encoder(view).embedding) for view in batch["views"].unbind(1)]
    method.training_step(batch, 0)["loss"].backward()
    total = 0.0
    for view in (0, 1):
        h = reference.encoder(batch["views"][:, 1 - view]).embedding
        p = torch.nn.functional.normalize(reference.predictor(reference.projector(h)), dim=1)
        logits = torch.nn.functional.normalize(fixed[view], dim=1) @ p.T / 0.3
        total = total + torch.nn.functional.cross_entropy(logits, torch.arange(6)) / 2
    total.backward()
    expected = toy.gradients(reference)
    assert set(expected) == {name for name, _ in method.named_parameters()}
    for name, gradient in toy.gradients(method).items():
        assert torch.allclose(gradient, expected[name], rtol=0, atol=1e-12), name


def test_neighbors_are_the_nearest_in_any_number_of_chunks():
    queue = torch.nn.functional.normalize(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    assert nearest_neighbors(queue[[7, 3, 49]], queue).tolist() == [7, 3, 49]
    z = -queue[:9]
    whole = (z[:, None] - queue).pow(2).sum(dim=2).argmin(dim=1)
    assert torch.equal(nearest_neighbors(z, queue), whole)
    assert torch.equal(nearest_neighbors(z, queue, max_entries=100), whole)  # two rows at a time


def on_each(process: int) -> dict[str, torch.Tensor]:
    method = SyncBatchNormPlugin().apply(nnclr())
    method.training_step(toy.part_of(toy.batch(6), process), 0)["loss"].backward()
    method.on_before_optimizer_step(None)
    return toy.gradients(method) | {"queue": method.queue.features}


def test_two_processes_are_one():
    whole = nnclr()
    whole.training_step(toy.batch(6), 0)["loss"].backward()
    whole.on_before_optimizer_step(None)
    first, second = in_two_processes(on_each)
    for name, gradient in toy.gradients(whole).items():
        assert torch.allclose((first[name] + second[name]) / 2, gradient, rtol=0, atol=1e-8), name
    for part in (first, second):
        assert torch.allclose(part["queue"], whole.queue.features, rtol=0, atol=1e-10)


def test_bad_values_are_refused(tmp_path: Path):
    with pytest.raises(SettingError, match=r"model\.temperature=0 must be above 0"):
        nnclr(temperature=0)
    with pytest.raises(SettingError, match=r"model\.queue_size=20 must be a multiple of the 8 images"):
        train(tmp_path, nnclr(queue_size=20).float(), data=ViewData())
