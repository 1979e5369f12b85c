"""SupCon's step, and its loss among images of known classes."""

import math

import pytest
import torch

from src.datamodules.batches.base import BatchError
from src.errors import SettingError
from src.models.losses.contrastive import nt_xent, supcon
from src.models.supervised.supcon import SupCon
from tests.distributed import in_two_processes
from tests.models.joint_embedding import toy

LABELS = [2, 0, 2, 1, 2, 0]


def build(**options: float) -> SupCon:
    torch.manual_seed(0)
    return SupCon(toy.vit(), toy.optimizer(), projection_dim=5, **options).double()


def batch(labels: list[int]) -> dict[str, torch.Tensor]:
    return toy.batch(len(labels)) | {"label": torch.tensor(labels)}


def by_loops(z: list[list[float]], labels: list[int], temperature: float) -> float:
    """L_out of z[2 * i + v], of unit length, one anchor after the other: the mean over images and views."""
    total = 0.0
    for i, anchor in enumerate(z):
        similar = [sum(a * b for a, b in zip(anchor, other, strict=True)) / temperature for other in z]
        everything = sum(math.exp(value) for j, value in enumerate(similar) if j != i)
        positives = [j for j in range(len(z)) if labels[j // 2] == labels[i // 2] and j != i]
        total -= sum(math.log(math.exp(similar[j]) / everything) for j in positives) / len(positives)
    return total / len(z)


def test_a_step_is_the_paper_written_as_loops():
    method, images = build(temperature=0.3, base_temperature=0.2), batch(LABELS)
    h = method.encoder(images["views"].flatten(0, 1)).embedding
    z = [[value / math.hypot(*row) for value in row] for row in method.projector(h).tolist()]
    output = method.training_step(images, 0)
    assert output["loss"].item() == pytest.approx(1.5 * by_loops(z, LABELS, 0.3), rel=1e-10)
    assert torch.allclose(output["embedding"], h.view(6, 2, -1)[:, 0].float())
    # of 5 other images 2 have class 2 (three times), 1 has class 0 (twice), none has class 1
    assert output["logs"]["same_class"].item() == pytest.approx((3 * 2 + 2 * 1) / 6 / 5)
    output["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


def test_with_a_class_for_each_image_the_loss_is_simclr_s():
    z = torch.nn.functional.normalize(torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    # nt_xent sums over the two views, SupCon averages
    expected = nt_xent(z, z, 0, temperature=0.3) / 2
    assert torch.allclose(supcon(z, z, torch.tensor([7, 3, 0, 5]), 0, temperature=0.3), expected)
    same = supcon(z, z, torch.tensor([7, 3, 7, 5]), 0, temperature=0.3)
    assert not torch.allclose(same, expected)
    chunks = supcon(z, z, torch.tensor([7, 3, 7, 5]), 0, temperature=0.3, max_entries=16)
    assert torch.allclose(chunks, same)


def test_one_class_in_all_pulls_everything_together():
    """Equal vectors then have the least loss, the logarithm of the number of other views."""
    z = torch.tensor([[1.0, 0.0]]).expand(3, 2, 2)
    assert supcon(z, z, torch.zeros(3), 0, temperature=0.1).item() == pytest.approx(math.log(5))


def on_each(process: int) -> dict[str, torch.Tensor]:
    method = build()
    output = method.training_step(toy.part_of(batch(LABELS), process), 0)
    output["loss"].backward()
    return toy.gradients(method) | {"loss": output["loss"].detach()}


def test_two_processes_are_one():
    """Images of one class lie in both processes."""
    whole = build()
    loss = whole.training_step(batch(LABELS), 0)["loss"]
    loss.backward()
    first, second = in_two_processes(on_each)
    expected = toy.gradients(whole) | {"loss": loss.detach()}
    assert len(expected) > 10
    for name, value in expected.items():
        assert torch.allclose((first[name] + second[name]) / 2, value, rtol=0, atol=1e-10), name


def test_missing_labels_and_bad_temperatures_are_refused():
    with pytest.raises(BatchError, match="SupCon learns from labels; 1 of 3 samples of a batch have none"):
        build().training_step(batch([0, -1, 1]), 0)
    with pytest.raises(SettingError, match=r"model\.base_temperature=0 must be above 0"):
        build(base_temperature=0)
