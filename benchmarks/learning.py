"""Whether `mae_tiny` learns something: its encoder against its own beginning and against raw pixels."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from src import evaluate
from src.measure import machine, result_cache
from src.measure.report import Check, Section, table

DATA = ("scenes", "emoji")
SEEDS = (0, 1, 2)
ENCODERS = {"encoder": "trained", "random": "random initialization", "pixels": "raw pixels (16x16)"}
METRICS = {"knn_top1": "kNN", "linear_top1": "linear probe"}
RIVALS = {"scenes": ("random", "pixels"), "emoji": ("random",)}  # what has to be beaten clearly, where
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
    """Train on every data set with every seed as `make train` does, and judge the encoder, the one it started as, and
    raw pixels by kNN and a linear probe: the whole training split against the whole validation split.

    Args:
        stored: an earlier result; what it holds of the same recipe is not measured again.
        save: is given the result after each run, so that nothing finished is lost.
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
    earlier = (stored or {}).get("runs", {})
    found = result_cache.measure_missing(
        jobs, lambda job, config: learn(job.overrides, config), stored=earlier, save=lambda each: save({"runs": each})
    )
    return {"runs": found}


def learn(words: Sequence[str], config: DictConfig) -> dict[str, Any]:
    """One run, trained and judged."""
    with result_cache.train_once(words, config) as finished:
        run, steps = finished.run, finished.steps
        everything = ["evaluate.bank_samples=null", "evaluate.query_samples=null"]
        settled = evaluate.settle(run, None, everything)
        # the last checkpoint, not the best: the best was chosen on the images it would be judged on
        scores = evaluate.evaluate(settled, run.last, ["knn", "linear", "random", "pixels"])
    judged = {encoder: {metric: values[metric] for metric in METRICS} for encoder, values in scores.items()}
    epochs = int(config.trainer.max_epochs)
    return {"minutes": finished.seconds / 60, "epochs": epochs, "steps": steps, "scores": judged}


@dataclass(frozen=True)
class Comparison:
    """Of two encoders over several seeds."""

    difference: float
    deviation: float | None  # pooled; None with fewer than two seeds
    clear: bool


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """``ours`` is clearly better where its mean is more than two pooled standard deviations and three points above."""
    difference = statistics.fmean(ours) - statistics.fmean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return Comparison(difference, None, False)
    deviation = math.sqrt((statistics.variance(ours) + statistics.variance(theirs)) / 2)
    return Comparison(difference, deviation, difference > DEVIATIONS * deviation and difference > POINTS)


def report(result: dict[str, Any]) -> Section:
    checks, parts = [], []
    for name in DATA:
        mine = _of(result, name)
        checks.append(_check(name, mine))
        if mine:
            parts.append(_part(name, mine))
    minutes = [run["minutes"] for run in result["runs"].values()]
    if minutes:
        worst = max(minutes)
        checks.append(
            Check(
                "minutes of a run of mae_tiny", f"≤ {WANTED_MINUTES}", f"{worst:.1f} at most", worst <= WANTED_MINUTES
            )
        )
    body = (
        "`make train EXP=mae_tiny`, then top-1 of the validation split by the whole training split: the trained "
        "encoder, the same one at random initialization, and raw pixels. Mean and standard deviation over seeds. "
        f"Clearly better: by more than {DEVIATIONS:.0f} pooled standard deviations and by more than "
        f"{100 * POINTS:.0f} points.\n\n" + "\n\n".join(parts)
    )
    return Section("Does it learn?", checks, body)


def verdict(name: str, mine: Mapping[int, Any]) -> str:
    """A sentence that says what is beaten, and what is not."""
    if len(mine) < 2:
        return f"One seed on {name} is no verdict."
    beaten: list[str] = []
    level: list[str] = []
    for rival in ("random", "pixels"):
        for metric in METRICS:
            clear = compare(_scores(mine, "encoder", metric), _scores(mine, rival, metric)).clear
            (beaten if clear else level).append(f"{ENCODERS[rival]} by {METRICS[metric]}")
    said = [f"On {name} the trained encoder clearly beats {', '.join(beaten)}" if beaten else ""]
    said.append(f"{'it' if beaten else f'On {name} the trained encoder'} does not clearly beat {', '.join(level)}")
    return ("; ".join(part for part in (said if level else said[:1]) if part)) + "."


def _check(name: str, mine: Mapping[int, Any]) -> Check:
    rivals = RIVALS[name]
    what = f"mae_tiny on {name} clearly beats {' and '.join(ENCODERS[rival] for rival in rivals)}"
    wanted = f"kNN and linear probe, {len(SEEDS)} seeds"
    if not set(SEEDS) <= set(mine):
        return Check(what, wanted, f"{len(mine)} of {len(SEEDS)} seeds measured", None)
    found = [
        (rival, metric, compare(_scores(mine, "encoder", metric), _scores(mine, rival, metric)))
        for rival in rivals
        for metric in METRICS
    ]
    said = ", ".join(f"{METRICS[metric]} {100 * each.difference:+.1f} over {rival}" for rival, metric, each in found)
    return Check(what, wanted, said, all(each.clear for _, _, each in found))


def _part(name: str, mine: Mapping[int, Any]) -> str:
    rows = [
        [said, *(_mean_and_spread(_scores(mine, encoder, metric)) for metric in METRICS)]
        for encoder, said in ENCODERS.items()
    ]
    runs_of = list(mine.values())
    minutes = [run["minutes"] for run in runs_of]
    facts = (
        f"Seeds {', '.join(map(str, sorted(mine)))}; {runs_of[0]['epochs']} epochs, {runs_of[0]['steps']:,} steps; "
        f"{statistics.fmean(minutes):.1f} minutes a run ({min(minutes):.1f} to {max(minutes):.1f})."
    )
    where = "\n".join(f"- {each}" for each in machine.lines([run["about"] for run in runs_of]))
    scores = table(["", *(f"{said}, top-1 %" for said in METRICS.values())], rows)
    return f"### {name}\n\n{scores}\n\n{verdict(name, mine)} {facts}\n\n{where}"


def _of(result: Mapping[str, Any], name: str) -> dict[int, Any]:
    found = (key.split("/") for key in result["runs"])
    return {int(seed): result["runs"][f"{data}/{seed}"] for data, seed in found if data == name}


def _scores(mine: Mapping[int, Any], encoder: str, metric: str) -> list[float]:
    return [run["scores"][encoder][metric] for _, run in sorted(mine.items())]


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else " (one seed)"
    return f"{100 * statistics.fmean(values):.2f}{spread}"
