"""How images and texts lie on the sphere, against values by hand and against all pairs at once in double precision."""

import math

import pytest
import torch

from src.evaluation.geometry import geometry, separability, uniformity
from tests.evaluation.toy import random_rows


def units(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(random_rows(rows, width, seed), dim=1)


def test_two_pairs_by_hand():
    """Images at right angles; each text is its image, turned by 60 degrees towards a third axis."""
    image = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    half, rest = 0.5, math.sqrt(0.75)
    text = torch.tensor([[half, 0.0, rest], [0.0, half, rest]])
    found = geometry(image, text)
    assert found["positive_cosine"] == pytest.approx(0.5)
    assert found["alignment"] == pytest.approx(2 - 2 * 0.5)
    assert found["uniformity_image"] == pytest.approx(-2 * 2)  # squared distance 2
    assert found["uniformity_text"] == pytest.approx(-2 * (2 - 2 * 0.75))
    assert found["cross_uniformity"] == pytest.approx(-2 * 2)
    assert found["alignment"] == pytest.approx(2 - 2 * found["positive_cosine"])


def test_any_chunks_give_what_all_pairs_at_once_do():
    one, other = units(37, 5, 0), units(37, 5, 1)
    distances = torch.cdist(one.double(), other.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    expected = (-2 * distances[~torch.eye(37, dtype=torch.bool)]).exp().mean().log().item()
    within = torch.pdist(one.double()).square().mul(-2).exp().mean().log().item()
    for chunk in (1, 10, 37, 512):
        assert uniformity(one, other, chunk=chunk) == pytest.approx(expected, abs=1e-6)
        assert uniformity(one, one, chunk=chunk) == pytest.approx(within, abs=1e-6)


def test_modalities_apart_are_told_apart_and_mixed_ones_are_not():
    one, other = units(500, 8, 0), units(500, 8, 1)
    assert separability(one, other) == pytest.approx(0.5, abs=0.1)
    away = torch.nn.functional.normalize(other + 4 * torch.eye(8)[0], dim=1)
    assert separability(one, away) > 0.97
    assert separability(one, away) == separability(one, away)


def test_it_is_judged_on_pairs_that_were_not_fitted():
    """In 600 dimensions a plane parts any 400 points, however mixed; others it does not."""
    assert separability(units(200, 600, 0), units(200, 600, 1)) < 0.75


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match=r"at least two pairs; got \[1, 4\]"):
        geometry(units(1, 4, 0), units(1, 4, 1))
    with pytest.raises(ValueError, match=r"got \[3, 4\] and \[2, 4\]"):
        geometry(units(3, 4, 0), units(2, 4, 1))
