"""Barlow Twins and VICReg, step by step."""

import numpy as np
import pytest
import torch

from src.models.functional import feature_std
from src.models.joint_embedding.barlow_twins import BarlowTwins
from src.models.joint_embedding.vicreg import VICReg
from tests.models.joint_embedding import toy


def barlow_twins(**options: object) -> BarlowTwins:
    torch.manual_seed(0)
    return BarlowTwins(toy.resnet(), toy.optimizer(), **{"hidden_dim": 10, "projection_dim": 6, **options}).double()


def vicreg(**options: object) -> VICReg:
    torch.manual_seed(0)
    return VICReg(toy.resnet(), toy.optimizer(), **{"hidden_dim": 10, "projection_dim": 6, **options}).double()


def projections(method: BarlowTwins | VICReg, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """z of each view, whose batch norms see that view alone."""
    features = [method.encoder(view).embedding for view in batch["views"].unbind(1)]
    z = []
    for x in features:
        for layer in method.projector.layers:
            if isinstance(layer, torch.nn.BatchNorm1d):
                x = (x - x.mean(0)) / (x.var(0, correction=0) + layer.eps).sqrt() * layer.weight + layer.bias
            elif isinstance(layer, torch.nn.Linear):
                x = x @ layer.weight.T + (0 if layer.bias is None else layer.bias)
            else:
                x = x.clamp(min=0)
        z.append(x.detach().numpy())
    return z


def test_barlow_twins_written_as_loops():
    method, batch = barlow_twins(off_diagonal_weight=0.3), toy.batch(5)
    z1, z2 = projections(method, batch)
    loss, diagonal, squares = 0.0, 0.0, 0.0
    for i in range(6):
        for j in range(6):
            a, b = z1[:, i], z2[:, j]
            a, b = (a - a.mean()) / np.sqrt(a.var() + 1e-5), (b - b.mean()) / np.sqrt(b.var() + 1e-5)
            c = sum(x * y for x, y in zip(a, b, strict=True)) / 5
            loss += (c - 1) ** 2 if i == j else 0.3 * c**2
            diagonal, squares = (diagonal + c, squares) if i == j else (diagonal, squares + c**2)
    output = method.training_step(batch, 0)
    assert output["loss"].item() == pytest.approx(loss, rel=1e-9)
    assert output["logs"]["diagonal"].item() == pytest.approx(diagonal / 6, rel=1e-9)
    assert output["logs"]["off_diagonal"].item() == pytest.approx((squares / 30) ** 0.5, rel=1e-9)
    spread = np.mean([z.std(axis=0).mean() for z in (z1, z2)])
    assert output["logs"]["std"].item() == pytest.approx(spread, rel=1e-9)
    assert not list(method.norm.parameters())  # nothing to learn there


def test_vicreg_written_as_loops():
    method, batch = vicreg(invariance_weight=2.0, variance_weight=3.0, covariance_weight=5.0), toy.batch(5)
    views = projections(method, batch)
    distance = sum((views[0][b, d] - views[1][b, d]) ** 2 for b in range(5) for d in range(6)) / 30
    hinge = shared = 0.0
    for z in views:
        centered = [[z[b, d] - sum(z[:, d]) / 5 for d in range(6)] for b in range(5)]
        for i in range(6):
            for j in range(6):
                c = sum(row[i] * row[j] for row in centered) / 4
                if i == j:
                    hinge += max(0.0, 1 - (c + 1e-4) ** 0.5) / 6 / 2
                else:
                    shared += c**2 / 6
    output = method.training_step(batch, 0)
    assert output["loss"].item() == pytest.approx(2 * distance + 3 * hinge + 5 * shared, rel=1e-9)
    assert output["logs"]["variance"].item() == pytest.approx(hinge, rel=1e-9)
    assert output["logs"]["covariance"].item() == pytest.approx(shared, rel=1e-9)
    assert output["logs"]["std"].item() == pytest.approx(np.mean([z.std(axis=0) for z in views]), rel=1e-9)


@pytest.mark.parametrize("make", [barlow_twins, vicreg])
def test_every_parameter_learns_and_the_probe_reads_the_first_view(make):
    method, batch = make(), toy.batch()
    first = make().encoder(batch["views"][:, 0]).embedding
    output = method.training_step(batch, 0)
    output["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.projector.parameters())
    assert all(p.grad is not None for p in method.encoder.parameters())
    assert torch.allclose(output["embedding"], first.float())
    assert not output["embedding"].requires_grad


@pytest.mark.parametrize("make", [barlow_twins, vicreg])
def test_half_precision_stops_before_the_statistics(make):
    method = make().float()
    batch = {name: value.float() if value.is_floating_point() else value for name, value in toy.batch().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = method.training_step(batch, 0)
    assert output["loss"].dtype == output["logs"]["std"].dtype == torch.float32
    output["loss"].backward()


@pytest.mark.parametrize("make", [barlow_twins, vicreg])
def test_bad_batches_and_values_are_refused_by_their_key(make):
    with pytest.raises(ValueError, match=r"data\.train_view: .* 4 in train_view\.local_views"):
        make().training_step(toy.batch(local_views=4), 0)
    with pytest.raises(ValueError, match=r"data\.batch_size: .* at least 2 images"):
        make().training_step(toy.batch(count=1), 0)
    key = "off_diagonal_weight" if make is barlow_twins else "covariance_weight"
    with pytest.raises(ValueError, match=f"model\\.{key}=-1\\.0 must not be negative"):
        make(**{key: -1.0})


def test_a_collapsed_batch_has_no_deviation():
    assert feature_std(torch.ones(4, 2, 3)).item() == 0
    assert feature_std(torch.tensor([[[0.0, 1.0]], [[4.0, 1.0]]])).item() == 1.0  # 2 and 0
