import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from src.models.losses.contrastive import (
    contrastive_accuracy,
    contrastive_loss,
    coupling,
    dcl,
    dclw,
    info_nce,
    mix_hard_negatives,
    moco_v3_loss,
    nt_xent,
    queue_info_nce,
)

T = 0.3


def unit_vectors(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def dot(x: Tensor, y: Tensor) -> float:
    return sum(float(a) * float(b) for a, b in zip(x, y, strict=True))


def by_loops(z: Tensor, *, decoupled: bool, sigma: float | None = None) -> float:
    """Computes the papers' sums over both views, mean over images, z being [N, 2, D]."""
    images = len(z)
    hardness = [math.exp(dot(z[i, 0], z[i, 1]) / sigma) if sigma else 1.0 for i in range(images)]
    total = 0.0
    for i in range(images):
        weight = 2 - hardness[i] / (sum(hardness) / images) if sigma else 1.0
        for view in range(2):
            positive = dot(z[i, view], z[i, 1 - view]) / T
            others = sum(
                math.exp(dot(z[i, view], z[j, other]) / T) for j in range(images) if j != i for other in range(2)
            )
            total += -weight * positive + math.log(others + (0 if decoupled else math.exp(positive)))
    return total / images


def test_two_images_by_hand():
    x, y = [1.0, 0.0], [0.0, 1.0]
    z = torch.tensor([[x, x], [y, y]])
    # each of two views has one positive of similarity 1 and two negatives of similarity 0; the temperature is 1/2
    assert nt_xent(z, z, 0, temperature=0.5).item() == pytest.approx(2 * (math.log(math.exp(2) + 2) - 2), abs=1e-6)
    assert dcl(z, z, 0, temperature=0.5).item() == pytest.approx(2 * (math.log(2) - 2), abs=1e-6)
    # positives of equal similarity all have weight 1
    assert dclw(z, z, 0, temperature=0.5).item() == pytest.approx(2 * (math.log(2) - 2), abs=1e-6)
    # the positive's probability is e^2 / (e^2 + 2)
    expected = 2 / (math.exp(2) + 2)
    assert coupling(z, z, 0, temperature=0.5).item() == pytest.approx(expected, abs=1e-6)


def test_losses_equal_the_papers_sums_computed_by_loops():
    z = unit_vectors(5, 2, 4)
    assert nt_xent(z, z, 0, temperature=T).item() == pytest.approx(by_loops(z, decoupled=False), abs=1e-12)
    assert dcl(z, z, 0, temperature=T).item() == pytest.approx(by_loops(z, decoupled=True), abs=1e-12)
    expected = by_loops(z, decoupled=True, sigma=0.5)
    assert dclw(z, z, 0, temperature=T).item() == pytest.approx(expected, abs=1e-12)
    assert abs(expected - by_loops(z, decoupled=True)) > 1e-2  # the weights make a difference


def test_offset_locates_the_own_rows_among_the_keys():
    z = unit_vectors(6, 2, 4)
    for loss in (nt_xent, dcl, dclw):
        parts = [loss(z[start : start + 2], z, start, temperature=T) for start in (0, 2, 4)]
        assert sum(parts).item() / 3 == pytest.approx(loss(z, z, 0, temperature=T).item(), abs=1e-12)


def test_info_nce_and_moco_v3_loss_by_loops():
    query, keys = unit_vectors(2, 3, seed=1), unit_vectors(5, 3, seed=2)
    expected = 0.0
    for b, own in enumerate((3, 4)):
        terms = [math.exp(dot(query[b], key) / T) for key in keys]
        expected -= math.log(terms[own] / sum(terms)) / 2
    assert info_nce(query, keys, 3, temperature=T).item() == pytest.approx(expected, abs=1e-12)
    assert moco_v3_loss(query, keys, 3, temperature=T).item() == pytest.approx(2 * T * expected, abs=1e-12)


def test_the_gradient_of_info_nce_is_the_coupling_factor_times_that_of_dcl():
    """Checks the paper's proposition 1 for each view."""
    z = unit_vectors(4, 2, 6)
    everything = z.flatten(0, 1)
    for anchor in range(8):
        own = torch.arange(8) == anchor
        same = torch.arange(8) // 2 == anchor // 2
        gradients = []
        for denominator in (~own, ~same):
            x = everything[anchor].clone().requires_grad_(True)
            contrastive_loss((x @ everything.T / T)[None], (same & ~own)[None], denominator[None]).sum().backward()
            gradients.append(x.grad)
        positive = math.exp(dot(everything[anchor], everything[anchor ^ 1]) / T)
        rest = sum(math.exp(dot(everything[anchor], everything[j]) / T) for j in range(8) if j // 2 != anchor // 2)
        assert torch.allclose(gradients[0], rest / (positive + rest) * gradients[1], rtol=1e-10, atol=0)


def test_the_weights_of_dclw_carry_no_gradient():
    z = unit_vectors(4, 2, 6).requires_grad_(True)
    dclw(z, z, 0, temperature=T).backward()
    similarity = (z[:, 0] * z[:, 1]).sum(dim=1).detach()
    weight = 2 - (similarity / 0.5).exp() / (similarity / 0.5).exp().mean()
    again = z.detach().clone().requires_grad_(True)
    extra = ((weight - 1)[:, None] * (again[:, 0] * again[:, 1])).sum() / T / 2  # what the weights add to plain DCL
    (dcl(again, again, 0, temperature=T) - extra).backward()
    assert torch.allclose(z.grad, again.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [nt_xent, dcl, dclw])
def test_in_chunks_value_and_gradients_are_the_same(loss):
    results = []
    for max_entries in (2**22, 3 * 14, 1):  # all views, three, one at a time
        z = unit_vectors(3, 2, 4, seed=3).requires_grad_(True)
        rest = unit_vectors(4, 2, 4, seed=4).requires_grad_(True)
        value = loss(z, torch.cat([rest[:2], z, rest[2:]]), 2, temperature=T, max_entries=max_entries)
        value.backward()
        results.append((value.detach(), z.grad, rest.grad))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.allclose(one, two, rtol=0, atol=1e-13)
    assert results[0][2].abs().min() > 0  # keys of other processes have gradients too


def queue_by_loops(query: Tensor, key: Tensor, negatives: list[list[Tensor]], *, decoupled: bool = False) -> float:
    total = 0.0
    for b in range(len(query)):
        positive = dot(query[b], key[b]) / T
        others = sum(math.exp(dot(query[b], negative) / T) for negative in negatives[b])
        total += -positive + math.log(others + (0 if decoupled else math.exp(positive)))
    return total / len(query)


def test_queue_info_nce_by_loops_with_synthetic_and_excluded_negatives():
    query, key, queue, synthetic = (
        unit_vectors(3, 4),
        unit_vectors(3, 4, seed=1),
        unit_vectors(5, 4, seed=2),
        unit_vectors(3, 2, 4, seed=3),
    )
    plain = queue_by_loops(query, key, [list(queue)] * 3)
    assert queue_info_nce(query, key, queue, temperature=T).item() == pytest.approx(plain, abs=1e-12)
    excluded = torch.zeros(3, 5, dtype=torch.bool)
    excluded[0, 1] = excluded[2, 4] = excluded[2, 0] = True
    negatives = [
        [queue[j] for j in range(5) if not excluded[b, j]] + [synthetic[b, s] for s in range(2)] for b in range(3)
    ]
    for decoupled in (False, True):
        for max_entries in (2**22, 8, 1):
            value = queue_info_nce(
                query,
                key,
                queue,
                temperature=T,
                synthetic=synthetic,
                excluded=excluded,
                decoupled=decoupled,
                max_entries=max_entries,
            )
            expected = queue_by_loops(query, key, negatives, decoupled=decoupled)
            assert value.item() == pytest.approx(expected, abs=1e-12)


def test_contrastive_accuracy_is_the_share_of_positives_above_all_negatives():
    query = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    key = torch.tensor([[0.8, 0.6], [0.0, 1.0], [1.0, 0.0]])
    queue = torch.tensor([[0.6, 0.8], [-1.0, 0.0]])
    assert contrastive_accuracy(query, key, queue).item() == pytest.approx(2 / 3)
    synthetic = torch.tensor([[[0.96, 0.28]]] * 3)
    assert contrastive_accuracy(query, key, queue, synthetic=synthetic).item() == pytest.approx(1 / 3)
    # without the negative that is more similar to the second query than its positive
    excluded = torch.tensor([[False, False], [True, False], [False, False]])
    assert contrastive_accuracy(query, key, queue, excluded=excluded).item() == pytest.approx(1)


def test_synthetic_negatives_by_hand():
    a, b, c = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
    queue = torch.tensor([a, b, c])
    query = torch.tensor([[0.8, 0.6, 0.0], [0.0, 0.6, 0.8]], requires_grad=True)
    # hardest two in order: (a, b) and (c, b). The pair mixes ranks 0 and 1 with a = 0.25; the query rank 1, b = 0.8 / 2
    uniform = torch.tensor([[0.1, 0.9, 0.25, 0.6, 0.8]] * 2)
    mixed = mix_hard_negatives(query, queue, uniform, hardest=2, pairs=1, with_query=1)
    norm = math.sqrt(0.25**2 + 0.75**2)
    assert mixed[0, 0].tolist() == pytest.approx([0.25 / norm, 0.75 / norm, 0.0])
    assert mixed[1, 0].tolist() == pytest.approx([0.0, 0.75 / norm, 0.25 / norm])
    for row, raw in ((0, [0.4 * 0.8, 0.4 * 0.6 + 0.6, 0.0]), (1, [0.0, 0.4 * 0.6 + 0.6, 0.4 * 0.8])):
        norm = math.hypot(*raw)
        assert mixed[row, 1].tolist() == pytest.approx([value / norm for value in raw])
    assert not mixed.requires_grad
    # without a the hardest two of the first query are b and c
    excluded = torch.tensor([[True, False, False], [False, False, False]])
    mixed = mix_hard_negatives(query, queue, uniform, hardest=2, pairs=1, with_query=1, excluded=excluded)
    norm = math.sqrt(0.25**2 + 0.75**2)
    assert mixed[0, 0].tolist() == pytest.approx([0.0, 0.25 / norm, 0.75 / norm])


def test_the_querys_share_is_below_one_half():
    query = unit_vectors(1, 8)
    queue = -query  # a share of one half or more would change the sign
    uniform = torch.tensor([[0.0, 0.999, 0.0, 0.999]])
    mixed = mix_hard_negatives(query, queue, uniform[:, [0, 1, 2, 3]], hardest=1, pairs=0, with_query=2)
    assert torch.allclose(mixed, queue.expand(1, 2, 8))


def test_similarities_are_computed_in_float32_under_autocast():
    z = unit_vectors(4, 2, 16).float()
    exact = nt_xent(z, z, 0, temperature=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nt_xent(z, z, 0, temperature=0.05), exact)
        z.requires_grad_(True)
        in_chunks = nt_xent(z, z, 0, temperature=0.05, max_entries=8)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (in_chunks, nt_xent(z, z, 0, temperature=0.05))]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)
    half = z.detach().bfloat16()
    value = nt_xent(half, half, 0, temperature=0.05)
    assert value.dtype == torch.float32
    assert torch.equal(value, nt_xent(half.float(), half.float(), 0, temperature=0.05))


def test_bad_arguments_raise_with_their_key():
    z = unit_vectors(1, 2, 4)
    for loss in (nt_xent, dcl, dclw):
        with pytest.raises(ValueError, match=r"data\.batch_size.*at least 2 images"):
            loss(z, z, 0, temperature=T)
    with pytest.raises(ValueError, match=r"data\.batch_size.*at least 2 images"):
        info_nce(z[:, 0], z[:, 1], 0, temperature=T)
    with pytest.raises(ValueError, match="two views"):
        dclw(unit_vectors(2, 3, 4), unit_vectors(2, 3, 4), 0, temperature=T)
    with pytest.raises(ValueError, match=r"hardest=4.*queue's size 3"):
        mix_hard_negatives(z[0], unit_vectors(3, 4), torch.zeros(2, 3), hardest=4, pairs=1, with_query=0)
