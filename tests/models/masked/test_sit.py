from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from src.errors import SettingError
from src.models.masked.sit import SiT
from src.optim import OptimizerRecipe
from src.sync_batchnorm import SyncBatchNormPlugin
from tests.distributed import in_two_processes
from tests.models.joint_embedding import toy
from tests.toys import small_vit


def build(**options: Any) -> SiT:
    torch.manual_seed(0)
    vit = small_vit(**{"img_size": 16, "patch_size": 4, "embed_dim": 12} | options.pop("vit", {}))
    sizes = {"hidden_dim": 8, "projection_dim": 6}
    method = SiT(vit, OptimizerRecipe(torch.optim.AdamW, lr=1e-3), **{**sizes, **options}).double()
    for parameter in method.teacher.parameters():  # no copy of the student
        parameter.data.mul_(1.5)
    return method


def cross_entropy(query: torch.Tensor, keys: torch.Tensor, own: int) -> float:
    logits = [(query @ key / (query.norm() * key.norm())).item() / 0.3 for key in keys]
    return math.log(sum(map(math.exp, logits))) - logits[own]


def test_a_step_is_the_paper_written_as_loops():
    method, batch = build(temperature=0.3, reconstruction_weight=2.0), toy.batch(3)
    reference = copy.deepcopy(method)
    torch.manual_seed(3)
    corrupted, masks = method.corruption(batch["views"])
    torch.manual_seed(3)
    output: Any = method.training_step(batch, 0)
    # in training mode, so that batch norm takes its statistics over both views
    student = reference.student["encoder"](corrupted.flatten(0, 1))
    queries = reference.student["projector"](student.embedding).unflatten(0, (3, 2))
    keys = reference.teacher["projector"](reference.teacher["encoder"](batch["views"].flatten(0, 1)).embedding)
    keys = keys.unflatten(0, (3, 2))
    contrast = sum(cross_entropy(queries[b, v], keys[:, 1 - v], b) for b in range(3) for v in range(2)) / 3 * 2 * 0.3
    prediction = reference.pixels(student.patches, (4, 4)).view_as(batch["views"])
    errors = (prediction - batch["views"]).abs()[masks.expand_as(batch["views"])]
    assert output["logs"]["contrast"].item() == pytest.approx(contrast, rel=1e-10)
    assert output["logs"]["reconstruction"].item() == pytest.approx(errors.mean().item(), rel=1e-10)
    assert output["loss"].item() == pytest.approx(contrast + 2 * errors.mean().item(), rel=1e-10)


def test_the_teacher_sees_clean_views_without_drop_path():
    method, batch = build(vit={"drop_path_rate": 0.9, "depth": 2}), toy.batch(3)
    embeddings = [method.training_step(batch, 0)["embedding"] for _ in range(2)]
    assert torch.equal(*embeddings)


def test_gradients_reach_the_student_and_not_the_teacher():
    method = build()
    method.training_step(toy.batch(3), 0)["loss"].backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) is not name.startswith("teacher."), name
    assert method.pixels.to_pixels.weight.grad.abs().sum() > 0
    assert method.student["projector"][0].weight.grad.abs().sum() > 0


def test_the_reconstruction_does_not_reach_the_projector_and_weighs_what_it_is_given():
    method, batch, gradients = build(reconstruction_weight=0.0), toy.batch(3), []
    for weight in (0.0, 1.0, 3.0):
        method.reconstruction_weight = weight
        method.zero_grad()
        torch.manual_seed(3)
        method.training_step(batch, 0)["loss"].backward()
        gradients.append({name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None})
    for name, none in gradients[0].items():
        if name.startswith("student.projector."):
            torch.testing.assert_close(gradients[1][name], none)
        torch.testing.assert_close(gradients[2][name] - none, 3 * (gradients[1][name] - none))


def checkered(views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Drops the same pixels of every view, so that all processes count equally many."""
    masks = torch.zeros(*views.shape[:2], 1, *views.shape[-2:], dtype=torch.bool)
    masks[..., ::2, 1::3] = True
    return torch.where(masks, 0.0, views), masks


def gradients_of(batch: dict[str, torch.Tensor], *, synchronized: bool) -> dict[str, torch.Tensor]:
    method = build()
    method.corruption = checkered
    if synchronized:
        method = SyncBatchNormPlugin().apply(method)
    method.training_step(batch, 0)["loss"].backward()
    return {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


def one_process(process: int) -> dict[str, torch.Tensor]:
    return gradients_of(toy.part_of(toy.batch(4), process), synchronized=True)


def test_two_processes_are_one():
    expected = gradients_of(toy.batch(4), synchronized=False)
    first, second = in_two_processes(one_process)
    for name, value in expected.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"model\.temperature=0\.0"),
        ({"fill": "grey"}, r"model\.fill must be noise or zeros"),
        ({"vit": {"class_token": False, "global_pool": "avg"}}, r"backbone\.class_token: SiT"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(SettingError, match=message):
        build(**options)


def test_one_view_is_refused():
    with pytest.raises(SettingError, match=r"data\.train_view: this method compares 2 views"):
        build().training_step(toy.batch(3, views=1), 0)
