"""The ranking computed from raw scores. It is not stored, as z-scores depend on which backbones take part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

Score = Mapping[str, Any]  # a row of the long table, see `TaskRun.facts`, with its ``backbone`` and ``value``

SIZES = {"tiny": 10e6, "small": 30e6, "base": float("inf")}  # upper limits of the number of parameters
_LEAST = 3  # backbones of a correlation: two are always perfectly correlated
_COLUMNS = ("backbone", "setting", "value", "parameters", "kind", "adaptation", "lower_is_better")


def with_backbones(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Returns the rows with their ``backbone``: the experiment, whatever the seed; if an experiment was trained by
    several recipes, the name of each recipe's first run."""
    first_runs: dict[tuple[str, bool], dict[str, str]] = {}
    for score in scores:
        of_experiment = first_runs.setdefault((score["experiment"], score["trained"]), {})
        of_experiment[score["made_by"]] = min(score["run"], of_experiment.get(score["made_by"], score["run"]))
    rows = []
    for score in scores:
        of_experiment = first_runs[score["experiment"], score["trained"]]
        experiment = score["experiment"] if score["trained"] else f"random {score['experiment']}"
        backbone = experiment if len(of_experiment) == 1 else of_experiment[score["made_by"]]
        rows.append({"backbone": backbone, **score})
    return rows


@dataclass(frozen=True)
class Ranking:
    """Ranks the backbones of ``scores``.

    Seeds are averaged first. In each setting scores become z-scores, errors with their sign turned, so that higher is
    better everywhere. The standard deviation is the population's (divided by n, not n - 1), as those who take part are
    all there are. If it is 0, all have z = 0. A backbone's overall score is the mean over the settings it has, and its
    coverage the share of all settings that these are.
    """

    scores: Sequence[Score]

    @cached_property
    def table(self) -> pd.DataFrame:
        """The scores, a row each."""
        return pd.DataFrame([{key: score[key] for key in _COLUMNS} for score in self.scores], columns=list(_COLUMNS))

    @cached_property
    def about_settings(self) -> pd.DataFrame:
        """Facts of each setting: [S, …]."""
        return self.table.drop_duplicates("setting").set_index("setting")

    @cached_property
    def settings(self) -> list[str]:
        return list(self.about_settings.index)

    @cached_property
    def backbones(self) -> list[str]:
        return list(self.table["backbone"].unique())

    @cached_property
    def raw(self) -> pd.DataFrame:
        """Means over seeds: [B, S], NaN where there is no score."""
        means = self.table.groupby(["backbone", "setting"])["value"].mean().unstack("setting")
        return means.reindex(index=self.backbones, columns=self.settings)

    @cached_property
    def z(self) -> pd.DataFrame:
        """z-scores: [B, S], higher is better, NaN where there is no score."""
        sign = np.where(self.about_settings["lower_is_better"].astype(bool), -1.0, 1.0)
        return z_scores(self.raw * sign)

    @cached_property
    def overall(self) -> pd.Series:
        """Each backbone's mean over the settings it has: [B]."""
        return self.z.mean(axis=1)

    @cached_property
    def coverage(self) -> pd.Series:
        """The share of settings each backbone has: [B]."""
        return self.raw.notna().mean(axis=1)

    @cached_property
    def order(self) -> list[str]:
        """Backbones, the best first; of equal ones the first by name."""
        return sorted(self.backbones, key=lambda backbone: (-self.overall[backbone], backbone))

    @cached_property
    def parameters(self) -> dict[str, int]:
        """The number of parameters of each backbone's encoder."""
        return dict(self.table.drop_duplicates("backbone").set_index("backbone")["parameters"])

    @cached_property
    def sizes(self) -> dict[str, list[str]]:
        """Backbones by size, each size in the order of the ranking; sizes without a backbone are left out."""
        by_size = {size: [name for name in self.order if _size(self.parameters[name]) == size] for size in SIZES}
        return {size: names for size, names in by_size.items() if names}

    @cached_property
    def kinds(self) -> pd.DataFrame:
        """Each backbone's mean over the settings of a kind and an adaptation: [B, K], NaN where it has none. Frozen and
        fine-tuned encoders are not mixed."""
        kind = self.about_settings["kind"] + ", " + self.about_settings["adaptation"]
        return self.z.T.groupby(kind, sort=False).mean().T

    @cached_property
    def correlation(self) -> pd.DataFrame:
        """Spearman's rank correlation of the settings over the backbones that have both: [S, S]; NaN if these are fewer
        than three, or all equal in one of the two."""
        return self.z.corr(method="spearman", min_periods=_LEAST)


def z_scores(values: pd.DataFrame) -> pd.DataFrame:
    """Standardizes each column, ignoring NaN: mean 0 and population standard deviation 1, or 0 if all are equal."""
    z = (values - values.mean()) / values.std(ddof=0)
    equal = values.max() == values.min()  # their mean may differ from them by rounding
    return z.mask(equal & values.notna(), 0.0)


def _size(parameters: int) -> str:
    return next(name for name, limit in SIZES.items() if parameters < limit)
