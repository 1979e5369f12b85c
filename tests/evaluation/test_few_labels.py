"""Which samples are chosen, what is learned from them, and how sure one may be."""

from __future__ import annotations

import pytest
import torch

from src.errors import SettingError
from src.evaluation.features import FeatureSet, FeatureSets
from src.evaluation.few_labels import FewShot, LowShot, interval, nearest_mean
from src.evaluation.linear import LinearProbe
from tests.evaluation.test_linear import problem

CPU = torch.device("cpu")


def test_the_nearest_mean_by_hand() -> None:
    """Lengths do not count, and class 1 has no sample."""
    bank = FeatureSet(torch.tensor([[9.0, 0.0], [0.0, 0.1], [0.0, 7.0]]), torch.tensor([0, 2, 0]))
    query = torch.tensor([[1.0, 0.1], [-0.1, 3.0], [-5.0, -5.0]])
    # class 0 points to (1, 1), class 2 to (0, 1)
    assert nearest_mean(bank, query, 3, CPU).tolist() == [0, 2, 2]


def test_an_interval_by_hand() -> None:
    """Two values 0 and 1: deviation sqrt(1/2), error 1/2, and t of one degree of freedom is tan(0.475 pi)."""
    mean, half = interval([0.0, 1.0])
    assert (mean, half) == (0.5, pytest.approx(12.7062 / 2, rel=1e-5))
    assert interval([0.3, 0.3, 0.3]) == (pytest.approx(0.3), 0.0)


def test_more_shots_are_better_and_the_numbers_repeat_themselves() -> None:
    sets = FeatureSets(problem(300, 8, 4, noise=2.5), problem(200, 8, 4, noise=2.5, seed=1))
    found = FewShot(shots=(1, 20), trials=3).score(sets, CPU)
    assert list(found) == [
        f"fewshot{shots}_{name}_top1{end}"
        for shots in (1, 20)
        for name in ("nearest", "logistic")
        for end in ("", "_ci95")
    ]
    for name in ("nearest", "logistic"):
        assert found[f"fewshot20_{name}_top1"] > found[f"fewshot1_{name}_top1"] + 0.1
        assert found[f"fewshot1_{name}_top1_ci95"] > 0
    assert FewShot(shots=(1, 20), trials=3).score(sets, CPU) == found
    assert FewShot(shots=(1,), trials=3, seed=1).score(sets, CPU) != {key: found[key] for key in list(found)[:4]}


def test_a_class_with_too_few_samples_is_named() -> None:
    bank = FeatureSet(torch.eye(5), torch.tensor([0, 0, 1, 1, 4]))
    with pytest.raises(SettingError, match=r"1 samples of class 4 where 2 are needed.*bank_samples.*fewshot.shots"):
        FewShot(shots=(1, 2)).score(FeatureSets(bank, bank), CPU)
    query = FeatureSet(torch.eye(5)[:1], torch.tensor([3]))
    with pytest.raises(SettingError, match="0 samples of class 3"):
        FewShot(shots=(1,)).score(FeatureSets(bank, query), CPU)


def test_a_share_of_the_bank_is_of_each_class_and_judged_by_the_linear_probe() -> None:
    bank, query = problem(200, 6, 4, noise=2.0), problem(100, 6, 4, noise=2.0, seed=1)
    seen = []

    class Spy(LinearProbe):
        def score(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
            seen.append(sets.bank.labels)
            return super().score(sets, device)

    found = LowShot(percent=(10, 0.1, 100), probe=Spy(l2=[0.1])).score(FeatureSets(bank, query), CPU)
    counts = torch.bincount(bank.labels)
    assert torch.bincount(seen[0]).tolist() == [round(0.1 * count) for count in counts.tolist()]
    assert torch.bincount(seen[1]).tolist() == [1] * 4
    assert list(found) == ["lowshot10_top1", "lowshot0.1_top1", "lowshot100_top1"]
    assert found["lowshot100_top1"] == LinearProbe(l2=[0.1]).score(FeatureSets(bank, query), CPU)["linear_top1"]


@pytest.mark.parametrize(
    "make",
    [lambda: FewShot(shots=()), lambda: FewShot(trials=1), lambda: LowShot(percent=(0,)), lambda: LowShot((200,))],
)
def test_refuses_what_makes_no_sense(make: object) -> None:
    with pytest.raises(ValueError, match="Shot"):
        make()  # type: ignore[operator]
