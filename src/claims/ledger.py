"""Measures claims run by run, and reads verdicts from the stored results."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from src import train
from src.claims.claim import Arm, Claim, ClaimMetric, as_dict
from src.claims.metrics import Metric, subject_of, values_of
from src.claims.run_cache import RunCache
from src.claims.verdict import INCONCLUSIVE, REPRODUCED, PairedDifference, paired_difference, verdict
from src.errors import UserError
from src.measure import machine, result_cache, side_by_side
from src.measure.result_cache import TrainedRun, TrainingJob
from src.measure.side_by_side import Progress
from src.measure.train_command import TrainingFailed
from src.trained import RunSubject

STOPPED_CODES = (143, -15, 130, -2)  # exit codes of a training that a person or a scheduler stopped: not a failure
COUNT_FLOPS = "+callbacks.throughput.count_flops=true"  # in both arms, so that their costs can be compared

NOT_MEASURED, UNFINISHED, FAILED, UNEVEN = "not measured yet", "unfinished", "failed", "no verdict"
IN_PART = "in part"


@dataclass(frozen=True)
class Job:
    """A run of a claim that is to be measured, or a floor.

    Args:
        claim: name of the claim.
        kind: "runs" or "floors": the part of the claim's entry that the result belongs to.
        key: "<data>/<seed>/<arm>" of a run, "<data>/<seed>" of a floor.
        training: of the arm, with all that the result depends on.
        start: arguments of `make train` for the run that the arm starts from; empty for none.
    """

    claim: str
    kind: str
    key: str
    training: TrainingJob
    start: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is stored of a claim, and what is missing.

    Args:
        entry: ``claim``, the arms' ``difference`` by data set, ``runs``: for "<data>/<seed>/<arm>" the ``values`` by
            metric and what was ``spent``, or why it ``failed``, and ``floors``: for "<data>/<seed>" likewise. Each says
            where it was measured.
        missing: the runs and floors that the entry lacks.
    """

    entry: dict[str, Any]
    missing: Sequence[Job]


def measure(
    plans: Mapping[str, Plan],
    *,
    save: Callable[[str, dict[str, Any]], None],
    run_folder: Path | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Trains and evaluates what the plans of claims lack, claim by claim and pair by pair.

    Args:
        plans: of each claim, by its name.
        save: receives a claim's name and its entry after each of its runs.
        run_folder: where trained runs are kept for other claims and metrics, see `RunCache`; None deletes them.
        workers: runs that are trained side by side, each on one thread; 1 trains in this process, on all of them.

    Returns:
        Claim -> its entry.

    Raises:
        UserError: a training was stopped.
    """
    entries = {
        name: {**plan.entry, "runs": {**plan.entry["runs"]}, "floors": {**plan.entry["floors"]}}
        for name, plan in plans.items()
    }
    missing = [job for plan in plans.values() for job in plan.missing]
    with tempfile.TemporaryDirectory() as temporary:
        progress = Progress(len(missing))
        measure_one = partial(measure_job, run_folder=run_folder or Path(temporary))
        for job, result in side_by_side.results(missing, measure_one, workers):
            entries[job.claim][job.kind][job.key] = result
            save(job.claim, entries[job.claim])
            progress.report(_described(job, result))
    return entries


def plan(claim: Claim, stored: Mapping[str, Any], data: str | None = None) -> Plan:
    """Returns what has to be measured of a claim: both arms with every seed on every data set, and the floors.

    A floor is the score of the second arm's network before its first step. No floor is measured for arms started from a
    checkpoint, for claims that something gets lower, or for metrics that are only logged in training.

    Args:
        stored: the claim's earlier entry. Runs of another recipe, or with other metrics, are dropped.
        data: the only data set to measure on now; None for all of the claim's.

    Raises:
        UserError: the arms differ in more than the claim lists, a metric cannot be computed on its split, or the claim
            has no such ``data``.
    """
    if data not in (None, *claim.data):
        raise UserError(f"data={data}: claim '{claim.name}' is measured on {', '.join(claim.data)}")
    differences = {source: claim.difference(source) for source in claim.data}
    _check_splits(claim)
    jobs = [
        Job(claim.name, "runs", key_of(source, seed, arm.name), _training(claim, source, seed, arm), start)
        for source in claim.data
        for seed in claim.seeds
        for start in [tuple(_start(claim, source, seed))]
        for arm in claim.arms
    ]
    jobs += [
        Job(claim.name, "floors", f"{source}/{seed}", TrainingJob(overrides, floors))
        for source in claim.data
        if (floors := _floor_metrics(claim, source))
        for seed in claim.seeds
        for overrides in [claim.run_overrides(claim.arms[1], source, seed)]
    ]
    kept: dict[str, dict[str, Any]] = {"runs": {}, "floors": {}}
    for job in jobs:
        result = stored.get(job.kind, {}).get(job.key)
        # results of another recipe are dropped, so that runs of two recipes are never compared
        if result is not None and result["recipe"] == _recipe(job.training, job.training.config()):
            kept[job.kind][job.key] = result
    entry = {
        "claim": as_dict(claim),
        "difference": {
            source: {key: list(values) for key, values in differing.items()}
            for source, differing in differences.items()
        },
        **kept,
    }
    return Plan(entry, [job for job in jobs if job.key not in kept[job.kind] and data in (None, job.key.split("/")[0])])


def _check_splits(claim: Claim) -> None:
    """
    Raises:
        UserError: a metric cannot be computed on the claim's split.
    """
    for source in claim.data:
        for arm in claim.arms:
            for name, spec in claim.metrics_of(arm, source).items():
                splits = Metric(**spec).splits
                if claim.split not in splits:
                    raise UserError(
                        f"claim '{claim.name}': split={claim.split}, but {name} is measured on {' or '.join(splits)}"
                    )


def measure_job(job: Job, run_folder: Path) -> dict[str, Any]:
    """Returns the result of a job with its recipe, and where it was measured."""
    config = job.training.config()
    head = {"about": machine.about(), "recipe": _recipe(job.training, config)}
    if job.kind == "floors":
        return head | _measure_floor(job.training, config)
    run_cache = RunCache(run_folder)

    def trained_run(overrides: Sequence[str], config: DictConfig) -> TrainedRun:
        start = list(job.start)
        start_run = run_cache.get_or_train(start, train.compose(start)).run if start else None
        return run_cache.get_or_train(overrides, config, start=start_run)

    return head | _measure_run(job.training, config, trained_run)


def _described(job: Job, result: Mapping[str, Any]) -> str:
    """Returns a result in words."""
    values = ", ".join(f"{value:.4g}" for value in result.get("values", {}).values())
    floor = ", random start" if job.kind == "floors" else ""
    return f"{job.claim} {job.key}{floor}: {values or 'failed: ' + result['failed']}"


def outdated(claim: Claim, entry: Mapping[str, Any]) -> set[str]:
    """Returns the data sets of which stored runs were made by another recipe than today's, were evaluated otherwise, or
    are of data that the claim no longer has. The first seed stands for all: they differ in nothing else."""
    seed = claim.seeds[0]
    gone = {key.split("/")[0] for key in entry.get("runs", {})} - set(claim.data)
    return gone | {
        source
        for source in claim.data
        for arm in claim.arms
        if (run := entry.get("runs", {}).get(key_of(source, seed, arm.name))) is not None
        if (training := _training(claim, source, seed, arm))
        if run["recipe"] != _recipe(training, training.config())
    }


def _recipe(training: TrainingJob, config: DictConfig) -> str:
    return result_cache.fingerprint(config, training.extra)


def _training(claim: Claim, data: str, seed: int, arm: Arm) -> TrainingJob:
    """Returns the training of one arm, with all that its values depend on."""
    start = _start(claim, data, seed)
    start_recipe = {"start": result_cache.fingerprint(train.compose(start))} if start else {}
    overrides = [*claim.run_overrides(arm, data, seed), COUNT_FLOPS]
    return TrainingJob(overrides, {"metrics": claim.metrics_of(arm, data), "split": claim.split} | start_recipe)


def _start(claim: Claim, data: str, seed: int) -> list[str]:
    start = claim.start_overrides(data, seed)
    return [*start, COUNT_FLOPS] if start else []


def _floor_metrics(claim: Claim, data: str) -> dict[str, Any]:
    """Returns what is measured of an untrained network; empty if nothing is."""
    specs = claim.metrics_of(claim.arms[1], data)
    metrics = {
        metric.name: specs[metric.name]
        for metric in claim.metrics_on(data)
        if metric.direction == "higher" and Metric(**specs[metric.name]).untrained
    }
    return {"metrics": metrics, "split": claim.split} if metrics and claim.start is None else {}


def key_of(data: str, seed: int, arm: str) -> str:
    """Returns the key of a run in an entry's ``runs``."""
    return f"{data}/{seed}/{arm}"


def _measure_run(
    job: TrainingJob, config: DictConfig, trained_run: Callable[[Sequence[str], DictConfig], TrainedRun]
) -> dict[str, Any]:
    """Returns the ``values`` of one run by metric and what was ``spent``, or why it ``failed``."""
    try:
        trained = trained_run(job.overrides, config)
        values = values_of(job.extra["metrics"], subject_of(trained.run, job.extra["split"]))
        metrics = trained.run.metrics()["train"]
        spent: dict[str, Any] = {
            "steps": trained.steps,
            "images": trained.steps * int(config.data.batch_size),
            "seconds": round(trained.seconds, 1),
        }
        if metrics.get("speed/step_flops"):
            spent["flops"] = trained.steps * metrics["speed/step_flops"]
        return {"values": values, "spent": spent} | ({"about": trained.about} if trained.about else {})
    except TrainingFailed as failure:
        if failure.code in STOPPED_CODES:
            raise UserError("the training was stopped; the same command continues with the missing runs") from failure
        reason = failure.reason
    except Exception as problem:
        # one failed run must not cost the others; the page shows the reason
        reason = _reason(problem)
    return {"failed": _shortened(reason)}


def _measure_floor(job: TrainingJob, config: DictConfig) -> dict[str, Any]:
    """Returns the ``values`` of an untrained network by metric, or why it ``failed``."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = config.copy()
            config.run.dir = folder  # a tokenizer may be learned here
            return {"values": values_of(job.extra["metrics"], RunSubject(config, None, split=job.extra["split"]))}
    except Exception as problem:
        return {"failed": _shortened(_reason(problem))}


def _reason(problem: Exception) -> str:
    return str(problem) if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}"


def _shortened(reason: str) -> str:
    """Returns at most 300 characters in one line, with the folders of temporary paths replaced by "…"."""
    words = [
        "…/" + word.rsplit("/", 1)[-1] if word.startswith(tempfile.gettempdir()) else word for word in reason.split()
    ]
    return " ".join(words)[:300]


@dataclass(frozen=True)
class Outcome:
    """The state of a claim on one data set by one metric.

    Args:
        verdict: see `src.claims.verdict.verdict`, or the reason why there is none.
        pairs: seed -> values of the first and the second arm, for pairs of which both are measured.
        failed: "<seed>/<arm>" -> why the run failed.
        difference: over the pairs; None without any pair.
        note: a remark on the verdict, or "".
    """

    verdict: str
    pairs: Mapping[int, tuple[float, float]]
    failed: Mapping[str, str]
    difference: PairedDifference | None
    note: str = ""


def outcome(claim: Claim, entry: Mapping[str, Any], data: str, metric: ClaimMetric) -> Outcome:
    """Returns the verdict on a data set by one metric, which needs every pair: a missing one may contradict the claim.

    Args:
        entry: the claim's part of the ledger, as `measure` returns it; may be empty.
    """
    runs = entry.get("runs", {})
    names = [arm.name for arm in claim.arms]
    pairs: dict[int, tuple[float, float]] = {}
    failed: dict[str, str] = {}
    missing = 0
    for seed in claim.seeds:
        pair = [_of_metric(runs.get(key_of(data, seed, name)), metric) for name in names]
        missing += sum(run is None for run in pair)
        failed |= {
            f"{seed}/{name}": run["failed"] for name, run in zip(names, pair, strict=True) if run and "failed" in run
        }
        values = [run["values"][metric.name] for run in pair if run and "values" in run]
        if len(values) == 2:
            pairs[seed] = (values[0], values[1])
    difference = paired_difference(*zip(*pairs.values(), strict=True)) if pairs else None
    if missing:
        begun = any(key.startswith(f"{data}/") for key in runs)
        note = f"{len(pairs)} of {len(claim.seeds)} pairs" if begun else ""
        return Outcome(UNFINISHED if begun else NOT_MEASURED, pairs, failed, difference, note)
    if failed:
        note = f"{len(failed)} of {2 * len(claim.seeds)} runs failed"
        return Outcome(INCONCLUSIVE if pairs else FAILED, pairs, failed, difference, note)
    uneven = _uneven_budget(claim, runs, data)
    if uneven:
        return Outcome(UNEVEN, pairs, failed, difference, uneven)
    assert difference is not None
    floors = [(floor or {}).get("values", {}).get(metric.name) for floor in floors_of(claim, entry, data)]
    note = "one seed is no verdict" if len(pairs) == 1 else _nothing_learned(pairs, floors)
    result = verdict(difference, direction=metric.direction, least=metric.least)
    return Outcome(result, pairs, failed, difference, note)


def _of_metric(run: Mapping[str, Any] | None, metric: ClaimMetric) -> Mapping[str, Any] | None:
    """Returns a run, None if it was measured without the metric."""
    return None if run is None or metric.name not in run.get("values", {metric.name: None}) else run


def overall_verdict(claim: Claim, entry: Mapping[str, Any]) -> str:
    """Returns the verdict on a claim as a whole: the one that all of its metrics give on all of its data sets, or
    "in part" where only some of them reproduce it."""
    verdicts = {outcome(claim, entry, data, metric).verdict for data in claim.data for metric in claim.metrics_on(data)}
    if len(verdicts) == 1:
        return verdicts.pop()
    if verdicts & {NOT_MEASURED, UNFINISHED}:
        return UNFINISHED
    return IN_PART if REPRODUCED in verdicts else INCONCLUSIVE


def floors_of(claim: Claim, entry: Mapping[str, Any], data: str) -> list[Mapping[str, Any] | None]:
    """Returns the stored floor of each seed, None where it was not measured."""
    return [entry.get("floors", {}).get(f"{data}/{seed}") for seed in claim.seeds]


def _nothing_learned(pairs: Mapping[int, tuple[float, float]], floors: Sequence[float | None]) -> str:
    """Returns a note if neither arm beats the untrained network: the comparison then says nothing about learning."""
    values = [floor for floor in floors if floor is not None]
    if len(values) < len(floors):
        return ""
    best = max(statistics.fmean(arm) for arm in zip(*pairs.values(), strict=True))
    return "" if best > statistics.fmean(values) else "neither arm ends above its random start"


def _uneven_budget(claim: Claim, runs: Mapping[str, Any], data: str) -> str:
    """Returns a note on the pair whose costs differ most, or "" if all are as equal as the claim says."""
    kind, largest, note = claim.budget.equal, 0.0, ""
    for seed in claim.seeds:
        spent = [runs[key_of(data, seed, arm.name)]["spent"].get(kind) for arm in claim.arms]
        if None in spent:
            return f"{kind} were not counted"
        relative = abs(spent[1] - spent[0]) / max(*spent, 1e-12)
        if relative > max(largest, claim.budget.within):
            largest = relative
            note = f"budgets are {100 * relative:.0f} % apart in {kind} ({spent[0]:.4g} and {spent[1]:.4g})"
    return note
