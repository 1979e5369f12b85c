"""The scenes are hard enough: pixels do not tell the kind, nuisances tell nothing. Small scale; docs have the large."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from benchmarks import headroom
from benchmarks.headroom import SceneSplit

CLASSES = 10
CLASSIFIERS = {"knn": headroom.knn, "linear": partial(headroom.linear, classes=CLASSES)}


@pytest.fixture(scope="module")
def train() -> SceneSplit:
    return headroom.load("train", 2000, 32, None)


@pytest.fixture(scope="module")
def test() -> SceneSplit:
    return headroom.load("val", 600, 32, None)


def _bound(count: int, share: float = 1 / CLASSES, deviations: float = 4.0) -> float:
    """Percent that a guesser of ``share`` exceeds on ``count`` images less than once in thirty thousand times."""
    return 100.0 * (share + deviations * math.sqrt(share * (1 - share) / count))


def test_labels_are_balanced(train: SceneSplit) -> None:
    counts = torch.bincount(train.labels, minlength=CLASSES)
    spread = 4.0 * math.sqrt(2000 * 0.1 * 0.9)
    assert (counts - 200).abs().max() < spread


def test_pixels_tell_something_but_little(train: SceneSplit, test: SceneSplit) -> None:
    """Above chance, so that the label is in the pixels at all; at 2000 images well below the 35 % of the target."""
    flat, flat_test = (split.images.flatten(1).float() / 255 for split in (train, test))
    found = headroom.accuracy(headroom.knn(flat, train.labels, flat_test), test.labels)
    assert _bound(600, deviations=2.0) < found < 35.0


@pytest.mark.parametrize("classifier", ["knn", "linear"])
def test_nuisances_tell_nothing(train: SceneSplit, test: SceneSplit, classifier: str) -> None:
    predict = CLASSIFIERS[classifier]
    found = headroom.nuisances(test)
    for name, values in headroom.nuisances(train).items():
        # more dimensions than kNN can use are still fair: an informed one would show
        scale = values.std(0).clamp_min(1e-6)
        predicted = predict(values / scale, train.labels, found[name] / scale)
        assert headroom.accuracy(predicted, test.labels) < _bound(600), name


def test_a_leak_would_be_seen(train: SceneSplit, test: SceneSplit) -> None:
    """The same classifiers do find the label where it is leaked, weakly, into a nuisance."""
    generator = torch.Generator().manual_seed(0)
    leaks = [
        (split.labels[:, None] == torch.arange(CLASSES)).float()
        + torch.randn(len(split.labels), CLASSES, generator=generator)
        for split in (train, test)
    ]
    for predict in CLASSIFIERS.values():
        found = headroom.accuracy(predict(leaks[0], train.labels, leaks[1]), test.labels)
        assert found > 1.5 * _bound(600)


def test_knn_votes_by_weighted_cosine() -> None:
    """Worked by hand: similarities 1, 0.8, 0.6 to classes 0, 1, 1; a low temperature trusts the nearest, a high one
    the majority."""
    train = torch.tensor([[2.0, 0.0], [0.8, 0.6], [0.6, 0.8], [-1.0, 0.0]])
    labels, test = torch.tensor([0, 1, 1, 0]), torch.tensor([[3.0, 0.0]])
    for temperature, expected in ((0.07, 0), (1.0, 1)):
        assert math.exp(1 / temperature) > math.exp(0.8 / temperature) + math.exp(0.6 / temperature) or expected
        assert headroom.knn(train, labels, test, k=3, temperature=temperature).tolist() == [expected]


def test_one_frame_of_a_film_does_not_tell_its_action() -> None:
    """At chance; that all frames say more is shown by the command's table."""
    train, test = (headroom.load_films(split, count, 16, 1 / 6) for split, count in (("train", 800), ("val", 400)))
    assert train.images.shape == (800, 1, 3, 16, 16)
    flat, flat_test = (clips.images.flatten(1).float() / 255 for clips in (train, test))
    for predict in CLASSIFIERS.values():
        found = headroom.accuracy(predict(flat, train.labels, flat_test), test.labels)
        assert found < _bound(400)


def test_of_a_film_shown_by_one_frame_nothing_moves() -> None:
    films = torch.arange(2 * 3).view(2, 3, 1).expand(2, 3, 4)
    assert headroom.one_frame(films, torch.tensor([2, 0])).tolist() == [[[2] * 4] * 3, [[3] * 4] * 3]
