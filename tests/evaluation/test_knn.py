from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from src.evaluation.features import FeatureSet, FeatureSets
from src.evaluation.knn import KNN
from tests.evaluation.toy import random_rows

CPU = torch.device("cpu")


def brute_force(sets: FeatureSets, k: int, temperature: float) -> list[int]:
    """One query and one bank row after the other, in double precision."""
    bank, query = (np.asarray(part.features, np.float64) for part in (sets.bank, sets.query))
    predicted = []
    for q in query:
        cosines = [float(q @ b) / math.sqrt(float(q @ q) * float(b @ b)) for b in bank]
        nearest = sorted(range(len(bank)), key=lambda row: (-cosines[row], row))[:k]
        votes = [0.0] * sets.classes
        for row in nearest:
            votes[int(sets.bank.labels[row])] += math.exp(cosines[row] / temperature)
        predicted.append(votes.index(max(votes)))
    return predicted


def labelled(features: torch.Tensor, classes: int, seed: int) -> FeatureSet:
    labels = torch.randint(classes, (len(features),), generator=torch.Generator().manual_seed(seed))
    labels[0] = classes - 1
    return FeatureSet(features, labels)


@pytest.mark.parametrize(("query_chunk", "bank_chunk"), [(512, 8192), (7, 13), (1, 1), (10, 150), (3, 149)])
def test_agrees_with_brute_force_across_chunks(query_chunk: int, bank_chunk: int) -> None:
    sets = FeatureSets(
        bank=labelled(random_rows(150, 6, seed=0) + 0.3, 5, seed=1),
        query=labelled(random_rows(20, 6, seed=2), 5, seed=3),
    )
    evaluator = KNN(k=(11, 1), temperature=0.1, query_chunk=query_chunk, bank_chunk=bank_chunk)
    predicted = evaluator.predict(sets, CPU)
    for k in (11, 1):
        assert predicted[k].tolist() == brute_force(sets, k, 0.1)


@pytest.mark.parametrize(("query_chunk", "bank_chunk"), [(512, 8192), (5, 17), (50, 3)])
def test_ties_go_to_the_earlier_sample_and_the_smaller_class(query_chunk: int, bank_chunk: int) -> None:
    # rows of +-1 of length 4: all cosines are multiples of 1/8, exact in float32, and tie all the time
    bank, query = (random_rows(rows, 16, seed=rows).sign() for rows in (120, 50))
    sets = FeatureSets(bank=labelled(bank, 4, seed=0), query=labelled(query, 4, seed=1))
    cosines = (query @ bank.T / 16).sort(dim=1, descending=True).values
    assert (cosines[:, 6] == cosines[:, 7]).float().mean() > 0.5  # the last place is contested
    evaluator = KNN(k=(7, 2), temperature=0.5, query_chunk=query_chunk, bank_chunk=bank_chunk)
    predicted = evaluator.predict(sets, CPU)
    for k in (7, 2):
        assert predicted[k].tolist() == brute_force(sets, k, 0.5)


def test_the_bank_of_equal_rows_decides_by_its_first() -> None:
    sets = FeatureSets(
        bank=FeatureSet(torch.ones(6, 3), torch.tensor([2, 2, 1, 1, 1, 1])),
        query=FeatureSet(torch.ones(1, 3), torch.tensor([0])),
    )
    predicted = KNN(k=(2, 4, 6), bank_chunk=4).predict(sets, CPU)
    assert [predicted[k].item() for k in (2, 4, 6)] == [2, 1, 1]  # 2 votes; 2 : 2, the smaller class; 2 : 4


def test_temperature_weighs_near_against_many() -> None:
    # one neighbor at cosine 1 against two at cosine 1/2: e < 2 sqrt(e), but e^(1/0.07) > 2 e^(0.5/0.07)
    half = math.sqrt(3) / 2
    sets = FeatureSets(
        bank=FeatureSet(torch.tensor([[1.0, 0.0], [0.5, half], [0.5, -half]]), torch.tensor([1, 0, 0])),
        query=FeatureSet(torch.tensor([[2.0, 0.0]]), torch.tensor([1])),
    )
    assert KNN(k=3, temperature=1.0).predict(sets, CPU)[3].item() == 0
    assert KNN(k=3, temperature=0.07).predict(sets, CPU)[3].item() == 1


def test_more_neighbors_than_the_bank_has_means_all_of_it() -> None:
    sets = FeatureSets(bank=labelled(random_rows(9, 4, 0), 3, 0), query=labelled(random_rows(30, 4, 1), 3, 1))
    predicted = KNN(k=(9, 50), bank_chunk=4).predict(sets, CPU)
    assert torch.equal(predicted[9], predicted[50])


def test_accuracy_is_the_share_of_right_predictions() -> None:
    sets = FeatureSets(
        bank=FeatureSet(torch.eye(3), torch.tensor([0, 1, 2])),
        query=FeatureSet(torch.eye(3).repeat(2, 1)[:4], torch.tensor([0, 1, 1, 2])),
    )
    assert KNN(k=(1, 3)).score(sets, CPU) == {"knn_top1": 0.5, "knn3_top1": 0.5}


def test_small_temperatures_do_not_overflow() -> None:
    sets = FeatureSets(
        bank=FeatureSet(torch.eye(2), torch.tensor([0, 1])), query=FeatureSet(torch.eye(2), torch.tensor([0, 1]))
    )
    assert KNN(k=2, temperature=1e-3).score(sets, CPU) == {"knn_top1": 1.0}


def test_half_precision_features_are_compared_in_single() -> None:
    features = random_rows(40, 8, 0)
    sets = FeatureSets(bank=labelled(features.half(), 3, 0), query=labelled(features[:10].half(), 3, 1))
    assert KNN(k=5).predict(sets, CPU)[5].tolist() == brute_force(sets, 5, 0.07)


@pytest.mark.parametrize("options", [{"k": 0}, {"k": ()}, {"temperature": 0.0}, {"bank_chunk": 0}])
def test_refuses_what_makes_no_sense(options: dict) -> None:
    with pytest.raises(ValueError, match="KNN"):
        KNN(**options)
