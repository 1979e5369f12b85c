"""The results of a gauntlet: a page, a dashboard, a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from src.gauntlet.ranking import Ranking
from src.measure import machine
from src.measure.report import percent, table


def markdown(ranking: Ranking, failures: Mapping[str, str]) -> str:
    """Returns the page.

    Args:
        failures: what could not be measured, and why.
    """
    parts = ["# Gauntlet", "Written by `make gauntlet` from [scores.json](scores.json); change nothing here."]
    if ranking.scores:
        parts += [
            "## Ranking",
            "Mean z-scores: in each setting a backbone's distance from the mean of all of them, in standard deviations "
            "(of the population), errors with the sign turned. They depend on who takes part. Coverage is the share of "
            "settings that a backbone has a number in.",
            table(*ranking_table(ranking)),
            *_by_size(ranking),
            "## Scores",
            "Means over seeds. Frozen and fine-tuned encoders are settings of their own.",
            table(*score_table(ranking)),
            "## z-scores",
            table(
                ["", *ranking.settings],
                [[backbone, *map(_signed, ranking.z.loc[backbone])] for backbone in ranking.order],
            ),
            "## Do the settings agree?",
            "Spearman's rank correlation over the backbones that have both; it needs three of them.",
            table(
                ["", *ranking.settings],
                [[setting, *map(_signed, ranking.correlation.loc[setting])] for setting in ranking.settings],
            ),
        ]
        where = machine.lines([score["about"] for score in ranking.scores])
        parts += ["## Where", "\n".join(f"- {line}" for line in where)]
    if failures:
        parts += ["## Not measured", "\n".join(f"- {name}: {reason}" for name, reason in failures.items())]
    return "\n\n".join(parts) + "\n"


def _by_size(ranking: Ranking) -> list[str]:
    """Returns a ranking for each size, if there are backbones of several."""
    if len(ranking.sizes) < 2:
        return []
    parts = ["The same z-scores among backbones of a size, which has parameters below 10 million, 30 million, or more."]
    for size, backbones in ranking.sizes.items():
        parts += [f"### {size.capitalize()}", table(*ranking_table(ranking, backbones))]
    return parts


def ranking_table(ranking: Ranking, backbones: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of the ranking, of all or of some ``backbones``, best first."""
    rows = [
        [
            backbone,
            str(rank),
            _signed(ranking.overall[backbone]),
            percent(ranking.coverage[backbone], 0),
            f"{ranking.parameters[backbone] / 1e6:.1f} M",
            *map(_signed, ranking.kinds.loc[backbone]),
        ]
        for rank, backbone in enumerate(ranking.order if backbones is None else backbones, start=1)
    ]
    return ["", "rank", "mean z", "coverage", "parameters", *ranking.kinds], rows


def score_table(ranking: Ranking) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of the raw scores, a setting a row."""
    about = {score["setting"]: score for score in ranking.scores}
    rows = []
    for setting in ranking.settings:
        arrow = "↓" if about[setting]["lower_is_better"] else "↑"
        rows.append(
            [
                setting,
                about[setting]["adaptation"],
                f"{about[setting]['metric']} {arrow}",
                *(_plain(ranking.raw.loc[backbone, setting]) for backbone in ranking.order),
            ]
        )
    return ["", "adaptation", "metric", *ranking.order], rows


def terminal(ranking: Ranking) -> Table:
    """Returns the ranking for the terminal."""
    head, rows = ranking_table(ranking)
    result = Table(title="Gauntlet: mean z-scores", title_justify="left")
    for name in head:
        result.add_column(name, justify="right" if name else "left")
    for row in rows:
        result.add_row(*row)
    return result


def dashboard(folder: Path, ranking: Ranking, page: str) -> None:
    """Writes the page and the numbers for TensorBoard, replacing those of an earlier call."""
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("gauntlet", page)
        for backbone in ranking.backbones:
            values = {"mean_z": ranking.overall[backbone], **ranking.raw.loc[backbone]}
            for name, value in values.items():
                if not math.isnan(value):
                    writer.add_scalar(f"{name}/{backbone}".replace(" ", "_"), value)


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value + 0.0:+.2f}"


def _plain(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"
