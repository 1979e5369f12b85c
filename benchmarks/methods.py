"""Trains every experiment at its tiny scale, and compares it with its random start."""

from __future__ import annotations

import resource
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
from omegaconf import DictConfig

from src import configuration
from src.claims.metrics import values_of
from src.measure import machine, result_cache, side_by_side
from src.measure.report import Check, Section, table
from src.measure.result_cache import TrainingJob
from src.trained import RunSubject, fresh

SEEDS = (0, 1, 2)
POINTS = 0.10  # that a method must gain over its random start, with every seed
CORE_SECONDS = 360.0  # three minutes of two cores
LEFT_OUT = ("mae_tiny",)  # mae_vitb at this scale under another name
TEACHERS = ("DINO", "DINOv2", "IJEPA", "iBOT")  # methods whose paper evaluates the teacher
LOWER = ("eval/abs_rel", "eval/normals_mean")  # errors, which have no points
EVALUATIONS = {"knn_top1": "knn", "zeroshot_top1": "zeroshot"}  # of trained encoders and towers; others log their own
TITLES = {
    "knn_top1": "kNN, top-1",
    "zeroshot_top1": "zero-shot, top-1",
    "eval/top1": "top-1",
    "eval/miou": "mean IoU",
    "eval/box_ap": "box AP",
    "eval/abs_rel": "relative error of depth",
    "eval/normals_mean": "error of normals, degrees",
}
_QUICK = ("data.source.count={train: 256, val: 64, test: 64}", "trainer.max_epochs=1")

# experiment -> what was tried where it gains less
TRIED: dict[str, str] = {
    "dino_vits": "rates, momenta, prototypes and a faster center, see "
    "[tiny.md](tiny.md#what-does-not-learn-enough-yet)",
    "simsiam_r50": "a rate of 0.1 for SGD instead of 0.025; no other",
    "swav_r50": "rates, optimizers, a smaller smoothness and prototypes that are frozen for 1 % of the run, see "
    "[tiny.md](tiny.md#what-does-not-learn-enough-yet)",
}


def metric_of(config: DictConfig) -> str:
    """Returns the number that an experiment is judged by: what its checkpoints are chosen by if that is said, else
    zero-shot accuracy for an image and a text tower, and kNN for an encoder."""
    monitor = config.callbacks.checkpoints.get("monitor")
    if monitor is not None and str(monitor) in TITLES:
        return str(monitor)
    return "zeroshot_top1" if config.callbacks.get("image_text") else "knn_top1"


def measure(
    quick: bool = False,
    *,
    stored: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
    overrides: Sequence[str] = (),
    experiments: Sequence[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    workers: int | None = None,
) -> dict[str, Any]:
    """Trains every experiment with ``SCALE=tiny`` on its own data, as `make train` does, and evaluates it and its
    random start on the whole validation split, with the whole training split as bank.

    Args:
        stored: an earlier result; runs of the same recipe are not repeated.
        save: receives the result after each run, so that an interruption loses the runs that are under way.
        overrides: of the configuration.
        experiments: their names; None for all.
        workers: runs at once, one thread each; None for one on each core.

    Returns:
        ``runs``: for "<experiment>/<seed>" the ``metric``, its values ``start`` and ``end``, the ``steps``, ``images``,
        ``core_seconds`` of the training command and ``rate`` in images per core-second, and where it was measured.
    """
    names = experiments or [name for name in configuration.names("experiment") if name not in LEFT_OUT]
    if quick:
        names, seeds, overrides = names[:2], (0,), (*overrides, *_QUICK)
    jobs = {
        f"{name}/{seed}": TrainingJob([f"experiment={name}", "scale=tiny", f"seed={seed}", *overrides])
        for seed in seeds  # an unfinished table has all experiments
        for name in names
    }
    recipes = {key: result_cache.fingerprint(job.config()) for key, job in jobs.items()}
    runs = {
        key: run
        for key, run in (stored or {}).get("runs", {}).items()
        if key in recipes and run["recipe"] == recipes[key]
    }
    missing = [key for key in jobs if key not in runs]
    progress = side_by_side.Progress(len(missing))
    measure_one = partial(_measure_run, jobs={key: jobs[key] for key in missing})
    for key, run in side_by_side.results(missing, measure_one, workers or side_by_side.default_workers()):
        runs[key] = run | {"recipe": recipes[key]}
        save({"runs": dict(runs)})
        progress.report(f"{key}: {run['metric']} {run['start']:.3f} to {run['end']:.3f}, {run['core_seconds']:.0f} s")
    return {"runs": runs}


def _measure_run(key: str, jobs: Mapping[str, TrainingJob]) -> dict[str, Any]:
    job = jobs[key]
    config = job.config()
    metric, about = metric_of(config), machine.about()
    start = score(config, None, metric)
    before = _children_seconds()
    with result_cache.train_once(job.overrides, config) as trained:
        seconds = _children_seconds() - before
        end = score(config, trained, metric)
        steps = trained.steps
    images = steps * int(config.data.batch_size)
    return {
        "about": about,
        "metric": metric,
        "start": start,
        "end": end,
        "steps": steps,
        "images": images,
        "core_seconds": seconds,
        "rate": images / seconds,
    }


def score(config: DictConfig, trained: result_cache.TrainedRun | None, metric: str) -> float:
    """Returns the number of a trained run, or of its random start for None."""
    if metric not in EVALUATIONS:  # of the method's own validation
        if trained is not None:
            return float(trained.run.metrics()["train"][metric])
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        (values,) = trainer.validate(fresh(config), configuration.instantiate(config.data), verbose=False)
        return float(values[metric])
    teacher = str(config.model._target_).rsplit(".", 1)[-1] in TEACHERS
    spec = {"evaluation": EVALUATIONS[metric], "value": metric, "encoder": "teacher" if teacher else None}
    subject = RunSubject(
        config if trained is None else trained.run.config(), None if trained is None else trained.run.last
    )
    return values_of({metric: spec}, subject)[metric]


def _children_seconds() -> float:
    """Returns the CPU time of all ended child processes, of all their threads."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def report(result: Mapping[str, Any]) -> Section:
    by_name: dict[str, dict[int, Any]] = {}
    for key, run in result["runs"].items():
        name, _, seed = key.rpartition("/")
        by_name.setdefault(name, {})[int(seed)] = run
    rows = [_row(name, list(by_name[name].values())) for name in sorted(by_name)]
    head = ["experiment", "metric", "random start", "trained", "least gain", "steps", "core-seconds", "images/s"]
    tried = "\n".join(f"- {name}: {TRIED[name]}" for name in sorted(TRIED) if name in by_name)
    abouts = [run["about"] for runs in by_name.values() for run in runs.values()]
    body = [
        "`make train EXP=<experiment> SCALE=tiny` on its own data, with every default callback, and the same network "
        "before its first step. kNN and zero-shot accuracy are of the whole validation split (2,500 scenes or films) "
        "with the whole training split as bank; other numbers are those of the method's own validation. Of DINO, "
        "DINOv2, I-JEPA and iBOT the teacher is evaluated, as in their papers. Mean and standard deviation over seeds; "
        "the least gain is that of the seed with the smallest one. Core-seconds are the CPU time of the whole command, "
        "all threads added up, imports and evaluation during training included; images/s are per core-second.",
        table(head, rows),
        *([f"Tried where the gain is smaller:\n\n{tried}"] if tried else []),
        f"Seeds {', '.join(map(str, sorted({seed for runs in by_name.values() for seed in runs})))}.",
        "\n".join(f"- {line}" for line in machine.lines(abouts)),
    ]
    return Section("Every method at its tiny scale", _checks(by_name), "\n\n".join(body))


def _row(name: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    metric = runs[0]["metric"]
    scale = 1 if metric in LOWER else 100
    mark = "" if metric in LOWER or _gain(runs) >= POINTS else " **too little**"
    return [
        name,
        TITLES[metric],
        _mean([scale * run["start"] for run in runs], metric),
        _mean([scale * run["end"] for run in runs], metric),
        f"{scale * _gain(runs):+.{3 if metric in LOWER else 1}f}{mark}",
        f"{statistics.fmean(run['steps'] for run in runs):,.0f}",
        f"{statistics.fmean(run['core_seconds'] for run in runs):.0f}",
        f"{statistics.fmean(run['rate'] for run in runs):.0f}",
    ]


def _gain(runs: Sequence[Mapping[str, Any]]) -> float:
    """Returns the smallest gain over the random start of all seeds, positive where the trained network is better."""
    sign = -1 if runs[0]["metric"] in LOWER else 1
    return min(sign * (run["end"] - run["start"]) for run in runs)


def _checks(by_name: Mapping[str, Mapping[int, Any]]) -> list[Check]:
    names = [name for name in configuration.names("experiment") if name not in LEFT_OUT]
    whole = all(set(SEEDS) <= set(by_name.get(name, {})) for name in names)
    gains = {name: (_gain(list(runs.values())), next(iter(runs.values()))["metric"]) for name, runs in by_name.items()}
    low = sorted(name for name, (gain, metric) in gains.items() if gain < (0 if metric in LOWER else POINTS))
    slow = sorted(
        name
        for name, runs in by_name.items()
        if statistics.fmean(run["core_seconds"] for run in runs.values()) > CORE_SECONDS
    )
    return [
        Check(
            f"every experiment at SCALE=tiny ends {100 * POINTS:.0f} points above its random start",
            f"{len(names)} experiments, every one of {len(SEEDS)} seeds",
            f"not: {', '.join(low)}" if low else f"all of {len(by_name)} measured",
            False if low else (True if whole else None),
        ),
        Check(
            "a run at SCALE=tiny",
            f"≤ {CORE_SECONDS:.0f} core-seconds, 3 minutes of 2 cores",
            f"more: {', '.join(slow)}" if slow else f"at most {_slowest(by_name):.0f}",
            False if slow else (True if whole else None),
        ),
    ]


def _slowest(by_name: Mapping[str, Mapping[int, Any]]) -> float:
    means = [statistics.fmean(run["core_seconds"] for run in runs.values()) for runs in by_name.values()]
    return max(means, default=0.0)


def _mean(values: Sequence[float], metric: str) -> str:
    digits = 3 if metric in LOWER else 1
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"
