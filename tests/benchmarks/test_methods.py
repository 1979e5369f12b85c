"""The table of all methods: what fits into the time, which encoder counts, and one small run from the command on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import methods
from tests.commands import SECONDS

ABOUT = {"date": "2030-01-01", "commit": "abc", "cpu": "a CPU", "cores": 2, "torch": "2", "threads": 1, "others": 0.0}


def run(**knn: float) -> dict[str, Any]:
    """One whose linear probe is 10 points above its kNN throughout."""
    return {
        "about": ABOUT,
        "recipe": "r",
        "steps": 1000,
        "batch": 128,
        "seconds": 200.0,
        "scores": {name: {"knn_top1": value, "linear_top1": value + 0.1} for name, value in knn.items()},
    }


def rates(*keys: str) -> dict[str, Any]:
    return {key: {"about": ABOUT, "recipe": "r", "rate": 711.0, "memory": 1.5} for key in keys}


def test_as_many_steps_as_fit() -> None:
    assert methods.steps_within(180, 640, 128) == 900
    assert methods.steps_within(1, 10, 128) == 10


def test_the_encoder_that_the_paper_judges_is_the_one_in_the_table() -> None:
    runs = {
        f"dino/scenes/{seed}": run(student=0.3, teacher=0.5 + shift, random=0.1, pixels=0.2)
        for seed, shift in enumerate((-0.02, 0.0, 0.02))
    }
    section = methods.report({"rates": rates("dino/scenes"), "runs": runs})
    assert "| DINO | 50.0 ± 2.0 | 60.0 ± 2.0 | 711 | 128,000 | 1.50 |" in section.body
    assert "| random initialization | 10.0 ± 0.0 | 20.0 ± 0.0 |" in section.body
    assert "DINO's student 30.0 ± 0.0, 40.0 ± 0.0." in section.body
    assert "with the reason" not in section.body
    (check,) = section.checks
    assert (check.met, check.measured) == (None, "all of 3 runs above")  # of one method: the table is not whole


def test_a_method_below_its_beginning_is_named() -> None:
    low = {"byol/emoji/0": run(student=0.1, teacher=0.4, random=0.2, pixels=0.3)}
    section = methods.report({"rates": rates("byol/emoji"), "runs": low})
    (check,) = section.checks
    assert (check.met, check.measured) == (False, "below: BYOL by kNN, BYOL by linear")
    assert "The other of two encoders, kNN and linear: BYOL's teacher 40.0, 50.0." in section.body
    assert f"with the reason:\n\n- BYOL: {methods.METHODS['byol'].why}" in section.body


def test_a_whole_table_of_good_methods_is_met() -> None:
    runs = {
        f"{name}/scenes/{seed}": run(**{method.encoder: 0.6, "random": 0.1, "pixels": 0.2})
        for name, method in methods.METHODS.items()
        for seed in methods.SEEDS
    }
    measured = rates(*(f"{name}/scenes" for name in methods.METHODS))
    (check,) = methods.report({"rates": measured, "runs": runs}).checks
    assert check.met is True


def test_a_small_run_from_the_command_to_its_scores(tmp_path: Path) -> None:
    words = [word for word in SECONDS[1:] if not word.startswith(("model.", "trainer.max_epochs"))]
    words += ["model.hidden_dim=16", "callbacks.throughput.every_n_steps=1"]
    kept: list[dict[str, Any]] = []
    result = methods.measure(
        overrides=words,
        methods=["byol"],
        data=["scenes"],
        seeds=[3],
        seconds=0.001,
        save=lambda each: kept.append(each),
    )
    found = result["runs"]["byol/scenes/3"]
    assert [each["runs"] for each in kept] == [{}, result["runs"]]
    assert {each["rates"]["byol/scenes"]["rate"] for each in kept} == {result["rates"]["byol/scenes"]["rate"]}
    assert found["steps"] == 10  # the least there can be
    assert set(found["scores"]) == {"student", "teacher", "random", "pixels"}

    def no_run(*_: Any) -> dict[str, Any]:
        raise AssertionError("it is known already")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "train_and_evaluate", no_run)
        patch.setattr(methods, "measure_rate", no_run)
        again = methods.measure(
            overrides=words,
            methods=["byol"],
            data=["scenes"],
            seeds=[3],
            seconds=0.001,
            stored=result,
        )
    assert again == result
