import copy

import numpy as np
import pytest
import torch

from src.models.joint_embedding.byol import BYOL, regression
from src.sync_batchnorm import SyncBatchNormPlugin
from tests.distributed import in_two_processes
from tests.models.joint_embedding import toy


def byol() -> BYOL:
    torch.manual_seed(0)
    method = BYOL(toy.resnet(), toy.optimizer(), hidden_dim=10, projection_dim=6).double()
    for parameter in method.teacher.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))  # as after some steps
    return method


def test_the_loss_by_hand():
    prediction = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 1.0]]])
    target = torch.tensor([[[1.0, 0.0], [-5.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
    # cosines 0.6, -1; 1, 1 / sqrt(2)
    expected = ((2 - 1.2) + (2 + 2) + (2 - 2) + (2 - 2**0.5)) / 2
    assert regression(prediction, target).item() == pytest.approx(expected)


def test_a_step_is_the_paper_s_each_view_predicting_the_other_s_target():
    method, batch = byol(), toy.batch()
    reference = copy.deepcopy(method)
    loss = method.training_step(batch, 0)["loss"].item()
    online, slow = [], []
    for view in batch["views"].unbind(1):
        h = reference.student["encoder"](view).embedding
        online.append(reference.predictor(reference.student["projector"](h)))
        slow.append(reference.teacher["projector"](reference.teacher["encoder"](view).embedding))
    total = 0.0
    for q, t in ((online[0], slow[1]), (online[1], slow[0])):
        for row, goal in zip(q.detach().numpy(), t.detach().numpy(), strict=True):
            difference = row / np.linalg.norm(row) - goal / np.linalg.norm(goal)
            total += (difference**2).sum() / 4
    assert loss == pytest.approx(total, rel=1e-10)


def test_gradients_reach_the_student_and_the_predictor_and_not_the_teacher():
    method = byol()
    method.training_step(toy.batch(), 0)["loss"].backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    without = {n for n, p in method.named_parameters() if not n.startswith("teacher.") and p.grad is None}
    assert without == set()
    optimizer = method.configure_optimizers()
    moved = {name for group in optimizer.param_groups for name in group["names"]}
    assert not any(name.startswith("teacher.") for name in moved)
    assert any(name.startswith("predictor.") for name in moved)


def test_the_teacher_begins_as_the_student_and_keeps_its_own_statistics():
    torch.manual_seed(0)
    method = BYOL(toy.resnet(), toy.optimizer(), hidden_dim=10, projection_dim=6).double()
    for (name, mine), (other, theirs) in zip(
        method.teacher.named_parameters(), method.student.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
    norm = method.teacher["encoder"].backbone.bn1
    before = norm.running_mean.clone()
    method.training_step(toy.batch(), 0)
    assert not torch.equal(norm.running_mean, before)


def on_each(process: int) -> dict[str, torch.Tensor]:
    method = SyncBatchNormPlugin().apply(byol())
    method.training_step(toy.part_of(toy.batch(6), process), 0)["loss"].backward()
    return toy.gradients(method)


def test_two_processes_are_one():
    whole = byol()
    whole.training_step(toy.batch(6), 0)["loss"].backward()
    parts = in_two_processes(on_each)
    expected = toy.gradients(whole)
    assert len(expected) > 20
    for name, gradient in expected.items():
        assert torch.allclose((parts[0][name] + parts[1][name]) / 2, gradient, rtol=0, atol=1e-8), name
