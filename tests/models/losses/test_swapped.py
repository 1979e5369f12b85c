import math

import pytest
import torch

from src.models.losses.swapped import check_sample_count, sinkhorn, swapped_prediction


def cosines(samples: int, prototypes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(samples, prototypes, generator=generator, dtype=torch.float64) * 2 - 1


def test_one_iteration_by_hand():
    ratio = 3.0
    scores = torch.tensor([[math.log(ratio), 0.0], [0.0, 0.0]])
    # exp: [[3, 1], [1, 1]]; prototypes' totals 4 and 2 -> [[3/4, 1/2], [1/4, 1/2]]; samples' totals 5/4 and 3/4
    codes = sinkhorn(scores, eps=1.0, iterations=1)
    assert codes.tolist() == [pytest.approx([3 / 5, 2 / 5]), pytest.approx([1 / 3, 2 / 3])]


def test_it_is_the_authors_loop_in_float64():
    scores = cosines(6, 4)
    q = (scores / 0.05).exp().T
    q /= q.sum()
    for _ in range(3):
        for k in range(4):
            q[k] /= q[k].sum() * 4
        for b in range(6):
            q[:, b] /= q[:, b].sum() * 6
    assert torch.allclose(sinkhorn(scores), (q * 6).T, rtol=1e-10, atol=1e-14)


def test_codes_sum_to_one_and_use_prototypes_equally_in_the_end():
    scores = cosines(12, 4)
    codes = sinkhorn(scores, eps=0.3, iterations=200)
    assert torch.allclose(codes.sum(dim=1), torch.ones(12, dtype=torch.float64))
    assert torch.allclose(codes.sum(dim=0), torch.full((4,), 3.0, dtype=torch.float64))
    assert torch.allclose(sinkhorn(scores).sum(dim=1), torch.ones(12, dtype=torch.float64))
    assert torch.allclose(sinkhorn(scores, iterations=0), (scores / 0.05).softmax(dim=1))  # nothing balanced


def test_half_precision_does_not_overflow():
    scores = cosines(8, 4).half()
    codes = sinkhorn(scores)
    assert codes.dtype == torch.float32
    assert torch.isfinite(codes).all()
    assert torch.allclose(codes, sinkhorn(scores.float()))


def test_each_crop_predicts_the_codes_of_the_others():
    codes = cosines(4, 3)[:, None].expand(4, 2, 3).softmax(dim=-1)
    scores = torch.stack([cosines(4, 3).roll(v, 0) for v in (0, 1, 2)], dim=1)
    log_p = (scores / 0.1).log_softmax(dim=-1)
    of_first = [-(codes[:, 0] * log_p[:, v]).sum(dim=1).mean() for v in (1, 2)]
    of_second = [-(codes[:, 1] * log_p[:, v]).sum(dim=1).mean() for v in (0, 2)]
    expected = (sum(of_first) / 2 + sum(of_second) / 2) / 2
    assert swapped_prediction(codes, scores).item() == pytest.approx(expected.item(), rel=1e-10)


def test_more_prototypes_than_samples_are_refused():
    check_sample_count(prototypes=8, samples=8)
    with pytest.raises(ValueError, match=r"model\.prototypes=9 .* 8 samples.*data\.batch_size.*model\.queue_size"):
        check_sample_count(prototypes=9, samples=8)
