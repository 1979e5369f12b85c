"""Runs every task of the gauntlet on small encoders: three pretraining paradigms and a random initialization."""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from src import runs
from src.evaluation_config import evaluation_config
from src.gauntlet.measuring import Failures, frozen_evaluations, task_runs, tasks_named
from src.gauntlet.measuring import measure as put_through
from src.gauntlet.ranking import Ranking
from src.gauntlet.report import ranking_table
from src.gauntlet.tasks import FineTuned, GauntletEntry, Task
from src.measure import machine, result_cache
from src.measure.report import Check, Section, table

DATA = "scenes"
SEEDS = (0, 1, 2)
FLOOR = "random"

# a narrow ViT and small batches, because the table needs dozens of trainings
COMMON = (
    "scale=tiny",
    f"data={DATA}",
    "image_size=64",
    "local_image_size=32",
    "backbone=vit",
    "backbone.patch_size=8",
    "backbone.embed_dim=96",
    "backbone.depth=4",
    "backbone.num_heads=3",
    "data.batch_size=64",
    "callbacks.evaluation=null",
    "callbacks.visualizations=null",
)
JUDGED = ("evaluate.bank_samples=5000", "evaluate.query_samples=null")
# few annotated images, the setting that pretraining is for
FINETUNED = (
    "data.source.count={train: 1000, val: 500, test: 500}",
    "data.train_samples=null",
    "data.eval_samples=null",
    "data.batch_size=16",
    "trainer.max_epochs=4",
    "trainer.check_val_every_n_epoch=2",
)
# detection trains at ten images per second
SHORTER: Mapping[str, Sequence[str]] = dict.fromkeys(("detection", "detection_frozen"), ("trainer.max_epochs=2",))


@dataclass(frozen=True)
class Encoder:
    """A row of the table.

    Args:
        title: the paper's name.
        experiment: its recipe.
        epochs: chosen so that all take about equally long; None for an untrained encoder.
    """

    title: str
    experiment: str
    epochs: int | None


ENCODERS: dict[str, Encoder] = {
    FLOOR: Encoder("random start", "supervised_vits", None),
    "supervised": Encoder("supervised", "supervised_vits", 3),
    "mae": Encoder("MAE", "mae_tiny", 6),
    "moco_v3": Encoder("MoCo v3", "moco_v3_vits", 2),
}


def measure(
    quick: bool = False,
    *,
    stored: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
    overrides: Sequence[str] = (),
    finetuned: Sequence[str] = (),
    encoders: Sequence[str] = tuple(ENCODERS),
    data: Sequence[str] = (DATA,),
    seeds: Sequence[int] = SEEDS,
    tasks: str | None = None,
) -> dict[str, Any]:
    """Trains each encoder with each seed and runs the tasks of `make gauntlet` on the validation split, seed by seed.

    An encoder is trained only if a result of one of its tasks is missing.

    Args:
        overrides, finetuned: overrides of the encoders' configurations, and of the fine-tunings'.
        data: nothing is measured unless it contains "scenes".
        tasks: names separated by commas; None for all.

    Returns:
        ``runs``: for "<encoder>/<seed>/<task>" the ``scores`` (one row of `Ranking`, or none and the reason in
        ``failures``), ``steps`` and ``minutes`` of the training, and where it was measured.
    """
    if DATA not in data:
        return dict(stored or {"runs": {}})
    small = ["data.source.count={train: 512, val: 64, test: 64}", "trainer.max_epochs=1"] if quick else []
    fine = [*(["data.source.count=64", "trainer.max_epochs=1"] if quick else []), *finetuned]
    names = _tasks(tasks)
    jobs = {
        f"{name}/{seed}/{task}": result_cache.TrainingJob(
            [
                f"experiment={ENCODERS[name].experiment}",
                *COMMON,
                f"seed={seed}",
                *([f"trainer.max_epochs={ENCODERS[name].epochs}"] if ENCODERS[name].epochs else []),
                *small,
                *overrides,
            ],
            extra={
                "trained": ENCODERS[name].epochs is not None,
                "task": repr(each),
                "judged": fine if isinstance(each, FineTuned) else list(JUDGED),
            },
        )
        for seed in ((0,) if quick else seeds)
        for name in encoders
        for task, each in names.items()
    }
    task_of = {repr(each): {task: each} for task, each in names.items()}
    with _Entries(fine, frozen_evaluations(names)) as entries:
        results = result_cache.measure_missing(
            jobs,
            lambda job, config: run_tasks(*entries.of(job, config), task_of[job.extra["task"]]),
            stored=(stored or {}).get("runs", {}),
            save=lambda each: save({"runs": each}),
        )
    return {"runs": results}


def run_tasks(entry: GauntletEntry, training: Mapping[str, Any], tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Returns the facts of an encoder's training, its scores in the tasks, and the reasons of failed tasks."""
    failures: Failures = {}
    rows = put_through(task_runs(entry, tasks, failures), {}, failures, save=lambda rows: None)
    columns = ("setting", "metric", "kind", "adaptation", "lower_is_better", "parameters", "value")
    return {**training, "scores": [{name: row[name] for name in columns} for row in rows], "failures": failures}


class _Entries(ExitStack):
    """Trains the encoder of the current job, and keeps it until a job needs another one.

    Args:
        finetuned: overrides of its fine-tunings.
        frozen: evaluations of frozen features that the jobs need.
    """

    def __init__(self, finetuned: Sequence[str], frozen: Sequence[str]) -> None:
        super().__init__()
        self.finetuned, self.frozen = finetuned, frozen
        self._overrides: Sequence[str] = ()

    def of(self, job: result_cache.TrainingJob, config: DictConfig) -> tuple[GauntletEntry, dict[str, Any]]:
        """Returns the job's encoder, and the steps and minutes of its training."""
        if job.overrides != self._overrides:
            self.close()
            self._overrides = ()  # in case the training fails
            run, checkpoint, self._training = self._begin(job, config)
            settled = evaluation_config(run, None, JUDGED)
            folder = run.dir / "finetuned"
            self._entry = GauntletEntry(run, settled, DATA, checkpoint, self.frozen, folder, self.finetuned)
            self._overrides = job.overrides
        return self._entry, self._training

    def _begin(self, job: result_cache.TrainingJob, config: DictConfig) -> tuple[runs.Run, Path | None, dict[str, Any]]:
        if job.extra["trained"]:
            trained = self.enter_context(result_cache.train_once(job.overrides, config))
            run = trained.run
            return run, run.last, {"steps": trained.steps, "minutes": trained.seconds / 60}
        run = runs.Run(Path(self.enter_context(tempfile.TemporaryDirectory())))
        runs.store(run, config)
        return run, None, {"steps": 0, "minutes": 0.0}


def _tasks(names: str | None) -> dict[str, Task]:
    """Returns the tasks of configs/gauntlet.yaml, with few images and epochs for fine-tuning."""
    tasks = tasks_named(names)
    for name, task in tasks.items():
        if isinstance(task, FineTuned):
            tasks[name] = replace(task, overrides=[*task.overrides, *FINETUNED, *SHORTER.get(name, ())])
    return tasks


def report(result: dict[str, Any]) -> Section:
    rows = _rows(result)
    ranking = Ranking(rows)
    head, ranks = ranking_table(ranking)
    floor = ENCODERS[FLOOR].title
    body = [
        f"Encoders of one small ViT on {DATA} of 64 pixels, each trained with every seed and then evaluated by all "
        f"tasks of `make gauntlet`; heads and fine-tuned encoders see 1,000 annotated images {_epochs()} times "
        f"(detection {_epochs(SHORTER['detection'])}). "
        f"{_training(result)} Evaluated on the validation split.",
        "Mean z-scores over tasks, of means over seeds:",
        table(head, ranks),
        f"Scores, mean and standard deviation over seeds. Above the {floor}: how much better the mean of the best "
        "other encoder is, and with how many seeds it is better.",
        table(
            ["", "metric", *ranking.order, f"above the {floor}"],
            [_line(rows, setting, ranking.order) for setting in ranking.settings],
        ),
    ]
    failures = {key: why for key, run in result["runs"].items() for why in run["failures"].values()}
    if failures:
        body.append("Not measured:\n\n" + "\n".join(f"- {name}: {why}" for name, why in failures.items()))
    body.append("\n".join(f"- {each}" for each in machine.lines([run["about"] for run in result["runs"].values()])))
    return Section("The gauntlet", [_check(result, rows, ranking.settings)], "\n\n".join(body))


def _rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns one row per score, with encoder and seed."""
    return [
        {**row, "backbone": ENCODERS[name].title, "seed": int(seed)}
        for key, run in result["runs"].items()
        for name, seed, _ in [key.split("/")]
        for row in run["scores"]
    ]


def _epochs(overrides: Sequence[str] = FINETUNED) -> str:
    return next(override.partition("=")[2] for override in overrides if override.startswith("trainer.max_epochs="))


def _training(result: Mapping[str, Any]) -> str:
    """Returns a sentence on the trainings, and one on the number of scores if some are missing."""
    trainings = []
    for name, encoder in ENCODERS.items():
        keys = [key for key in result["runs"] if key.partition("/")[0] == name]
        runs = [*{key.rpartition("/")[0]: result["runs"][key] for key in keys}.values()]  # one of each seed
        if runs and encoder.epochs is not None:
            minutes = statistics.fmean(run["minutes"] for run in runs)
            trainings.append(f"{encoder.title} {runs[0]['steps']:,} steps of 64 in {minutes:.1f} minutes")
    wanted = _wanted()
    there = len(wanted & result["runs"].keys())
    missing = [f"Of {len(wanted)} scores there are {there} so far."] if there < len(wanted) else []
    return " ".join([*([f"Trained: {', '.join(trainings)}."] if trainings else []), *missing])


def _values(rows: Sequence[Mapping[str, Any]], setting: str) -> dict[str, dict[int, float]]:
    """Returns encoder -> seed -> score, with the sign of errors changed so that higher is better."""
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["setting"] == setting:
            value = -row["value"] if row["lower_is_better"] else row["value"]
            values.setdefault(row["backbone"], {})[row["seed"]] = value
    return values


def above(rows: Sequence[Mapping[str, Any]], setting: str) -> tuple[str, list[float]] | None:
    """Returns the encoder with the best mean, except the floor, and its difference to the floor with each seed."""
    values = _values(rows, setting)
    floor = values.pop(ENCODERS[FLOOR].title, {})
    if not floor or not values:
        return None
    best = max(values, key=lambda name: statistics.fmean(values[name].values()))
    differences = [values[best][seed] - floor[seed] for seed in sorted(values[best].keys() & floor.keys())]
    return (best, differences) if differences else None


def _line(rows: Sequence[Mapping[str, Any]], setting: str, order: Sequence[str]) -> list[str]:
    one = next(row for row in rows if row["setting"] == setting)
    sign = -1 if one["lower_is_better"] else 1
    cells = []
    for name in order:
        values = [sign * value for value in _values(rows, setting).get(name, {}).values()]
        spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
        cells.append(f"{statistics.fmean(values):.3g}{spread}" if values else "–")
    best_of_others = above(rows, setting)
    advantage = "–"
    if best_of_others is not None:
        best, differences = best_of_others
        better = sum(each > 0 for each in differences)
        advantage = f"{statistics.fmean(differences):+.2g} ({best}, {better} of {len(differences)})"
    return [setting, f"{one['metric']} {'↓' if sign < 0 else '↑'}", *cells, advantage]


def _wanted() -> set[str]:
    """Returns the keys of a complete result."""
    return {"/".join(key) for key in itertools.product(ENCODERS, map(str, SEEDS), tasks_named(None))}


def _check(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], settings: Sequence[str]) -> Check:
    # the best of three is often above the floor by chance, so every seed must be
    advantages = {setting: above(rows, setting) for setting in settings}
    below = [setting for setting, best in advantages.items() if best is not None and min(best[1]) <= 0]
    complete = _wanted() <= result["runs"].keys() and not any(run["failures"] for run in result["runs"].values())
    return Check(
        f"every head of the gauntlet on {DATA} is better on some trained encoder than on a random one, with every seed",
        f"{len(settings)} heads, {len(SEEDS)} seeds",
        f"not: {', '.join(below)}" if below else f"all of {len(settings)}",
        False if below else (True if complete else None),
    )
