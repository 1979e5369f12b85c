"""Region and boundary worked by hand, as DAVIS counts them."""

from __future__ import annotations

import numpy as np
import pytest

from src.evaluation.masks import boundary, boundary_f, jaccard


def square(top: int, left: int, side: int, size: int = 20) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_regions_by_hand() -> None:
    """Squares of 4 x 4 that share 2 columns: 8 of 24 pixels."""
    assert jaccard(square(4, 4, 4), square(4, 6, 4)) == pytest.approx(8 / 24)
    empty = np.zeros((20, 20), bool)
    assert (jaccard(empty, empty), jaccard(empty, square(0, 0, 2))) == (1.0, 0.0)


def test_a_boundary_is_one_pixel_wide_and_not_at_the_border_of_the_image() -> None:
    found = boundary(square(1, 1, 2, size=4))
    # pixels that differ from the one to the right, below, or to the right below
    assert found.astype(int).tolist() == [[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    half = np.zeros((4, 4), bool)
    half[:, :2] = True
    assert boundary(half).astype(int).tolist() == [[0, 1, 0, 0]] * 4


def test_boundaries_within_the_tolerance_fit() -> None:
    """Half images of 20 x 20, their edges d columns apart: ceil(0.008 * 28.3) is 1 pixel."""
    edges = [np.arange(20)[None, :].repeat(20, 0) < edge for edge in (8, 9, 10)]
    assert boundary_f(edges[0], edges[0]) == 1
    assert boundary_f(edges[0], edges[1]) == 1
    assert boundary_f(edges[0], edges[2]) == 0
    assert boundary_f(edges[0], edges[2], tolerance=0.04) == 1  # ceil(1.13)


def test_precision_and_recall_by_hand() -> None:
    """The truth has an edge of 20 pixels. So has the prediction, with another one of 20 far from it: 1/2 and 1."""
    columns = np.arange(20)[None, :].repeat(20, 0)
    truth, predicted = columns < 5, (columns < 5) | (columns >= 15)
    assert boundary_f(predicted, truth) == pytest.approx(2 * 0.5 / 1.5)
    assert boundary_f(truth, predicted) == pytest.approx(2 * 0.5 / 1.5)


def test_no_boundary_fits_no_boundary_alone() -> None:
    empty, full = np.zeros((6, 6), bool), np.ones((6, 6), bool)
    assert boundary_f(empty, full) == 1
    assert boundary_f(empty, square(2, 2, 2, size=6)) == boundary_f(square(2, 2, 2, size=6), full) == 0
