from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch

from src.evaluation import linear
from src.evaluation.features import FeatureSet, FeatureSets
from src.evaluation.linear import LinearProbe
from tests.evaluation.toy import random_rows

CPU = torch.device("cpu")


def problem(rows: int, width: int, classes: int, noise: float, seed: int = 0) -> FeatureSet:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    centers = random_rows(classes, width, seed=99)
    return FeatureSet(centers[labels] + noise * torch.randn(rows, width, generator=generator), labels)


def solve(features: np.ndarray, labels: np.ndarray, classes: int, l2: float) -> np.ndarray:
    """The same problem in double precision, by another solver."""
    rows, width = features.shape
    design = np.concatenate([features, np.ones((rows, 1))], axis=1)
    targets = np.eye(classes)[labels]
    decay = np.full((width + 1, 1), l2)
    decay[-1] = 0

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(width + 1, classes)
        logits = design @ weights
        log_total = scipy.special.logsumexp(logits, axis=1, keepdims=True)
        loss = -((logits - log_total) * targets).sum() / rows + 0.5 * (decay * weights**2).sum()
        gradient = design.T @ (np.exp(logits - log_total) - targets) / rows + decay * weights
        return loss, gradient.ravel()

    start = np.zeros((width + 1) * classes)
    options = {"maxiter": 10_000, "gtol": 1e-10}
    return scipy.optimize.minimize(value, start, jac=True, method="BFGS", options=options).x.reshape(width + 1, classes)


@pytest.mark.parametrize("l2", [0.3, 0.01])
@pytest.mark.parametrize("chunk", [2**25, 21])
def test_finds_the_minimizer(l2: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_CHUNK_ELEMENTS", chunk)  # 21 elements: 7 rows of 3 classes at a time
    bank = problem(80, 5, 3, noise=2.0)
    weights = LinearProbe(tolerance=1e-7).fit(bank.features, bank.labels, 3, l2)
    expected = solve(bank.features.double().numpy(), bank.labels.numpy(), 3, l2)
    # the loss does not see a constant added to all biases
    weights[-1] -= weights[-1].mean()
    expected[-1] -= expected[-1].mean()
    np.testing.assert_allclose(weights.numpy(), expected, atol=2e-4)


def test_the_way_to_the_minimum_does_not_matter() -> None:
    bank = problem(80, 5, 3, noise=2.0)
    probe = LinearProbe(tolerance=1e-7)
    cold = probe.fit(bank.features, bank.labels, 3, 0.01)
    warm = probe.fit(bank.features, bank.labels, 3, 0.01, start=random_rows(6, 3, 5))
    np.testing.assert_allclose((cold[:-1] - warm[:-1]).numpy(), 0, atol=2e-4)


def test_scale_and_shift_of_the_features_do_not_matter() -> None:
    bank, query = problem(200, 6, 4, noise=1.5, seed=0), problem(100, 6, 4, noise=1.5, seed=1)
    scale, shift = torch.logspace(-1, 3, 6), torch.linspace(-5, 5, 6)
    plain = LinearProbe().score(FeatureSets(bank, query), CPU)
    moved = LinearProbe().score(
        FeatureSets(
            FeatureSet(bank.features * scale + shift, bank.labels),
            FeatureSet(query.features * scale + shift, query.labels),
        ),
        CPU,
    )
    assert moved["linear_l2"] == plain["linear_l2"]
    assert moved["linear_top1"] == pytest.approx(plain["linear_top1"], abs=0.011)  # one query of 100
    assert 0.5 < plain["linear_top1"] < 1


def test_strength_is_chosen_for_held_out_accuracy() -> None:
    # 80 % of one class: shrunk to nothing the classifier says that class always, and only the weak one separates
    labels = (torch.arange(200) % 5 == 0).long()
    bank = FeatureSet((labels[:, None] * 4.0 + random_rows(200, 1, 0)), labels)
    scores = LinearProbe(l2=(1e-3, 100.0)).score(FeatureSets(bank, bank), CPU)
    assert scores["linear_l2"] == 1e-3
    assert scores["linear_top1"] > 0.95
    shrunk = LinearProbe(l2=(100.0,)).score(FeatureSets(bank, bank), CPU)
    assert shrunk["linear_top1"] == pytest.approx(0.8)


def test_of_equally_good_strengths_the_strongest() -> None:
    labels = torch.arange(60) % 3
    bank = FeatureSet(10 * torch.eye(3)[labels] + 0.01 * random_rows(60, 3, 0), labels)
    assert LinearProbe(l2=(1e-4, 1e-2, 1e-3)).score(FeatureSets(bank, bank), CPU) == {
        "linear_top1": 1.0,
        "linear_l2": 1e-2,
    }


def test_hyperparameters_do_not_depend_on_queries() -> None:
    bank, query = problem(150, 20, 3, noise=4.0), problem(60, 20, 3, noise=4.0, seed=1)
    wrong = FeatureSet(query.features, (query.labels + 1) % 3)
    probe = LinearProbe(l2=(1e-4, 1e-2, 1e-1, 1.0))
    found, other = (probe.score(FeatureSets(bank, judged), CPU) for judged in (query, wrong))
    assert found["linear_l2"] == other["linear_l2"]


def test_repeats_itself_and_leaves_random_numbers_alone() -> None:
    sets = FeatureSets(problem(150, 20, 3, noise=4.0), problem(60, 20, 3, noise=4.0, seed=1))
    before = torch.get_rng_state()
    assert LinearProbe().score(sets, CPU) == LinearProbe().score(sets, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_dead_dimensions_and_classes_missing_from_the_bank() -> None:
    bank = problem(40, 4, 2, noise=0.1)
    bank.features[:, 2] = 7.0
    query = FeatureSet(bank.features[:4], torch.tensor([5, *bank.labels[1:4]]))
    assert LinearProbe().score(FeatureSets(bank, query), CPU)["linear_top1"] == 0.75


@pytest.mark.parametrize("options", [{"l2": ()}, {"l2": (0.0,)}, {"held_out": 1.0}])
def test_refuses_what_makes_no_sense(options: dict) -> None:
    with pytest.raises(ValueError, match="LinearProbe"):
        LinearProbe(**options)


def pooled(noise: float = 1.0) -> FeatureSets:
    """A pool of noise, one that says the class and one that says it in both: what can be learned is in the latter."""
    labels = torch.arange(150) % 3
    noisy = {name: random_rows(150, 4, seed) for name, seed in (("bank", 0), ("query", 1))}
    telling = {
        name: 4 * torch.eye(3)[labels] + noise * random_rows(150, 3, seed) for name, seed in (("bank", 2), ("query", 3))
    }

    def sets(of: dict) -> FeatureSets:
        return FeatureSets(*(FeatureSet(of[name], labels) for name in ("bank", "query")))

    plain = sets(noisy)
    return FeatureSets(plain.bank, plain.query, {"noise": plain, "telling": sets(telling)})


def test_pools_and_strengths_are_one_grid_chosen_on_the_bank() -> None:
    sets = pooled()
    pools = {name: (lambda features: features.embedding) for name in ("noise", "telling")}
    found = LinearProbe(l2=[0.01, 0.1], readouts=pools, name="lineargrid").score(sets, CPU)
    alone = LinearProbe(l2=[0.01, 0.1]).score(sets.readouts["telling"], CPU)
    assert found == {"lineargrid_top1": alone["linear_top1"], "lineargrid_l2": alone["linear_l2"], "lineargrid_pool": 1}
    assert LinearProbe(l2=[0.1]).score(sets, CPU)["linear_top1"] < 0.5  # without a grid of pools: what there is
    # queries by which the other pool were the better one
    swapped = FeatureSets(sets.bank, sets.query, dict(sets.readouts))
    swapped.readouts["telling"].query.features.zero_()
    assert LinearProbe(l2=[0.1], readouts=pools).score(swapped, CPU)["linear_pool"] == 1


def test_of_equally_good_pools_the_first() -> None:
    labels = torch.arange(60) % 3
    same = FeatureSets(*(FeatureSet(10 * torch.eye(3)[labels], labels),) * 2)
    pools = {name: (lambda features: features.embedding) for name in ("one", "two")}
    sets = FeatureSets(same.bank, same.query, {"one": same, "two": same})
    assert LinearProbe(l2=[1e-2], readouts=pools).score(sets, CPU) == {
        "linear_top1": 1.0,
        "linear_l2": 1e-2,
        "linear_pool": 0.0,
    }
