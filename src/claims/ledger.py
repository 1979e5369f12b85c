"""The ledger: every claim's pairs of runs, measured once and kept, and the page made of them."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from src import configuration, train
from src.claims.claim import Claim, parse, plain
from src.claims.metrics import Metric, Subject
from src.claims.run_cache import RunCache
from src.claims.verdict import Paired, paired, verdict
from src.errors import UserError
from src.measure import machine, result_cache
from src.measure.report import table
from src.measure.train_command import TrainingFailed

# exit codes of a training that somebody stopped: it did not fail
STOPPED = (143, -15, 130, -2)
# what a run costs is counted in both arms alike
COUNT = "+callbacks.throughput.count_flops=true"

NOT_MEASURED, UNFINISHED, FAILED, UNEVEN = "not measured yet", "unfinished", "failed", "no verdict"


def measure(
    claim: Claim,
    *,
    stored: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda entry: None,
    data: str | None = None,
    kept_in: Path | None = None,
) -> dict[str, Any]:
    """Both arms with every seed on every data set, pair by pair; then their floor: what the second arm scores before
    its first step. There is none of arms that go on from another run, nor of what only training can say.

    Args:
        data: the data set to measure on now, the others another time; None for all.
        stored: the claim's earlier entry; a run of the same recipe, judged alike, is not done again.
        save: is given the entry after each run.
        kept_in: where trained runs stay for other claims, and other questions; see `RunCache`. None for
            nowhere.

    Returns:
        The claim, the arms' ``difference`` by data set, ``runs``: for "<data>/<seed>/<arm>" the ``value`` and what was
        ``spent``, or why it ``failed``; and ``floors``: for "<data>/<seed>" likewise. With where each was measured.

    Raises:
        UserError: the arms differ in more than the claim says, the claim is not about ``data``, or a training was
            stopped.
    """
    if data not in (None, *claim.data):
        raise UserError(f"claim '{claim.name}' is about {', '.join(claim.data)}, not about {data}")
    # before anything is trained
    differences = {each: claim.difference(each) for each in claim.data}
    metrics = [_metric(claim.metric_of(arm)) for arm in claim.arms]
    for metric in metrics:
        if claim.split not in metric.splits:
            judges = f"judges on {' or '.join(metric.splits)}"
            raise UserError(f"claim '{claim.name}': {claim.measured} {judges}, but split is {claim.split}")
    jobs, starts, floors = {}, {}, {}
    floored = claim.start is None and claim.direction == "higher" and metrics[1].untrained
    for each in claim.data:
        for seed in claim.seeds:
            start = claim.start_words(each, seed)
            start = [*start, COUNT] if start else []
            begun = {"start": result_cache.fingerprint(train.compose(start))} if start else {}
            for arm in claim.arms:
                judged = {"metric": dict(claim.metric_of(arm)), "split": claim.split}
                job = result_cache.TrainingJob([*claim.words(arm, each, seed), COUNT], judged | begun)
                jobs[key_of(each, seed, arm.name)], starts[tuple(job.overrides)] = job, start
            if floored:
                floors[f"{each}/{seed}"] = result_cache.TrainingJob(claim.words(claim.arms[1], each, seed), judged)

    def entry(runs: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "claim": plain(claim),
            "difference": {each: {key: list(pair) for key, pair in of.items()} for each, of in differences.items()},
            "runs": {key: runs[key] for key in jobs if key in runs},
            **({"floors": {key: before[key] for key in floors if key in before}} if floors else {}),
        }

    known_floors = (stored or {}).get("floors", {})

    with tempfile.TemporaryDirectory() as gone_afterwards:
        kept = RunCache(kept_in or Path(gone_afterwards))

        def trained(words: Sequence[str], config: DictConfig) -> result_cache.TrainedRun:
            start = starts[tuple(words)]
            begun_from = kept.run(start, train.compose(start)).run if start else None
            return kept.run(words, config, start=begun_from)

        found = result_cache.measure_missing(
            {key: job for key, job in jobs.items() if data in (None, key.split("/")[0])},
            lambda job, config: _one_run(job, config, claim.split, trained),
            stored=(stored or {}).get("runs", {}),
            save=lambda runs: save(entry(runs, known_floors)),
        )
    found_floors = result_cache.measure_missing(
        {key: job for key, job in floors.items() if data in (None, key.split("/")[0])},
        lambda job, config: _one_floor(job, config, claim.split),
        stored=known_floors,
        save=lambda each: save(entry(found, each)),
    )
    save(entry(found, found_floors))
    return entry(found, found_floors)


def key_of(data: str, seed: int, arm: str) -> str:
    return f"{data}/{seed}/{arm}"


def _metric(said: Mapping[str, Any]) -> Metric:
    return configuration.instantiate(dict(said))


def _one_run(
    job: result_cache.TrainingJob,
    config: DictConfig,
    split: str,
    trained: Callable[[Sequence[str], DictConfig], result_cache.TrainedRun],
) -> dict[str, Any]:
    try:
        finished = trained(job.overrides, config)
        value = _metric(job.extra["metric"])(Subject.of(finished.run, split))  # type: ignore[arg-type]
        metrics = finished.run.metrics()["train"]
        spent: dict[str, Any] = {
            "steps": finished.steps,
            "images": finished.steps * int(config.data.batch_size),
            "seconds": round(finished.seconds, 1),
        }
        if metrics.get("speed/step_flops"):
            spent["flops"] = finished.steps * metrics["speed/step_flops"]
        return {"value": value, "spent": spent} | ({"about": finished.about} if finished.about else {})
    except TrainingFailed as failure:
        if failure.code in STOPPED:
            raise UserError("the training was stopped; the same command goes on with what is missing") from failure
        reason = failure.reason
    except Exception as problem:
        # whatever went wrong with one run, the others are worth having, and the page says it
        reason = _reason(problem)
    return {"failed": _short(reason)}


def _one_floor(job: result_cache.TrainingJob, config: DictConfig, split: str) -> dict[str, Any]:
    print(f"  {' '.join(job.overrides)}, before its first step …", flush=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = config.copy()
            config.run.dir = folder  # for a tokenizer that is learned here
            return {"value": _metric(job.extra["metric"])(Subject(config, split))}  # type: ignore[arg-type]
    except Exception as problem:
        return {"failed": _short(_reason(problem))}


def _reason(problem: Exception) -> str:
    return str(problem) if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}"


def _short(reason: str) -> str:
    """One line, without the temporary folder of a run that is no more."""
    words = [
        "…/" + word.rsplit("/", 1)[-1] if word.startswith(tempfile.gettempdir()) else word for word in reason.split()
    ]
    return " ".join(words)[:300]


@dataclass(frozen=True)
class Outcome:
    """What is known of a claim on one data set.

    Args:
        verdict: of the claim, or why there is none.
        pairs: by seed, both arms' values, where both are there.
        failed: by run ("<seed>/<arm>"), why.
        found: of the pairs; None where there is none.
        note: what has to be said of the verdict.
    """

    verdict: str
    pairs: Mapping[int, tuple[float, float]]
    failed: Mapping[str, str]
    found: Paired | None
    note: str = ""


def outcome(claim: Claim, entry: Mapping[str, Any], data: str) -> Outcome:
    """A verdict needs every pair: one that fails or is missing may be the one that speaks against the claim."""
    runs = entry.get("runs", {})
    names = [arm.name for arm in claim.arms]
    pairs: dict[int, tuple[float, float]] = {}
    failed: dict[str, str] = {}
    missing = 0
    for seed in claim.seeds:
        both = [runs.get(key_of(data, seed, name)) for name in names]
        missing += sum(each is None for each in both)
        failed |= {
            f"{seed}/{name}": each["failed"]
            for name, each in zip(names, both, strict=True)
            if each and "failed" in each
        }
        values = [each["value"] for each in both if each and "value" in each]
        if len(values) == 2:
            pairs[seed] = (values[0], values[1])
    found = paired(*zip(*pairs.values(), strict=True)) if pairs else None
    if missing:
        begun = any(key.startswith(f"{data}/") for key in runs)
        note = f"{len(pairs)} of {len(claim.seeds)} pairs" if begun else ""
        return Outcome(UNFINISHED if begun else NOT_MEASURED, pairs, failed, found, note)
    if failed:
        note = f"{len(failed)} of {2 * len(claim.seeds)} runs failed"
        return Outcome("inconclusive" if pairs else FAILED, pairs, failed, found, note)
    uneven = _uneven(claim, runs, data)
    if uneven:
        return Outcome(UNEVEN, pairs, failed, found, uneven)
    assert found is not None
    note = "one seed is no verdict" if len(pairs) == 1 else _unlearned(pairs, _floors(claim, entry, data))
    return Outcome(verdict(found, direction=claim.direction, least=claim.least), pairs, failed, found, note)


def _floors(claim: Claim, entry: Mapping[str, Any], data: str) -> list[Mapping[str, Any] | None]:
    """By seed; None where it was not measured."""
    return [entry.get("floors", {}).get(f"{data}/{seed}") for seed in claim.seeds]


def _unlearned(pairs: Mapping[int, tuple[float, float]], floors: Sequence[Mapping[str, Any] | None]) -> str:
    """A comparison of arms of which neither has learned is one of something else, and has to say so."""
    values = [each["value"] for each in floors if each and "value" in each]
    if len(values) < len(floors):
        return ""
    best = max(statistics.fmean(arm) for arm in zip(*pairs.values(), strict=True))
    return "" if best > statistics.fmean(values) else "neither arm ends above its random start"


def _uneven(claim: Claim, runs: Mapping[str, Any], data: str) -> str:
    """How the budgets that should be equal are not, in the worst pair; else nothing."""
    kind, worst, said = claim.budget.equal, 0.0, ""
    for seed in claim.seeds:
        spent = [runs[key_of(data, seed, arm.name)]["spent"].get(kind) for arm in claim.arms]
        if None in spent:
            return f"{kind} were not counted"
        apart = abs(spent[1] - spent[0]) / max(*spent, 1e-12)
        if apart > max(worst, claim.budget.within):
            worst, said = apart, f"budgets are {100 * apart:.0f} % apart in {kind} ({spent[0]:.4g} and {spent[1]:.4g})"
    return said


def render(results: Mapping[str, Any], claims: Sequence[Claim]) -> str:
    """The page as markdown: of measured claims as they were measured, of ``claims`` those that were not."""
    tried = {claim.name: claim.tried for claim in claims}
    entries: list[tuple[Claim, Mapping[str, Any]]] = [
        (replace(parse(name, entry["claim"]), tried=tried.get(name, "")), entry)
        for name, entry in sorted(results.items())
    ]
    entries += [(claim, {}) for claim in claims if claim.name not in results]
    entries.sort(key=lambda each: each[0].name)
    lines = [
        "# Claims",
        "What papers claim against their own baselines, measured small. Written by `make claim` from "
        "[claims.json](claims.json); change nothing here.",
        "A pair of runs, one an arm, shares its seed; the arms' configurations differ in the listed keys alone. The "
        "last checkpoint is judged. *Reproduced*: the 95 % confidence interval (Student's t) of the paired difference "
        "lies on the claimed side of 0 and the mean difference reaches the least one that counts. *Not reproduced*: "
        "the interval excludes that least difference. *Inconclusive*: neither, or runs have failed. The *random start* "
        "is what the second arm's network scores before its first step; where neither arm ends above it, the verdict "
        "says so, for then it is none about what is learned. A small model on small pictures says nothing of the "
        "paper's own scale.",
    ]
    rows = []
    for claim, entry in entries:
        for data in claim.data:
            rows.append(_row(claim, entry, data))
    head = ["claim", "data", "metric", "wanted", "difference [95 %]", "pairs", "verdict"]
    lines.append(table(head, rows) if rows else "There are no claims yet.")
    for claim, entry in entries:
        lines += _section(claim, entry)
    return "\n\n".join(lines) + "\n"


def _row(claim: Claim, entry: Mapping[str, Any], data: str) -> list[str]:
    stored = outcome(claim, entry, data)
    return [
        f"[{claim.title}](#{claim.name})",
        data,
        claim.measured,
        f"{claim.direction} by {claim.least:g}",
        _interval(stored.found),
        f"{len(stored.pairs)} of {len(claim.seeds)}",
        _said(stored),
    ]


def _said(stored: Outcome) -> str:
    bold = f"**{stored.verdict}**" if stored.verdict in ("reproduced", "not reproduced", FAILED) else stored.verdict
    return f"{bold} ({stored.note})" if stored.note else bold


def _interval(found: Paired | None) -> str:
    if found is None:
        return "–"
    if found.low is None:
        return f"{found.difference:+.4g}"
    return f"{found.difference:+.4g} [{found.low:+.4g}, {found.high:+.4g}]"


def _section(claim: Claim, entry: Mapping[str, Any]) -> list[str]:
    baseline, claimed = claim.arms
    within = f" (within {100 * claim.budget.within:g} %)" if claim.budget.within else ""
    lines = [
        f'<a id="{claim.name}"></a>\n\n## {claim.title}',
        f"> {' '.join(claim.claim.split())}\n>\n> {claim.paper}",
        f"*{claimed.name}* against *{baseline.name}*: {claim.measured}, {claim.split} split, {claim.direction} by at "
        f"least {claim.least:g}. "
        f"Equal {claim.budget.equal}{within}: {' '.join(claim.budget.how.split())}. "
        f"Seeds {', '.join(map(str, claim.seeds))}.",
    ]
    if claim.start is not None:
        how = " ".join([f"experiment={claim.start.experiment}", *claim.start.overrides])
        lines.append(f"With each seed both go on from one run of *{claim.start.name}*: `{how}`.")
    if claim.tried:
        lines.append(f"Tried: {' '.join(claim.tried.split())}")
    if not entry:
        return [*lines, f"Not measured yet: `make claim CLAIM={claim.name}`."]
    for data in claim.data:
        lines += _part(claim, entry, data)
    return lines


def _part(claim: Claim, entry: Mapping[str, Any], data: str) -> list[str]:
    runs = {key: each for key, each in entry["runs"].items() if key.startswith(f"{data}/")}
    stored = outcome(claim, entry, data)
    lines = [f"### {claim.name} on {data}: {_said(stored)}"]
    if not runs:
        return lines
    changed = [[f"`{key}`", *(f"`{value}`" for value in pair)] for key, pair in entry["difference"][data].items()]
    lines.append(table(["differs", *(arm.name for arm in claim.arms)], changed))
    rows = []
    for arm in claim.arms:
        each = [runs.get(key_of(data, seed, arm.name)) for seed in claim.seeds]
        rows.append(_scored(arm.name, each))
    if stored.pairs:
        differences = [
            f"{stored.pairs[seed][1] - stored.pairs[seed][0]:+.4g}" if seed in stored.pairs else "–"
            for seed in claim.seeds
        ]
        rows.append(["difference", *differences, _interval(stored.found)])
    floors = _floors(claim, entry, data)
    if any(floors):
        rows.append(_scored("random start", floors))
    lines.append(table(["", *(f"seed {seed}" for seed in claim.seeds), "mean ± deviation"], rows))
    lines += [f"- Failed, seed {key.replace('/', ', ', 1)}: {reason}" for key, reason in stored.failed.items()]
    spent = [
        _spent(arm.name, [runs.get(key_of(data, seed, arm.name), {}) for seed in claim.seeds]) for arm in claim.arms
    ]
    where = machine.lines([run["about"] for run in runs.values()])
    return [*lines, "\n".join(f"- {line}" for line in [*spent, *where] if line)]


def _scored(name: str, runs: Sequence[Mapping[str, Any] | None]) -> list[str]:
    return [name, *map(_shown, runs), _mean([run["value"] for run in runs if run and "value" in run])]


def _shown(run: Mapping[str, Any] | None) -> str:
    if run is None:
        return "–"
    return "failed" if "failed" in run else f"{run['value']:.4g}"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else " (one seed)"
    return f"{statistics.fmean(values):.4g}{spread}"


def _spent(arm: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """What a run of an arm cost on average."""
    spent = [run["spent"] for run in runs if "spent" in run]
    if not spent:
        return ""
    kinds = [kind for kind in ("steps", "images", "seconds", "flops") if all(kind in each for each in spent)]
    means = {kind: statistics.fmean(each[kind] for each in spent) for kind in kinds}
    said = [f"{means[k]:.3g} {k}" if k == "flops" else f"{means[k]:,.0f} {k}" for k in kinds]
    return f"Spent by a run of *{arm}*: {', '.join(said)}"
