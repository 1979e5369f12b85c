"""What came of a gauntlet: a page, a dashboard, a table on the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from src.gauntlet.ranking import Ranking
from src.measure import machine
from src.measure.report import percent, table


def markdown(standing: Ranking, failures: Mapping[str, str]) -> str:
    """The page.

    Args:
        failures: what could not be measured, and why.
    """
    parts = ["# Gauntlet", "Written by `make gauntlet` from [scores.json](scores.json); change nothing here."]
    if standing.scores:
        parts += [
            "## Ranking",
            "Mean z-scores: in each setting a backbone's distance from the mean of all of them, in standard deviations "
            "(of the population), errors with the sign turned. They depend on who takes part. Coverage is the share of "
            "settings that a backbone has a number in.",
            table(*ranking(standing)),
            *_by_size(standing),
            "## Scores",
            "Means over seeds. Frozen and fine-tuned encoders are settings of their own.",
            table(*scores(standing)),
            "## z-scores",
            table(
                ["", *standing.settings],
                [[standing.backbones[row], *map(_signed, standing.z[row])] for row in standing.order],
            ),
            "## Do the settings agree?",
            "Spearman's rank correlation over the backbones that have both; it needs three of them.",
            table(
                ["", *standing.settings],
                [
                    [name, *map(_signed, each)]
                    for name, each in zip(standing.settings, standing.correlation, strict=True)
                ],
            ),
        ]
        where = machine.lines([score["about"] for score in standing.scores])
        parts += ["## Where", "\n".join(f"- {line}" for line in where)]
    if failures:
        parts += ["## Not measured", "\n".join(f"- {name}: {reason}" for name, reason in failures.items())]
    return "\n\n".join(parts) + "\n"


def _by_size(standing: Ranking) -> list[str]:
    """A ranking for each size, where there are backbones of several."""
    if len(standing.sizes) < 2:
        return []
    said = ["The same z-scores among backbones of a size, which has parameters below 10 million, 30 million, or more."]
    for size, rows in standing.sizes.items():
        said += [f"### {size.capitalize()}", table(*ranking(standing, rows))]
    return said


def ranking(standing: Ranking, among: Sequence[int] | None = None) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the ranking, of all or ``among`` some, best first."""
    rows = [
        [
            standing.backbones[row],
            str(place),
            _signed(standing.overall[row]),
            percent(standing.coverage[row], 0),
            f"{standing.parameters[row] / 1e6:.1f} M",
            *(_signed(each[row]) for each in standing.kinds.values()),
        ]
        for place, row in enumerate(standing.order if among is None else among, start=1)
    ]
    return ["", "rank", "mean z", "coverage", "parameters", *standing.kinds], rows


def scores(standing: Ranking) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the raw scores, a setting a row."""
    about = {score["setting"]: score for score in standing.scores}
    rows = []
    for column, setting in enumerate(standing.settings):
        arrow = "↓" if about[setting]["lower_is_better"] else "↑"
        rows.append(
            [
                setting,
                about[setting]["adaptation"],
                f"{about[setting]['metric']} {arrow}",
                *(_plain(standing.raw[row, column]) for row in standing.order),
            ]
        )
    return ["", "adaptation", "metric", *(standing.backbones[row] for row in standing.order)], rows


def terminal(standing: Ranking) -> Table:
    head, rows = ranking(standing)
    shown = Table(title="Gauntlet: mean z-scores", title_justify="left")
    for name in head:
        shown.add_column(name, justify="right" if name else "left")
    for row in rows:
        shown.add_row(*row)
    return shown


def dashboard(folder: Path, standing: Ranking, page: str) -> None:
    """The page and the numbers for TensorBoard, in place of those that an earlier call has written."""
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("gauntlet", page)
        for row, backbone in enumerate(standing.backbones):
            _scalars(writer, f"mean_z/{backbone}", [standing.overall[row]])
            for column, setting in enumerate(standing.settings):
                _scalars(writer, f"{setting}/{backbone}", [standing.raw[row, column]])


def _scalars(writer: SummaryWriter, tag: str, values: Sequence[float]) -> None:
    for value in values:
        if not math.isnan(value):
            writer.add_scalar(tag.replace(" ", "_"), value)


def _signed(value: float) -> str:
    return "–" if np.isnan(value) else f"{value + 0.0:+.2f}"


def _plain(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.4g}"
