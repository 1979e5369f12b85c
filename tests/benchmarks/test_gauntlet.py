"""The gauntlet's table: who is above the random start, what is told, and one small encoder from the command on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import gauntlet
from tests.benchmarks.test_methods import ABOUT
from tests.commands import SECONDS


def score(setting: str, value: float, lower: bool = False) -> dict[str, Any]:
    return {
        "setting": setting,
        "metric": "abs_rel" if lower else "top1",
        "kind": "dense" if lower else "classification",
        "adaptation": "frozen",
        "lower_is_better": lower,
        "parameters": 400_000,
        "value": value,
    }


def run(*scores: dict[str, Any], failures: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "about": ABOUT,
        "recipe": "r",
        "steps": 624,
        "minutes": 2.5,
        "scores": list(scores),
        "failures": failures or {},
    }


def three(name: str, knn: float, depth: float) -> dict[str, Any]:
    found = {}
    for seed, shift in enumerate((-0.02, 0.0, 0.02)):
        found[f"{name}/{seed}/knn"] = run(score("knn/scenes", knn + shift))
        found[f"{name}/{seed}/depth"] = run(score("depth/scenes", depth + shift, lower=True))
    return found


@pytest.fixture
def two_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gauntlet has no others."""
    all_tasks = gauntlet.tasks_named(None)
    monkeypatch.setattr(gauntlet, "tasks_named", lambda names: {name: all_tasks[name] for name in ("knn", "depth")})


@pytest.mark.usefixtures("two_tasks")
def test_each_task_says_by_how_much_the_best_is_better_than_the_random_start() -> None:
    runs = three("random", 0.2, 0.5) | three("mae", 0.3, 0.45) | three("supervised", 0.6, 0.48)
    section = gauntlet.report({"runs": runs})
    # of an error less is better, and the best is the one with the least
    assert "| knn/scenes | top1 ↑ | 0.6 ± 0.02 | 0.3 ± 0.02 | 0.2 ± 0.02 | +0.4 (supervised, 3 of 3) |" in section.body
    assert "| 0.48 ± 0.02 | 0.45 ± 0.02 | 0.5 ± 0.02 | +0.05 (MAE, 3 of 3) |" in section.body
    assert "supervised 624 steps of 64 in 2.5 minutes, MAE 624 steps" in section.body
    (check,) = section.checks
    assert (check.met, check.measured) == (None, "all of 2")  # MoCo v3 is still to come
    assert "Of 24 scores there are 18 so far." in section.body
    whole = gauntlet.report({"runs": runs | three("moco_v3", 0.5, 0.49)})
    assert whole.checks[0].met is True
    assert "so far" not in whole.body


def test_a_head_that_no_trained_encoder_helps_is_named() -> None:
    runs = three("random", 0.2, 0.4) | three("mae", 0.3, 0.45) | three("supervised", 0.6, 0.48)
    (check,) = gauntlet.report({"runs": runs}).checks
    assert (check.met, check.measured) == (False, "not: depth/scenes")


def test_seeds_that_are_not_better_are_counted() -> None:
    runs = {
        f"{name}/{seed}/knn": run(score("knn/scenes", value))
        for name, values in {"random": (0.2, 0.2, 0.2), "mae": (0.5, 0.1, 0.3)}.items()
        for seed, value in enumerate(values)
    }
    best, differences = gauntlet.above(gauntlet._rows({"runs": runs}), "knn/scenes") or ("", [])
    assert best == "MAE"
    assert differences == pytest.approx([0.3, -0.1, 0.1])
    section = gauntlet.report({"runs": runs})
    assert "+0.1 (MAE, 2 of 3)" in section.body
    # the mean alone is not enough
    assert (section.checks[0].met, section.checks[0].measured) == (False, "not: knn/scenes")


@pytest.mark.usefixtures("two_tasks")
def test_what_could_not_be_measured_is_told_and_leaves_the_verdict_open() -> None:
    runs = (
        three("random", 0.2, 0.5) | three("mae", 0.3, 0.4) | three("supervised", 0.4, 0.3) | three("moco_v3", 0.5, 0.2)
    )
    assert gauntlet.report({"runs": runs}).checks[0].met is True
    runs["mae/0/depth"] = run(failures={"random x, depth/scenes": "it did not end well"})
    section = gauntlet.report({"runs": runs})
    assert section.checks[0].met is None
    assert "- mae/0/depth: it did not end well" in section.body


def test_a_small_encoder_from_the_command_to_its_scores(tmp_path: Path) -> None:
    small = [word for word in SECONDS[1:] if not word.startswith("data.train_samples")]
    kept: list[dict[str, Any]] = []
    settings: dict[str, Any] = {
        "overrides": [*small, "trainer.max_epochs=1", f"paths.cache={tmp_path}"],
        "finetuned": [
            "data.source.count=16",
            "data.batch_size=8",
            "trainer.max_epochs=1",
            "trainer.check_val_every_n_epoch=1",
        ],
        "encoders": ["mae"],
        "seeds": [3],
        "tasks": "knn,finetune",
    }
    result = gauntlet.measure(**settings, save=kept.append)
    assert [*result["runs"]] == ["mae/3/knn", "mae/3/finetune"]
    assert [[*each["runs"]] for each in kept] == [["mae/3/knn"], ["mae/3/knn", "mae/3/finetune"]]
    for key, found in result["runs"].items():
        assert found["failures"] == {}
        assert [row["setting"] for row in found["scores"]] == [f"{key.rpartition('/')[2]}/scenes"]
        assert found["steps"] == 16
    # both of one training
    assert len({found["minutes"] for found in result["runs"].values()}) == 1

    def no_run(*_: Any) -> dict[str, Any]:
        raise AssertionError("it is known already")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gauntlet, "run_tasks", no_run)
        patch.setattr(gauntlet.result_cache, "train_once", no_run)
        assert gauntlet.measure(**settings, stored=result) == result
        assert gauntlet.measure(**settings, stored=result, data=["emoji"]) == result
        with pytest.raises(AssertionError, match="it is known already"):
            gauntlet.measure(**settings | {"tasks": "knn,finetune,instances"}, stored=result)
