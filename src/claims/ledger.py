"""Measures claims run by run, and reads verdicts from the stored results."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig

from src import train
from src.claims.claim import Arm, Claim, as_dict
from src.claims.metrics import Metric, subject_of
from src.claims.run_cache import RunCache
from src.claims.verdict import PairedDifference, paired_difference, verdict
from src.datamodules.sources.source import Split
from src.errors import UserError
from src.measure import result_cache
from src.measure.result_cache import TrainedRun, TrainingJob
from src.measure.train_command import TrainingFailed
from src.trained import RunSubject

STOPPED_CODES = (143, -15, 130, -2)  # exit codes of a training that a person or a scheduler stopped: not a failure
COUNT_FLOPS = "+callbacks.throughput.count_flops=true"  # in both arms, so that their costs can be compared

NOT_MEASURED, UNFINISHED, FAILED, UNEVEN = "not measured yet", "unfinished", "failed", "no verdict"


def measure(
    claim: Claim,
    *,
    stored: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda entry: None,
    data: str | None = None,
    run_folder: Path | None = None,
) -> dict[str, Any]:
    """Trains and evaluates both arms with every seed on every data set, pair by pair, and measures the floors.

    A floor is the score of the second arm's network before its first step. No floor is measured for arms started from a
    checkpoint, for claims that something gets lower, or for metrics that are only logged in training.

    Args:
        stored: the claim's earlier entry; runs of the same recipe and metric are not repeated.
        save: receives the entry after each run.
        data: the only data set to measure on now; None for all of the claim's.
        run_folder: where trained runs are kept for other claims and metrics, see `RunCache`; None deletes them.

    Returns:
        ``claim``, the arms' ``difference`` by data set, ``runs``: for "<data>/<seed>/<arm>" the ``value`` and what was
        ``spent``, or why it ``failed``, and ``floors``: for "<data>/<seed>" likewise. Each says where it was measured.

    Raises:
        UserError: the arms differ in more than the claim lists, the claim has no such ``data``, or a training was
            stopped.
    """
    if data not in (None, *claim.data):
        raise UserError(f"data={data}: claim '{claim.name}' is measured on {', '.join(claim.data)}")
    # both checks come before any training
    differences = {source: claim.difference(source) for source in claim.data}
    metrics = [Metric.parse(claim.metric_of(arm)) for arm in claim.arms]
    for metric in metrics:
        if claim.split not in metric.splits:
            raise UserError(
                f"claim '{claim.name}': split={claim.split}, but {claim.measured} is measured on "
                f"{' or '.join(metric.splits)}"
            )
    jobs, starts, floor_jobs = {}, {}, {}
    has_floor = claim.start is None and claim.direction == "higher" and metrics[1].untrained
    for source in claim.data:
        for seed in claim.seeds:
            for arm in claim.arms:
                job = _job(claim, source, seed, arm)
                jobs[key_of(source, seed, arm.name)] = job
                starts[tuple(job.overrides)] = _start(claim, source, seed)
            if has_floor:
                overrides = claim.run_overrides(claim.arms[1], source, seed)
                floor_jobs[f"{source}/{seed}"] = TrainingJob(overrides, _evaluation(claim, claim.arms[1]))

    def entry(runs: Mapping[str, Any], floors: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "claim": as_dict(claim),
            "difference": {
                source: {key: list(values) for key, values in differing.items()}
                for source, differing in differences.items()
            },
            "runs": {key: runs[key] for key in jobs if key in runs},
            **({"floors": {key: floors[key] for key in floor_jobs if key in floors}} if floor_jobs else {}),
        }

    def chosen(all_jobs: Mapping[str, TrainingJob]) -> dict[str, TrainingJob]:
        return {key: job for key, job in all_jobs.items() if data in (None, key.split("/")[0])}

    stored_floors = (stored or {}).get("floors", {})
    with tempfile.TemporaryDirectory() as temporary:
        run_cache = RunCache(run_folder or Path(temporary))

        def trained_run(overrides: Sequence[str], config: DictConfig) -> TrainedRun:
            start = starts[tuple(overrides)]
            start_run = run_cache.get_or_train(start, train.compose(start)).run if start else None
            return run_cache.get_or_train(overrides, config, start=start_run)

        runs = result_cache.measure_missing(
            chosen(jobs),
            lambda job, config: _measure_run(job, config, cast(Split, claim.split), trained_run),
            stored=(stored or {}).get("runs", {}),
            save=lambda runs: save(entry(runs, stored_floors)),
        )
    floors = result_cache.measure_missing(
        chosen(floor_jobs),
        lambda job, config: _measure_floor(job, config, cast(Split, claim.split)),
        stored=stored_floors,
        save=lambda floors: save(entry(runs, floors)),
    )
    save(entry(runs, floors))
    return entry(runs, floors)


def outdated(claim: Claim, entry: Mapping[str, Any]) -> set[str]:
    """Returns the data sets of which stored runs were made by another recipe than today's, or evaluated otherwise. The
    first seed stands for all: they differ in nothing else."""
    seed = claim.seeds[0]
    return {
        source
        for source in claim.data
        for arm in claim.arms
        if (run := entry.get("runs", {}).get(key_of(source, seed, arm.name))) is not None
        if (job := _job(claim, source, seed, arm))
        if run["recipe"] != result_cache.fingerprint(job.config(), job.extra)
    }


def _job(claim: Claim, data: str, seed: int, arm: Arm) -> TrainingJob:
    """Returns the training of one arm, with all that its value depends on."""
    start = _start(claim, data, seed)
    start_recipe = {"start": result_cache.fingerprint(train.compose(start))} if start else {}
    overrides = [*claim.run_overrides(arm, data, seed), COUNT_FLOPS]
    return TrainingJob(overrides, _evaluation(claim, arm) | start_recipe)


def _start(claim: Claim, data: str, seed: int) -> list[str]:
    start = claim.start_overrides(data, seed)
    return [*start, COUNT_FLOPS] if start else []


def _evaluation(claim: Claim, arm: Arm) -> dict[str, Any]:
    return {"metric": dict(claim.metric_of(arm)), "split": claim.split}


def key_of(data: str, seed: int, arm: str) -> str:
    """Returns the key of a run in an entry's ``runs``."""
    return f"{data}/{seed}/{arm}"


def _measure_run(
    job: TrainingJob, config: DictConfig, split: Split, trained_run: Callable[[Sequence[str], DictConfig], TrainedRun]
) -> dict[str, Any]:
    """Returns the ``value`` of one run and what was ``spent``, or why it ``failed``."""
    try:
        trained = trained_run(job.overrides, config)
        value = Metric.parse(job.extra["metric"])(subject_of(trained.run, split))
        metrics = trained.run.metrics()["train"]
        spent: dict[str, Any] = {
            "steps": trained.steps,
            "images": trained.steps * int(config.data.batch_size),
            "seconds": round(trained.seconds, 1),
        }
        if metrics.get("speed/step_flops"):
            spent["flops"] = trained.steps * metrics["speed/step_flops"]
        return {"value": value, "spent": spent} | ({"about": trained.about} if trained.about else {})
    except TrainingFailed as failure:
        if failure.code in STOPPED_CODES:
            raise UserError("the training was stopped; the same command continues with the missing runs") from failure
        reason = failure.reason
    except Exception as problem:
        # one failed run must not cost the others; the page shows the reason
        reason = _reason(problem)
    return {"failed": _shortened(reason)}


def _measure_floor(job: TrainingJob, config: DictConfig, split: Split) -> dict[str, Any]:
    """Returns the ``value`` of an untrained network, or why it ``failed``."""
    print(f"  {' '.join(job.overrides)}, before its first step …", flush=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = config.copy()
            config.run.dir = folder  # a tokenizer may be learned here
            return {"value": Metric.parse(job.extra["metric"])(RunSubject(config, None, split=split))}
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
    """The state of a claim on one data set.

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


def outcome(claim: Claim, entry: Mapping[str, Any], data: str) -> Outcome:
    """Returns the claim's verdict on a data set, which needs every pair: a missing one may contradict the claim.

    Args:
        entry: the claim's part of the ledger, as `measure` returns it; may be empty.
    """
    runs = entry.get("runs", {})
    names = [arm.name for arm in claim.arms]
    pairs: dict[int, tuple[float, float]] = {}
    failed: dict[str, str] = {}
    missing = 0
    for seed in claim.seeds:
        pair = [runs.get(key_of(data, seed, name)) for name in names]
        missing += sum(run is None for run in pair)
        failed |= {
            f"{seed}/{name}": run["failed"] for name, run in zip(names, pair, strict=True) if run and "failed" in run
        }
        values = [run["value"] for run in pair if run and "value" in run]
        if len(values) == 2:
            pairs[seed] = (values[0], values[1])
    difference = paired_difference(*zip(*pairs.values(), strict=True)) if pairs else None
    if missing:
        begun = any(key.startswith(f"{data}/") for key in runs)
        note = f"{len(pairs)} of {len(claim.seeds)} pairs" if begun else ""
        return Outcome(UNFINISHED if begun else NOT_MEASURED, pairs, failed, difference, note)
    if failed:
        note = f"{len(failed)} of {2 * len(claim.seeds)} runs failed"
        return Outcome("inconclusive" if pairs else FAILED, pairs, failed, difference, note)
    uneven = _uneven_budget(claim, runs, data)
    if uneven:
        return Outcome(UNEVEN, pairs, failed, difference, uneven)
    assert difference is not None
    note = "one seed is no verdict" if len(pairs) == 1 else _nothing_learned(pairs, floors_of(claim, entry, data))
    result = verdict(difference, direction=claim.direction, least=claim.least)
    return Outcome(result, pairs, failed, difference, note)


def floors_of(claim: Claim, entry: Mapping[str, Any], data: str) -> list[Mapping[str, Any] | None]:
    """Returns the stored floor of each seed, None where it was not measured."""
    return [entry.get("floors", {}).get(f"{data}/{seed}") for seed in claim.seeds]


def _nothing_learned(pairs: Mapping[int, tuple[float, float]], floors: Sequence[Mapping[str, Any] | None]) -> str:
    """Returns a note if neither arm beats the untrained network: the comparison then says nothing about learning."""
    values = [floor["value"] for floor in floors if floor and "value" in floor]
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
