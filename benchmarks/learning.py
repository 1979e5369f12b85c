"""Compares the encoder of `mae_tiny` with its random initialization and with raw pixels."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from src.evaluate import evaluate
from src.evaluation_config import evaluation_config
from src.measure import machine, result_cache
from src.measure.report import Check, Section, table
from src.trained import RunSubject

DATA = ("scenes", "emoji")
SEEDS = (0, 1, 2)
ENCODERS = {"encoder": "trained", "random": "random initialization", "pixels": "raw pixels (16x16)"}
METRICS = {"knn_top1": "kNN", "linear_top1": "linear probe"}
RIVALS = {"scenes": ("random", "pixels"), "emoji": ("random",)}  # data set -> encoders that must be clearly beaten
WANTED_MINUTES = 8
DEVIATIONS, POINTS = 2.0, 0.03  # what "clearly" means

_QUICK = {
    "scenes": ["data.source.count={train: 512, val: 128, test: 16}", "trainer.max_epochs=1"],
    "emoji": ["trainer.max_epochs=1"],
}


def measure(
    quick: bool = False,
    *,
    stored: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
    overrides: Sequence[str] = (),
    data: Sequence[str] = DATA,
    seeds: Sequence[int] = SEEDS,
) -> dict[str, Any]:
    """Trains on every data set with every seed as `make train` does, and evaluates the trained encoder, the untrained
    one and raw pixels by kNN and a linear probe on the whole training and validation split.

    Args:
        stored: an earlier result; runs of the same recipe are not repeated.
        save: receives the result after each run, so that an interruption loses one run at most.
        overrides: of the configuration.

    Returns:
        ``runs``: for "<data>/<seed>" the ``scores`` by encoder and metric, the ``minutes`` of the training command,
        the ``epochs`` and optimizer ``steps``, and where it was measured.
    """
    jobs = {
        f"{name}/{seed}": result_cache.TrainingJob(
            ["experiment=mae_tiny", f"data={name}", f"seed={seed}", *overrides, *(_QUICK[name] if quick else ())]
        )
        for name in data
        for seed in ((0,) if quick else seeds)
    }
    runs = result_cache.measure_missing(
        jobs,
        lambda job, config: train_and_evaluate(job.overrides, config),
        stored=(stored or {}).get("runs", {}),
        save=lambda runs: save({"runs": runs}),
    )
    return {"runs": runs}


def train_and_evaluate(overrides: Sequence[str], config: DictConfig) -> dict[str, Any]:
    """Trains one run and evaluates it."""
    with result_cache.train_once(overrides, config) as trained:
        run, steps = trained.run, trained.steps
        whole_splits = ["evaluate.bank_samples=null", "evaluate.query_samples=null"]
        settled = evaluation_config(run, None, whole_splits)
        # the last checkpoint, because the best one was chosen on the evaluated images
        scores = evaluate(RunSubject.configured(settled, run.last), ["knn", "linear", "random", "pixels"])
    top1 = {encoder: {metric: values[metric] for metric in METRICS} for encoder, values in scores.items()}
    epochs = int(config.trainer.max_epochs)
    return {"minutes": trained.seconds / 60, "epochs": epochs, "steps": steps, "scores": top1}


@dataclass(frozen=True)
class Comparison:
    """The difference between two encoders over several seeds."""

    difference: float
    deviation: float | None  # pooled; None with fewer than two seeds
    clear: bool


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Compares two encoders: ``ours`` is clearly better if its mean is more than two pooled standard deviations and
    more than three points above the mean of ``theirs``."""
    difference = statistics.fmean(ours) - statistics.fmean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return Comparison(difference, None, False)
    deviation = math.sqrt((statistics.variance(ours) + statistics.variance(theirs)) / 2)
    return Comparison(difference, deviation, difference > DEVIATIONS * deviation and difference > POINTS)


def report(result: dict[str, Any]) -> Section:
    checks, parts = [], []
    for name in DATA:
        runs = _runs_on(result, name)
        checks.append(_check(name, runs))
        if runs:
            parts.append(_part(name, runs))
    minutes = [run["minutes"] for run in result["runs"].values()]
    if minutes:
        worst = max(minutes)
        checks.append(
            Check(
                "minutes of a run of mae_tiny", f"≤ {WANTED_MINUTES}", f"{worst:.1f} at most", worst <= WANTED_MINUTES
            )
        )
    body = (
        "`make train EXP=mae_tiny`, then top-1 on the validation split with the whole training split as bank: the "
        "trained encoder, the same one at random initialization, and raw pixels. Mean and standard deviation over "
        f"seeds. Clearly better: by more than {DEVIATIONS:.0f} pooled standard deviations and by more than "
        f"{100 * POINTS:.0f} points.\n\n" + "\n\n".join(parts)
    )
    return Section("Does it learn?", checks, body)


def verdict(name: str, runs: Mapping[int, Any]) -> str:
    """Returns a sentence that lists the encoders that are clearly beaten, and those that are not."""
    if len(runs) < 2:
        return f"One seed on {name} is no verdict."
    beaten: list[str] = []
    level: list[str] = []
    for rival in ("random", "pixels"):
        for metric in METRICS:
            clear = compare(_scores(runs, "encoder", metric), _scores(runs, rival, metric)).clear
            (beaten if clear else level).append(f"{ENCODERS[rival]} by {METRICS[metric]}")
    parts = [f"On {name} the trained encoder clearly beats {', '.join(beaten)}" if beaten else ""]
    parts.append(f"{'it' if beaten else f'On {name} the trained encoder'} does not clearly beat {', '.join(level)}")
    return ("; ".join(part for part in (parts if level else parts[:1]) if part)) + "."


def _check(name: str, runs: Mapping[int, Any]) -> Check:
    rivals = RIVALS[name]
    what = f"mae_tiny on {name} clearly beats {' and '.join(ENCODERS[rival] for rival in rivals)}"
    wanted = f"kNN and linear probe, {len(SEEDS)} seeds"
    if not set(SEEDS) <= set(runs):
        return Check(what, wanted, f"{len(runs)} of {len(SEEDS)} seeds measured", None)
    comparisons = [
        (rival, metric, compare(_scores(runs, "encoder", metric), _scores(runs, rival, metric)))
        for rival in rivals
        for metric in METRICS
    ]
    measured = ", ".join(
        f"{METRICS[metric]} {100 * comparison.difference:+.1f} over {rival}"
        for rival, metric, comparison in comparisons
    )
    return Check(what, wanted, measured, all(comparison.clear for _, _, comparison in comparisons))


def _part(name: str, runs: Mapping[int, Any]) -> str:
    rows = [
        [title, *(_mean_and_spread(_scores(runs, encoder, metric)) for metric in METRICS)]
        for encoder, title in ENCODERS.items()
    ]
    all_runs = list(runs.values())
    minutes = [run["minutes"] for run in all_runs]
    facts = (
        f"Seeds {', '.join(map(str, sorted(runs)))}; {all_runs[0]['epochs']} epochs, {all_runs[0]['steps']:,} steps; "
        f"{statistics.fmean(minutes):.1f} minutes a run ({min(minutes):.1f} to {max(minutes):.1f})."
    )
    where = "\n".join(f"- {each}" for each in machine.lines([run["about"] for run in all_runs]))
    scores = table(["", *(f"{title}, top-1 %" for title in METRICS.values())], rows)
    return f"### {name}\n\n{scores}\n\n{verdict(name, runs)} {facts}\n\n{where}"


def _runs_on(result: Mapping[str, Any], name: str) -> dict[int, Any]:
    keys = (key.split("/") for key in result["runs"])
    return {int(seed): result["runs"][f"{data}/{seed}"] for data, seed in keys if data == name}


def _scores(runs: Mapping[int, Any], encoder: str, metric: str) -> list[float]:
    return [run["scores"][encoder][metric] for _, run in sorted(runs.items())]


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else " (one seed)"
    return f"{100 * statistics.fmean(values):.2f}{spread}"
