"""`make gauntlet`: runs every task of configs/gauntlet.yaml on the encoders of several runs, and ranks them.

``run=<folders>`` are the runs, separated by spaces or commas; ``data=<data sets>`` names other data to evaluate on than
their own; ``tasks=<names>`` chooses tasks; ``checkpoint=`` is ``last`` or ``best``, ``last`` by default;
``floor=false`` leaves out the untrained encoders; ``out=<folder>`` is where numbers, page and fine-tuned runs are
written. Results that are there are not measured again. Other arguments change the runs' configurations, as for `make
evaluate`, and ``finetune.<key>=<value>`` the recipes of fine-tuning.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from src import configuration, runs, train, trained
from src.configuration import PROJECT
from src.errors import UserError
from src.evaluation_config import data_name, evaluation_config
from src.files import write_atomically
from src.gauntlet import report
from src.gauntlet.measuring import Failures, frozen_evaluations, measure, task_runs, tasks_named
from src.gauntlet.ranking import Ranking, with_backbones
from src.gauntlet.tasks import GauntletEntry, Task, TaskRun

ARGUMENTS = ("run", "data", "tasks", "checkpoint", "floor", "out")
_FINETUNE = "finetune."


def main(argv: Sequence[str]) -> int:
    inherited = runs.inherited()
    if inherited is not None:
        # this process was started by the launcher of a fine-tuning
        return train.fit(inherited.config(), inherited)
    arguments, others = trained.split_arguments(argv, ARGUMENTS)
    titles = [title for title in re.split(r"[,\s]+", arguments.get("run", "").strip("[] ")) if title]
    if not titles:
        raise UserError(
            'missing value: run; type make gauntlet RUN="runs/<experiment>/<name> runs/<experiment>/<name>"'
        )
    folder = Path(arguments.get("out") or PROJECT / "runs" / "gauntlet")
    tasks = tasks_named(arguments.get("tasks"))
    failures: Failures = {}
    planned = _task_runs([runs.find(title) for title in titles], arguments, others, tasks, folder, failures)

    def save(rows: list[dict[str, Any]]) -> None:
        write(folder, rows, failures)

    ranking = write(folder, measure(planned, stored_rows(folder), failures, save=save), failures)
    report.dashboard(folder, ranking, report.markdown(ranking, failures))
    Console(width=None if sys.stdout.isatty() else 200).print(report.terminal(ranking))
    for name, reason in failures.items():
        print(f"not measured: {name}: {reason}")
    print(f"gauntlet: wrote {folder / 'report.md'}")
    return 0


def _task_runs(
    trained_runs: Sequence[runs.Run],
    arguments: Mapping[str, str],
    others: Sequence[str],
    tasks: Mapping[str, Task],
    folder: Path,
    failures: Failures,
) -> dict[str, TaskRun]:
    """Returns every task of every entry that it applies to, by key; the others are added to ``failures``."""
    floor = arguments.get("floor", "true").lower()
    if floor not in ("true", "false"):
        raise UserError(f"floor is true or false, not '{floor}'")
    overrides = [argument for argument in others if not argument.startswith(_FINETUNE)]
    recipe_overrides = [argument.removeprefix(_FINETUNE) for argument in others if argument.startswith(_FINETUNE)]
    planned: dict[str, TaskRun] = {}
    for run in trained_runs:
        checkpoint = trained.checkpoint_of(run, arguments.get("checkpoint", "last"))
        for data in re.split(r"[,\s]+", arguments["data"].strip("[] ")) if arguments.get("data") else [None]:
            config = evaluation_config(run, data, overrides)
            for weights in (checkpoint, None) if floor == "true" else (checkpoint,):
                entry = GauntletEntry(
                    run,
                    config,
                    _data_name(config, data),
                    weights,
                    frozen_evaluations(tasks),
                    folder / "finetuned",
                    recipe_overrides,
                )
                # the first of several runs that started from the same random weights stands for all
                runs_of_entry = task_runs(entry, tasks, failures)
                planned |= {key: task_run for key, task_run in runs_of_entry.items() if key not in planned}
                entry.forget()
    return planned


def _data_name(config: DictConfig, data: str | None) -> str:
    split = str(config.evaluate.split)
    return (data or data_name(config)) + ("" if split == "val" else f"_{split}")


def stored_rows(folder: Path) -> dict[str, Any]:
    """Returns the rows of an earlier call, by key."""
    file = folder / "scores.json"
    rows = json.loads(file.read_text())["scores"] if file.exists() else []
    return {row["key"]: {name: value for name, value in row.items() if name not in ("key", "backbone")} for row in rows}


def write(folder: Path, rows: Sequence[Mapping[str, Any]], failures: Failures) -> Ranking:
    """Writes the long table and the page of all entries that have ever been measured in this folder."""
    scores = with_backbones(rows)
    write_atomically(folder / "scores.json", json.dumps({"scores": scores}, indent=2) + "\n")
    ranking = Ranking(scores)
    write_atomically(folder / "report.md", report.markdown(ranking, failures))
    return ranking


if __name__ == "__main__":
    configuration.run_main(main)
