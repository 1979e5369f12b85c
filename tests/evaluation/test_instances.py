"""Image retrieval against brute force, against torchmetrics, and where scores tie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.retrieval import RetrievalMAP, RetrievalRecall

from src.errors import SettingError
from src.evaluation.features import FeatureSet, FeatureSets
from src.evaluation.retrieval import Instances, ranking, ranks
from tests.evaluation.toy import random_rows

CPU = torch.device("cpu")


def rows(count: int, seed: int) -> FeatureSet:
    """Rows of +-1, whose cosines tie all the time."""
    labels = torch.randint(5, (count,), generator=torch.Generator().manual_seed(seed))
    return FeatureSet(random_rows(count, 4, seed).sign(), labels)


def brute_force(query: FeatureSet, keys: FeatureSet, itself: bool) -> tuple[list[float], list[int]]:
    precisions, first = [], []
    for number, (vector, label) in enumerate(zip(query.features, query.labels, strict=True)):
        others = [key for key in range(len(keys.labels)) if not (itself and key == number)]
        scores = {key: float(normalize(vector, dim=0) @ normalize(keys.features[key], dim=0)) for key in others}
        order = sorted(others, key=lambda key: (-round(scores[key], 4), key))
        hits = [place for place, key in enumerate(order, start=1) if keys.labels[key] == label]
        precisions.append(sum((n + 1) / place for n, place in enumerate(hits)) / len(hits) if hits else 0.0)
        first.append(hits[0] - 1 if hits else -1)
    return precisions, first


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("chunk", [7, 256])
def test_rankings_are_those_of_brute_force_ties_included(itself: bool, chunk: int) -> None:
    query = rows(30, 0)
    keys = query if itself else rows(50, 1)
    vectors = [each.features / 2 for each in (query, keys)]  # of unit length, exactly
    precision, first = ranking(*vectors, query.labels, keys.labels, itself=itself, chunk=chunk)
    expected = brute_force(query, keys, itself)
    assert precision.tolist() == pytest.approx(expected[0])
    assert first.tolist() == expected[1]
    if not itself:
        assert torch.equal(first, ranks(*vectors, query.labels, keys.labels))  # as retrieval by texts counts


def test_numbers_are_those_of_torchmetrics() -> None:
    bank, query = (FeatureSet(random_rows(n, 6, seed), torch.arange(n) % 4) for n, seed in ((40, 0), (15, 1)))
    found = Instances(ks=(1, 5)).score(FeatureSets(bank, query), CPU)
    # torchmetrics takes what scores 0 or less for not found
    scores = 1 + normalize(query.features, dim=1) @ normalize(bank.features, dim=1).T
    owner = torch.arange(15)[:, None].expand(15, 40)
    own = query.labels[:, None] == bank.labels
    flat: list[Tensor] = [scores.flatten(), own.flatten()]
    assert found["instances_map"] == pytest.approx(float(RetrievalMAP()(*flat, indexes=owner.flatten())), abs=1e-6)
    # a query's recall at k is 0 or above, and above where one of its own is among the first k
    for k in (1, 5):
        any_found = [float(RetrievalRecall(top_k=k)(scores[q], own[q], indexes=owner[q])) > 0 for q in range(15)]
        assert found[f"instances_r{k}"] == pytest.approx(sum(any_found) / 15)


def test_a_query_does_not_find_itself() -> None:
    query = FeatureSet(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 1, 0]))
    found = Instances(among_queries=True, ks=(1, 2)).score(FeatureSets(rows(3, 0), query), CPU)
    # queries 0 and 2 find each other behind query 1; query 1 has nothing to find and does not count
    assert found == {"instances_map": 0.5, "instances_r1": 0.0, "instances_r2": 1.0}


def test_nothing_to_find_is_said() -> None:
    query = FeatureSet(torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(SettingError, match="no query has another sample of its class"):
        Instances(among_queries=True).score(FeatureSets(query, query), CPU)
