import math

import pytest
import torch

from src.models.losses.distillation import (
    cross_view_cross_entropy,
    divergence,
    effective_prototypes,
    entropy,
    masked_patch_cross_entropy,
    sharpen,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cross_entropy(target: torch.Tensor, logits: torch.Tensor, temperature: float) -> float:
    total = sum(math.exp(float(value) / temperature) for value in logits)
    pairs = zip(target, logits, strict=True)
    return -sum(float(t) * (float(value) / temperature - math.log(total)) for t, value in pairs)


def test_the_teacher_is_centered_and_sharpened():
    target = sharpen(torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([0.5, 1.0]), 0.5)
    # (0.5, 1.0) / 0.5 = (1, 2)
    assert target.tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])
    assert not target.requires_grad


def test_the_loss_is_the_mean_over_pairs_of_a_target_and_another_view():
    targets, logits = randn(3, 2, 4).softmax(dim=-1), randn(3, 5, 4, seed=1)
    terms = [
        sum(cross_entropy(targets[b, q], logits[b, v], 0.1) for b in range(3)) / 3
        for q in range(2)
        for v in range(5)
        if v != q
    ]
    assert len(terms) == 8
    assert cross_view_cross_entropy(targets, logits, 0.1).item() == pytest.approx(sum(terms) / 8, rel=1e-10)


def test_a_view_does_not_answer_its_own_target():
    targets, logits = randn(5, 1, 4).softmax(dim=-1), randn(5, 3, 4, seed=1).requires_grad_(True)
    cross_view_cross_entropy(targets, logits, 0.1).backward()
    assert logits.grad[:, 0].abs().max() == 0
    assert logits.grad[:, 1:].abs().min() > 0


@pytest.mark.parametrize(("targets", "views"), [(1, 1), (3, 2), (0, 2)])
def test_targets_without_other_views_are_refused(targets, views):
    with pytest.raises(ValueError, match=f"{targets} targets"):
        cross_view_cross_entropy(torch.zeros(1, targets, 2), torch.zeros(1, views, 2), 0.1)


def test_masked_patches_are_averaged_within_their_image_first():
    mask = torch.tensor([[True, False, True, True], [False] * 4, [False, False, False, True]])
    targets, logits = randn(3, 4, 5).softmax(dim=-1), randn(3, 4, 5, seed=1)
    expected = 0.0
    for b in range(3):
        terms = [cross_entropy(targets[b, n], logits[b, n], 0.1) for n in range(4) if mask[b, n]]
        expected += sum(terms) / max(len(terms), 1) / 3
    loss = masked_patch_cross_entropy(targets[mask], logits[mask], mask, 0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # the weights come from a boolean mask in float32


def test_without_masked_patches_the_loss_is_zero_with_a_gradient():
    logits = randn(2, 3, 5).requires_grad_(True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss = masked_patch_cross_entropy(logits.detach()[mask], logits[mask], mask, 0.1)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.abs().max() == 0


def test_entropy_divergence_and_effective_prototypes_by_hand():
    one_hot, even = torch.eye(4), torch.full((3, 4), 0.25)
    assert entropy(one_hot).item() == 0.0
    assert entropy(even).item() == pytest.approx(math.log(4))
    assert effective_prototypes(one_hot.mean(dim=0)).item() == pytest.approx(4.0)
    assert effective_prototypes(one_hot[0]).item() == 1.0
    targets, logits = randn(3, 4).softmax(dim=-1), randn(3, 4, seed=1)
    gap = cross_view_cross_entropy(targets[:, None], torch.stack([logits, logits], dim=1), 0.5) - entropy(targets)
    assert divergence(targets, logits, 0.5).item() == pytest.approx(gap.item(), rel=1e-10)
    assert divergence(targets, 0.5 * targets.log(), 0.5).item() == pytest.approx(0.0, abs=1e-12)
