import pytest
import torch

from src.models.losses.redundancy import (
    barlow_twins,
    covariance,
    cross_correlation,
    invariance,
    off_diagonal,
    variance,
    vicreg,
)


def views() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    return z1, z2


def test_barlow_twins_by_hand():
    correlation = torch.tensor([[0.5, 0.2], [-0.4, 1.0]])
    # 0.5^2 on the diagonal, 0.2^2 + 0.4^2 = 0.2 beside it
    assert barlow_twins(correlation, off_diagonal_weight=0.1).item() == pytest.approx(0.25 + 0.1 * 0.2)
    assert barlow_twins(torch.eye(3)).item() == 0.0


def test_barlow_twins_is_the_paper_s_pseudocode_in_loops():
    z1, z2 = views()
    norm = torch.nn.BatchNorm1d(3, affine=False, eps=0).double()
    loss = barlow_twins(cross_correlation(norm(z1), norm(z2), 5))
    expected = 0.0
    for i in range(3):
        for j in range(3):
            a, b = z1[:, i] - z1[:, i].mean(), z2[:, j] - z2[:, j].mean()
            c = float((a * b).sum() / (a.norm() * b.norm()))  # Pearson's, the batch's size cancels
            expected += (c - 1) ** 2 if i == j else 0.0051 * c**2
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_vicreg_s_terms_in_loops():
    z1, z2 = views()
    z1, z2 = 0.8 * z1, 0.3 * z2
    n, d = z1.shape
    distance = sum(float((z1[b, i] - z2[b, i]) ** 2) for b in range(n) for i in range(d)) / (n * d)
    hinges, crossed = [], []
    for z in (z1, z2):
        mean = [sum(float(z[b, i]) for b in range(n)) / n for i in range(d)]
        cov = [
            [sum((float(z[b, i]) - mean[i]) * (float(z[b, j]) - mean[j]) for b in range(n)) / (n - 1) for j in range(d)]
            for i in range(d)
        ]
        hinges.append(sum(max(0.0, 1 - (cov[i][i] + 1e-4) ** 0.5) for i in range(d)) / d)
        crossed.append(sum(cov[i][j] ** 2 for i in range(d) for j in range(d) if i != j) / d)
    assert invariance(z1, z2).item() == pytest.approx(distance, rel=1e-12)
    assert variance(z1).item() == pytest.approx(hinges[0], rel=1e-10)
    assert covariance(z2).item() == pytest.approx(crossed[1], rel=1e-10)
    loss, terms = vicreg(z1, z2, z1, z2)
    assert terms["variance"].item() == pytest.approx(sum(hinges) / 2, rel=1e-10)  # averaged over the views
    assert terms["covariance"].item() == pytest.approx(sum(crossed), rel=1e-10)  # summed
    assert loss.item() == pytest.approx(25 * distance + 25 * sum(hinges) / 2 + sum(crossed), rel=1e-10)


def test_off_diagonal_takes_each_entry_beside_the_diagonal_once():
    assert off_diagonal(torch.arange(9).view(3, 3)).tolist() == [1, 2, 3, 5, 6, 7]
    assert off_diagonal(torch.ones(1, 1)).tolist() == []


def test_a_batch_of_one_is_refused_by_its_key():
    z = torch.zeros(1, 3)
    for loss in (lambda: cross_correlation(z, z, 1), lambda: variance(z), lambda: covariance(z)):
        with pytest.raises(ValueError, match=r"data\.batch_size.*at least 2 images"):
            loss()


def test_in_half_precision_the_statistics_are_float32():
    z = torch.randn(64, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cross_correlation(z, z, 64).dtype == torch.float32
        assert torch.equal(covariance(z), covariance(z.float()))
