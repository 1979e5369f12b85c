"""The results of `make evaluate`: files in the run's folder, and a table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from rich.table import Table

from src import runs
from src.files import write_atomically

Scores = Mapping[str, Mapping[str, float]]  # encoder -> metric -> value

_COLUMNS = 6  # of the printed table


def store(run: runs.Run, data: str, scores: Scores) -> None:
    """Adds the scores to ``evaluate/<data>.json`` and to the run's ``metrics.json``."""
    file = run.dir / "evaluate" / f"{data}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    stored = json.loads(file.read_text()) if file.exists() else {}
    for encoder, values in scores.items():
        stored[encoder] = stored.get(encoder, {}) | dict(values)
    write_atomically(file, json.dumps(stored, indent=2) + "\n")
    metrics = run.metrics()
    metrics["evaluate"] = metrics.get("evaluate", {}) | {data: stored}
    write_atomically(run.metrics_file, json.dumps(metrics, indent=2) + "\n")


def score_table(title: str, scores: Scores) -> Table:
    """Returns a table with a row for each encoder, or a column if there are more metrics than fit beside each other."""
    metrics = list(dict.fromkeys(metric for values in scores.values() for metric in values))
    table = Table(title=title, title_justify="left")
    if len(metrics) <= _COLUMNS:
        table.add_column("encoder")
        for metric in metrics:
            table.add_column(metric, justify="right")
        for encoder, values in scores.items():
            table.add_row(encoder, *(_formatted(metric, values.get(metric)) for metric in metrics))
        return table
    table.add_column("")
    for encoder in scores:
        table.add_column(encoder, justify="right")
    for metric in metrics:
        table.add_row(metric, *(_formatted(metric, values.get(metric)) for values in scores.values()))
    return table


def _formatted(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    share = re.search(r"top\d|_r\d|_map$|_miou$|_accuracy$|^labelpropagation|hardnegatives|separability", metric)
    return f"{100 * value:.2f} %" if share else f"{value:.4g}"
