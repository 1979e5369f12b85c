"""What "clearly" means, what the verdicts say, and one small run from the command to its scores."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import learning
from benchmarks.learning import compare
from tests.commands import SECONDS

ABOUT = {"date": "2030-01-01", "commit": "abc", "cpu": "a CPU", "cores": 2, "torch": "2", "threads": 1, "others": 0.0}


def run(trained: float, random: float, pixels: float, minutes: float = 5.0) -> dict[str, Any]:
    """One whose linear probe is 10 points above its kNN throughout."""
    scores = {"encoder": trained, "random": random, "pixels": pixels}
    return {
        "about": ABOUT,
        "recipe": "r",
        "minutes": minutes,
        "epochs": 20,
        "steps": 3120,
        "scores": {name: {"knn_top1": value, "linear_top1": value + 0.1} for name, value in scores.items()},
    }


def runs_of(name: str, *runs: dict[str, Any]) -> dict[str, Any]:
    return {"runs": {f"{name}/{seed}": each for seed, each in enumerate(runs)}}


class TestClearly:
    def test_by_hand(self) -> None:
        """Variances 0.0001 and 0.0004, pooled sqrt(0.00025) = 0.0158, twice that 0.0316; the means are 0.04 apart."""
        found = compare([0.49, 0.50, 0.51], [0.44, 0.46, 0.48])
        assert found.difference == pytest.approx(0.04)
        assert found.deviation == pytest.approx(math.sqrt(0.00025))
        assert found.clear

    def test_a_wide_spread_is_not_clear(self) -> None:
        assert not compare([0.40, 0.50, 0.60], [0.35, 0.45, 0.50]).clear

    def test_a_small_difference_is_not_clear_however_sure(self) -> None:
        assert not compare([0.529, 0.529], [0.5, 0.5]).clear
        assert compare([0.531, 0.531], [0.5, 0.5]).clear

    def test_worse_is_not_clearly_better(self) -> None:
        assert not compare([0.2, 0.2], [0.5, 0.5]).clear

    def test_one_seed_says_nothing(self) -> None:
        assert compare([0.9], [0.1]) == learning.Comparison(difference=pytest.approx(0.8), deviation=None, clear=False)


class TestReport:
    def test_all_beaten(self) -> None:
        result = runs_of("scenes", run(0.60, 0.30, 0.25), run(0.62, 0.31, 0.25), run(0.61, 0.29, 0.25, minutes=9.5))
        section = learning.report(result)
        scenes, emoji, minutes = section.checks
        assert scenes.met is True
        assert "kNN +31.0 over random" in scenes.measured
        assert emoji.met is None
        assert emoji.measured == "0 of 3 seeds measured"
        assert (minutes.met, minutes.measured) == (False, "9.5 at most")
        assert "| trained | 61.00 ± 1.00 | 71.00 ± 1.00 |" in section.body
        assert "| raw pixels (16x16) | 25.00 ± 0.00 | 35.00 ± 0.00 |" in section.body
        assert "does not" not in section.body

    def test_pixels_count_on_scenes_and_not_on_emoji(self) -> None:
        strong_pixels = [run(0.60, 0.30, 0.70), run(0.61, 0.31, 0.70), run(0.62, 0.29, 0.70)]
        assert learning.report(runs_of("scenes", *strong_pixels)).checks[0].met is False
        emoji = learning.report(runs_of("emoji", *strong_pixels))
        assert emoji.checks[1].met is True
        assert (
            "On emoji the trained encoder clearly beats random initialization by kNN, random initialization by linear "
            "probe; it does not clearly beat raw pixels (16x16) by kNN, raw pixels (16x16) by linear probe."
        ) in emoji.body

    def test_too_few_seeds_are_no_verdict(self) -> None:
        check = learning.report(runs_of("scenes", run(0.9, 0.1, 0.1), run(0.9, 0.1, 0.1))).checks[0]
        assert (check.met, check.measured) == (None, "2 of 3 seeds measured")

    def test_one_seed_is_called_no_verdict(self) -> None:
        body = learning.report(runs_of("emoji", run(0.9, 0.1, 0.1))).body
        assert "One seed on emoji is no verdict." in body
        assert "90.00 (one seed)" in body

    def test_a_busy_machine_is_said_for_each_run(self) -> None:
        busy = run(0.6, 0.3, 0.2) | {"about": ABOUT | {"others": 1.4}}
        body = learning.report(runs_of("scenes", run(0.6, 0.3, 0.2), busy)).body
        assert "Other processes kept 1.4 cores busy" in body


def test_a_small_run_from_the_command_to_its_scores(tmp_path: Path) -> None:
    """Trained by the command, judged against its beginning and pixels, kept at once, and not done again."""
    words = [*SECONDS[1:], "callbacks.visualizations=null"]
    kept: list[dict[str, Any]] = []
    result = learning.measure(overrides=words, data=["scenes"], seeds=[3], save=lambda each: kept.append(each))
    found = result["runs"]["scenes/3"]
    assert kept == [result]
    assert (found["epochs"], found["steps"]) == (2, 16)
    assert set(found["scores"]) == {"encoder", "random", "pixels"}
    for metrics in found["scores"].values():
        # 16 validation images: every share is a multiple of 1/16
        assert all(
            16 * metrics[name] == pytest.approx(round(16 * metrics[name]), abs=1e-5) for name in learning.METRICS
        )

    def no_run(*_: Any) -> dict[str, Any]:
        raise AssertionError("it is known already")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "train_and_evaluate", no_run)
        again = learning.measure(overrides=words, data=["scenes"], seeds=[3], stored=result)
        assert again["runs"] == result["runs"]
        with pytest.raises(AssertionError, match="known already"):  # another recipe is another run
            learning.measure(overrides=[*words, "optimizer.lr=0.1"], data=["scenes"], seeds=[3], stored=result)
