"""`make gauntlet`: several runs' encoders through every task of configs/gauntlet.yaml, and a ranking of them.

``run=<folders>`` are the runs, one after the other with spaces or commas between; ``data=<data sets>`` says on what
else than their own data they are judged; ``tasks=<names>`` leaves the others out; ``checkpoint=`` is ``last`` unless it
says ``best``; ``floor=false`` leaves out the untrained encoders; ``out=<folder>`` is where numbers, page and fine-tuned
runs go. What was measured there is not measured again. Other words change the runs' configurations, as for `make
evaluate`, and ``finetune.<key>=<value>`` the recipes of fine-tuning.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from src import configuration, evaluate, runs, train, trained
from src.bench import machine, once
from src.configuration import CONFIGS, PROJECT, UserError, nearest
from src.gauntlet import report
from src.gauntlet.standing import Standing, with_backbones
from src.gauntlet.tasks import Cell, Contender, Frozen, Task
from src.loggers import write_atomically

log = logging.getLogger(__name__)

WORDS = ("run", "data", "tasks", "checkpoint", "floor", "out")


def main(argv: Sequence[str]) -> int:
    shared = runs.inherited()
    if shared is not None:
        # a process that a fine-tuning's launcher started: what comes before it is done
        return train.fit(shared.config(), shared)
    words, rest = trained.words_of(argv, WORDS)
    titles = [title for title in re.split(r"[,\s]+", words.get("run", "").strip("[] ")) if title]
    if not titles:
        raise UserError('say which runs: make gauntlet RUN="runs/<experiment>/<name> runs/<experiment>/<name>"')
    folder = Path(words.get("out") or PROJECT / "runs" / "gauntlet")
    tasks = chosen(words.get("tasks"))
    told: Failures = {}
    cells = _cells([runs.find(title) for title in titles], words, rest, tasks, folder, told)

    def keep(rows: list[dict[str, Any]]) -> None:
        write(folder, rows, told)

    standing = write(folder, measure(cells, known(folder), told, keep=keep), told)
    report.dashboard(folder, standing, report.markdown(standing, told))
    Console(width=None if sys.stdout.isatty() else 200).print(report.terminal(standing))
    for name, reason in told.items():
        print(f"not measured: {name}: {reason}")
    print(f"gauntlet: wrote {folder / 'report.md'}")
    return 0


Failures = dict[str, str]  # what could not be measured -> why


def chosen(names: str | None) -> dict[str, Task]:
    """The tasks of configs/gauntlet.yaml, or those of them that are named.

    Raises:
        UserError: there is no such task.
    """
    config = OmegaConf.load(CONFIGS / "gauntlet.yaml")
    tasks = list(map(str, config.tasks))
    wanted = tasks if not names else [name for name in re.split(r"[,\s]+", names.strip("[] ")) if name]
    for name in wanted:
        if name not in tasks:
            raise UserError(f"the gauntlet has no task '{name}'{nearest(name, tasks)}")
    return {name: configuration.instantiate(config.tasks[name]) for name in wanted}


def _cells(
    found: Sequence[runs.Run],
    words: Mapping[str, str],
    rest: Sequence[str],
    tasks: Mapping[str, Task],
    folder: Path,
    told: Failures,
) -> dict[str, Cell]:
    """Every task of every contender that it applies to, by key; what does not apply is told."""
    floor = words.get("floor", "true").lower()
    if floor not in ("true", "false"):
        raise UserError(f"floor is true or false, not '{floor}'")
    overrides = [word for word in rest if not word.startswith("finetune.")]
    frozen = list(dict.fromkeys(task.evaluation for task in tasks.values() if isinstance(task, Frozen)))
    cells: dict[str, Cell] = {}
    for run in found:
        checkpoint = trained.checkpoint_of(run, words.get("checkpoint", "last"))
        for data in re.split(r"[,\s]+", words["data"].strip("[] ")) if words.get("data") else [None]:
            config = evaluate.settle(run, data, overrides)
            for weights in (checkpoint, None) if floor == "true" else (checkpoint,):
                contender = Contender(
                    run,
                    config,
                    _data_name(config, data),
                    weights,
                    frozen,
                    folder / "finetuned",
                    [word.removeprefix("finetune.") for word in rest if word.startswith("finetune.")],
                )
                for name, task in tasks.items():
                    try:
                        cell = Cell(name, task, contender)
                    except UserError as problem:
                        told[f"{contender.title}, {name}/{contender.data}"] = str(problem)
                    else:
                        cells.setdefault(cell.key, cell)  # several runs may have begun with the same weights
                contender.forget()
    return cells


def _data_name(config: DictConfig, data: str | None) -> str:
    split = str(config.evaluate.split)
    return (data or evaluate.data_name(config)) + ("" if split == "val" else f"_{split}")


def measure(
    cells: Mapping[str, Cell],
    earlier: Mapping[str, Any],
    told: Failures,
    *,
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """The rows of what is known and of what had to be measured now. A task that fails is told and ends nothing.

    Args:
        cells: by key.
        earlier: rows by key.
        told: is given what fails.
        keep: is given all rows after each number.

    Raises:
        UserError: in one setting some are judged on other samples than the rest.
    """
    alike = {row["setting"]: row["judged_on"] for key, row in earlier.items() if key not in cells}
    for cell in cells.values():
        if alike.setdefault(cell.setting, cell.judged_on) != cell.judged_on:
            raise UserError(
                f"{cell.contender.title} would be judged by {cell.setting} on other samples than the rest: "
                'say the same for all, such as ARGS="data.source.count={train: 2000, val: 500, test: 500} '
                'data.train_samples=null evaluate.bank_samples=null evaluate.query_samples=null", or another out='
            )
    before: list[Contender] = []

    def one(cell: Cell, config: DictConfig) -> dict[str, Any]:
        if before and before[-1] is not cell.contender:
            before.pop().forget()
        before[:] = [cell.contender]
        title = f"{cell.contender.title}, {cell.setting}"
        print(f"gauntlet: {title} …", flush=True)
        try:
            parameters = sum(each.numel() for each in cell.contender.encoder.parameters())
            value = cell.task(cell.contender)
            if not math.isfinite(value):
                raise UserError(f"{cell.task.metric} is not a finite number")
        except UserError as problem:
            told[title] = str(problem)
        except Exception as problem:  # one task's mistake must not cost the others' hours
            log.exception("%s", title)
            told[title] = f"{type(problem).__name__}: {problem}"
        else:
            return {**cell.facts(), "parameters": parameters, "value": value}
        return {"value": None}

    def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"key": key, **row} for key, row in found.items() if row["value"] is not None]

    found = once.measure_missing(
        cells, one, known=earlier, keep=lambda found: keep(rows(found)), about=cache(machine.about)
    )
    return rows(found)


def known(folder: Path) -> dict[str, Any]:
    """The rows of an earlier call, by key."""
    file = folder / "scores.json"
    rows = json.loads(file.read_text())["scores"] if file.exists() else []
    return {row["key"]: {name: value for name, value in row.items() if name not in ("key", "backbone")} for row in rows}


def write(folder: Path, rows: Sequence[Mapping[str, Any]], told: Failures) -> Standing:
    """The long table and the page, of everybody who has ever taken part in this folder."""
    scores = with_backbones(rows)
    write_atomically(folder / "scores.json", json.dumps({"scores": scores}, indent=2) + "\n")
    standing = Standing(scores)
    write_atomically(folder / "report.md", report.markdown(standing, told))
    return standing


if __name__ == "__main__":
    configuration.run_main(main)
