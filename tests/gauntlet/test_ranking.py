"""z-scores, ranks and correlations, worked by hand and under what must not change them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from src.gauntlet.ranking import Ranking, with_backbones, z_scores

ABOUT = {"date": "2030-01-01", "commit": "abc", "cpu": "a CPU", "cores": 2, "torch": "2", "threads": 1, "others": 0.0}


def row(backbone: str, setting: str, value: float, **more: Any) -> dict[str, Any]:
    facts = {"metric": "top1", "kind": "classification", "adaptation": "frozen", "lower_is_better": False, "seed": 0}
    facts |= {"parameters": 5_500_000, "about": ABOUT}
    return {"backbone": backbone, "setting": setting, "value": value, **facts, **more}


def rows(**settings: dict[str, float]) -> list[dict[str, Any]]:
    return [row(name, setting, value) for setting, each in settings.items() for name, value in each.items()]


FULL = rows(
    knn={"a": 0.1, "b": 0.5, "c": 0.6, "d": 0.2},
    linear={"a": 0.3, "b": 0.2, "c": 0.9, "d": 0.4},
    dense={"a": 11.0, "b": 12.0, "c": 10.0, "d": 30.0},
)


def test_z_scores_have_mean_0_and_population_deviation_1_in_every_setting() -> None:
    z = Ranking(FULL).z
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(z.std(axis=0, ddof=0), 1)
    # by hand: 1, 2 and 6 have mean 3 and squared distances 4, 1 and 9, so the deviation sqrt(14 / 3)
    z = z_scores(pd.DataFrame([[1.0], [2.0], [6.0]]))[0]
    np.testing.assert_allclose(z, np.array([-2, -1, 3]) / np.sqrt(14 / 3))


def test_the_ranking_knows_no_units() -> None:
    expected = Ranking(FULL)
    for setting, (scale, shift) in {"knn": (100, -5), "linear": (1e-3, 2), "dense": (1 / 7, 1e4)}.items():
        moved = [r | {"value": scale * r["value"] + shift} if r["setting"] == setting else r for r in FULL]
        found = Ranking(moved)
        np.testing.assert_allclose(found.z, expected.z, rtol=1e-6, atol=1e-9)
        assert found.order == expected.order


def test_an_error_counts_with_its_sign_turned() -> None:
    error = [row("a", "depth", 0.2, lower_is_better=True), row("b", "depth", 0.4, lower_is_better=True)]
    ranking = Ranking(error)
    assert ranking.z.iloc[:, 0].tolist() == pytest.approx([1, -1])
    assert ranking.raw.iloc[:, 0].tolist() == [0.2, 0.4]
    assert ranking.order == ["a", "b"]


def test_what_is_missing_is_left_out_and_said() -> None:
    ranking = Ranking(rows(knn={"a": 1.0, "b": 3.0, "c": 2.0}, dense={"a": 4.0, "c": 8.0}))
    z = np.sqrt(1.5)
    np.testing.assert_allclose(ranking.z, [[-z, -1], [z, np.nan], [0, 1]], atol=1e-12)
    np.testing.assert_allclose(ranking.overall, [(-z - 1) / 2, z, 0.5])
    assert ranking.coverage.tolist() == [1, 0.5, 1]
    assert ranking.order == ["b", "c", "a"]


def test_equal_scores_are_all_0() -> None:
    assert Ranking(rows(knn={"a": 0.3, "b": 0.3, "c": 0.3})).z.to_numpy().tolist() == [[0], [0], [0]]
    assert Ranking(rows(knn={"a": 0.7})).z.to_numpy().tolist() == [[0]]


def test_seeds_are_averaged_before_anything_else() -> None:
    seeds = [row("a", "knn", 0.2), row("a", "knn", 0.4, seed=1), row("b", "knn", 0.5)]
    ranking = Ranking(seeds)
    assert ranking.raw.iloc[:, 0].tolist() == pytest.approx([0.3, 0.5])
    assert ranking.z.iloc[:, 0].tolist() == pytest.approx([-1, 1])


def test_kinds_are_means_of_their_settings_and_frozen_and_fine_tuned_are_two() -> None:
    scores = [
        *rows(knn={"a": 0, "b": 1}, linear={"a": 0, "b": 1}),
        row("a", "finetune", 1, adaptation="fine-tuned"),
        row("b", "finetune", 0, adaptation="fine-tuned"),
        row("a", "depth", 0.5, kind="dense", lower_is_better=True),
    ]
    kinds = Ranking(scores).kinds
    assert list(kinds) == ["classification, frozen", "classification, fine-tuned", "dense, frozen"]
    assert kinds["classification, frozen"].tolist() == [-1, 1]
    assert kinds["classification, fine-tuned"].tolist() == [1, -1]
    assert kinds["dense, frozen"]["a"] == 0
    assert np.isnan(kinds["dense, frozen"]["b"])


def test_settings_are_compared_by_ranks() -> None:
    """Orders of a, b, c, d: 0 2 3 1, 1 0 3 2 and 1 2 0 3; 1 - 6 sum d^2 / 60, and errors turn around."""
    found = Ranking(FULL).correlation
    np.testing.assert_allclose(found, [[1, 0.4, -0.4], [0.4, 1, -0.4], [-0.4, -0.4, 1]])
    turned = [r | {"lower_is_better": r["setting"] == "knn"} for r in FULL]
    np.testing.assert_allclose(Ranking(turned).correlation.loc["knn"], [1, -0.4, 0.4])
    few = Ranking(rows(knn={"a": 1, "b": 2, "c": 3}, dense={"a": 1, "b": 2}, flat={"a": 1, "b": 1, "c": 1}))
    assert np.isnan(few.correlation.iloc[0, 1:]).all()


def test_backbones_are_experiments_or_else_their_recipes_first_runs() -> None:
    def stored(run: str, made_by: str, **more: Any) -> dict[str, Any]:
        return {"run": run, "experiment": run.split("/")[0].split()[-1], "made_by": made_by, "trained": True, **more}

    scores = [
        stored("mae/x", "recipe", seed=0),
        stored("mae/y", "recipe", seed=1),
        stored("dino/late", "one"),
        stored("dino/early", "one"),
        stored("dino/wide", "two"),
        stored("random mae/x", "architecture", trained=False),
    ]
    found = [each["backbone"] for each in with_backbones(scores)]
    assert found == ["mae", "mae", "dino/early", "dino/early", "dino/wide", "random mae"]
