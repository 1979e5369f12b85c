"""The table of every method at its tiny scale: what is compared, what is too little, and one small run of each kind."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import methods
from src import configuration, train
from src.errors import UserError
from tests.commands import SECONDS

ABOUT = {"date": "2030-01-01", "commit": "abc", "cpu": "a CPU", "cores": 2, "torch": "2", "threads": 1, "others": 0.0}
SMALL = [word for word in SECONDS[1:] if not word.startswith("model.")]


def run(start: float, end: float, metric: str = "knn_top1", seconds: float = 200.0) -> dict[str, Any]:
    return {
        "about": ABOUT,
        "recipe": "r",
        "metric": metric,
        "start": start,
        "end": end,
        "steps": 1000,
        "images": 128000,
        "core_seconds": seconds,
        "rate": 640.0,
    }


def runs(name: str, *pairs: tuple[float, float], **more: Any) -> dict[str, Any]:
    return {f"{name}/{seed}": run(*pair, **more) for seed, pair in enumerate(pairs)}


@pytest.mark.parametrize(
    ("experiment", "metric"),
    [
        ("dino_vits", "knn_top1"),
        ("clip_vitb32", "zeroshot_top1"),
        ("xclip_vitb32", "zeroshot_top1"),
        ("action_vitb", "eval/top1"),
        ("segmentation_linear_vitb", "eval/miou"),
        ("depth_dpt_vitb", "eval/abs_rel"),
    ],
)
def test_what_an_experiment_is_judged_by(experiment: str, metric: str) -> None:
    assert methods.metric_of(train.compose([f"experiment={experiment}", "scale=tiny"])) == metric


def test_the_least_gain_is_that_of_the_worst_seed() -> None:
    section = methods.report({"runs": runs("simclr_r50", (0.2, 0.31), (0.18, 0.4), (0.22, 0.5))})
    assert "| simclr_r50 | kNN, top-1 | 20.0 ± 2.0 | 40.3 ± 9.5 | +11.0 | 1,000 | 200 | 640 |" in section.body
    gain, time = section.checks
    assert (gain.met, gain.measured) == (None, "all of 1 measured")  # of one experiment: the table is not whole
    assert (time.met, time.measured) == (None, "at most 200")


def test_too_little_and_too_slow_are_named() -> None:
    measured = runs("byol_r50", (0.2, 0.4), (0.2, 0.29), seconds=400.0) | runs("dino_vits", (0.2, 0.1))
    section = methods.report({"runs": measured})
    assert "+9.0 **too little**" in section.body
    assert "-10.0 **too little**" in section.body
    gain, time = section.checks
    assert (gain.met, gain.measured) == (False, "not: byol_r50, dino_vits")
    assert (time.met, time.measured) == (False, "more: byol_r50")


def test_an_error_gains_by_getting_smaller() -> None:
    better = methods.report({"runs": runs("depth_dpt_vitb", (0.5, 0.25), (0.5, 0.375), metric="eval/abs_rel")})
    assert "| 0.500 ± 0.000 | 0.312 ± 0.088 | +0.125 |" in better.body
    assert better.checks[0].measured == "all of 1 measured"
    worse = methods.report({"runs": runs("depth_dpt_vitb", (0.5, 0.25), (0.5, 0.51), metric="eval/abs_rel")})
    assert worse.checks[0].measured == "not: depth_dpt_vitb"


def test_a_whole_table_of_good_methods_is_met() -> None:
    found: dict[str, Any] = {}
    for name in configuration.names("experiment"):
        found |= runs(name, (0.2, 0.4), (0.2, 0.4), (0.2, 0.4))
    assert [check.met for check in methods.report({"runs": found}).checks] == [True, True]


def test_a_small_run_from_the_command_to_its_scores() -> None:
    """The start is that of the untrained network, and a stored run is not repeated."""
    overrides = [*SMALL, "optimizer.lr=0.0", "trainer.max_epochs=1", "callbacks.throughput.every_n_steps=1"]
    saved: list[dict[str, Any]] = []
    result = methods.measure(
        experiments=["supervised_vits"], overrides=overrides, seeds=[3], save=saved.append, workers=1
    )
    found = result["runs"]["supervised_vits/3"]
    assert saved == [result]
    assert (found["metric"], found["steps"], found["images"]) == ("knn_top1", 8, 32)
    assert found["start"] == found["end"]  # at a rate of 0
    assert found["core_seconds"] > 1

    def no_run(*_: Any, **__: Any) -> dict[str, Any]:
        raise AssertionError("it is known already")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "_measure_run", no_run)
        again = methods.measure(
            experiments=["supervised_vits"], overrides=overrides, seeds=[3], stored=result, workers=1
        )
    assert again == result


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["only=methods", "data=emoji"], "data=emoji: none of methods takes it, only learning and gauntlet"),
        (["only=loop,gauntlet", "workers=2"], "workers=2: none of loop, gauntlet takes it, only methods"),
    ],
)
def test_an_option_that_no_chosen_part_takes_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command.main(words)


def test_a_method_that_evaluates_itself_starts_from_its_own_validation() -> None:
    config = train.compose(["experiment=linear_vitb", "scale=tiny", *SMALL])
    value = methods.score(config, None, "eval/top1")
    images = len(configuration.instantiate(config.data).source("val"))
    assert value * images == pytest.approx(round(value * images), abs=1e-4)
