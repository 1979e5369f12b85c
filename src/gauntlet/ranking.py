"""From raw scores to a ranking: nothing here is stored, as a z-score depends on who else has taken part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.stats import spearmanr

Score = Mapping[str, Any]  # a row of the long table, see `TaskRun.facts`, with its ``backbone`` and ``value``

SIZES = {"tiny": 10e6, "small": 30e6, "base": float("inf")}  # parameters below which a backbone is called so
_LEAST = 3  # backbones: two are always in perfect order


def with_backbones(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The rows with what they are of in ``backbone``: the experiment, whatever the seed; where an experiment has been
    trained by several recipes, with the name of each one's first run."""
    recipes: dict[tuple[str, bool], dict[str, str]] = {}
    for score in scores:
        known = recipes.setdefault((score["experiment"], score["trained"]), {})
        known[score["made_by"]] = min(score["run"], known.get(score["made_by"], score["run"]))
    named = []
    for score in scores:
        known = recipes[score["experiment"], score["trained"]]
        plain = score["experiment"] if score["trained"] else f"random {score['experiment']}"
        named.append({"backbone": plain if len(known) == 1 else known[score["made_by"]], **score})
    return named


@dataclass(frozen=True)
class Ranking:
    """Who stands where: of ``scores`` with their backbones.

    Seeds are averaged first. In each setting the scores become z-scores: less the mean and over the standard deviation
    of those who have one, errors with the sign turned, so that higher is better everywhere. The deviation is the
    population's (divided by n, not n - 1): those who took part are all there are. Where it is 0 everybody has z = 0. A
    backbone's number is the mean over the settings it has, and its coverage the share of all settings that these are.
    """

    scores: Sequence[Score]

    @cached_property
    def backbones(self) -> list[str]:
        return list(dict.fromkeys(score["backbone"] for score in self.scores))

    @cached_property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(score["setting"] for score in self.scores))

    @cached_property
    def raw(self) -> np.ndarray:
        """Means over seeds: [B, S], NaN where there is none."""
        found = np.full((len(self.backbones), len(self.settings)), np.nan)
        for row, backbone in enumerate(self.backbones):
            for column, setting in enumerate(self.settings):
                mine = [s["value"] for s in self.scores if (s["backbone"], s["setting"]) == (backbone, setting)]
                if mine:
                    found[row, column] = np.mean(mine)
        return found

    @cached_property
    def z(self) -> np.ndarray:
        """[B, S], higher is better; NaN where there is none."""
        errors = np.array([self._first(setting)["lower_is_better"] for setting in self.settings], bool)
        return z_scores(self.raw * np.where(errors, -1.0, 1.0))

    @cached_property
    def overall(self) -> np.ndarray:
        """Each backbone's mean over the settings it has: [B]."""
        return mean_of_known(self.z)

    @cached_property
    def coverage(self) -> np.ndarray:
        """The share of settings each backbone has: [B]."""
        return (~np.isnan(self.raw)).mean(axis=1)

    @cached_property
    def order(self) -> list[int]:
        """Positions in ``backbones``, the best first; of equals the first by name."""
        return sorted(range(len(self.backbones)), key=lambda row: (-self.overall[row], self.backbones[row]))

    @cached_property
    def parameters(self) -> list[int]:
        """Of each backbone's encoder: [B]."""
        return [next(s["parameters"] for s in self.scores if s["backbone"] == each) for each in self.backbones]

    @cached_property
    def sizes(self) -> dict[str, list[int]]:
        """Positions in ``order``'s order, by size; sizes that nobody has are left out."""
        found: dict[str, list[int]] = {}
        for size in SIZES:
            mine = [row for row in self.order if _size(self.parameters[row]) == size]
            found |= {size: mine} if mine else {}
        return found

    @cached_property
    def kinds(self) -> dict[str, np.ndarray]:
        """Each backbone's mean over the settings of a kind, NaN where it has none: [B] by kind and adaptation, as
        frozen and fine-tuned encoders are not mixed."""
        of = [f"{self._first(s)['kind']}, {self._first(s)['adaptation']}" for s in self.settings]
        return {
            kind: mean_of_known(self.z[:, [column for column, each in enumerate(of) if each == kind]])
            for kind in dict.fromkeys(of)
        }

    @cached_property
    def correlation(self) -> np.ndarray:
        """Spearman's rank correlation of the settings over the backbones that have both: [S, S]; NaN where these are
        fewer than three, or all alike in one of the two."""
        count = len(self.settings)
        found = np.full((count, count), np.nan)
        for one in range(count):
            for other in range(one, count):
                both = self.z[:, [one, other]]
                both = both[~np.isnan(both).any(axis=1)]
                if len(both) >= _LEAST and (np.ptp(both, axis=0) > 0).all():
                    found[one, other] = found[other, one] = spearmanr(both[:, 0], both[:, 1]).statistic
        return found

    def _first(self, setting: str) -> Score:
        return next(score for score in self.scores if score["setting"] == setting)


def _size(parameters: int) -> str:
    return next(name for name, limit in SIZES.items() if parameters < limit)


def z_scores(values: np.ndarray) -> np.ndarray:
    """Of each column of [B, S] by itself, NaN left out: mean 0 and population deviation 1, or 0 where all are alike."""
    found = np.full_like(values, np.nan)
    for column in range(values.shape[1]):
        known = ~np.isnan(values[:, column])
        mine = values[known, column]
        alike = len(mine) == 0 or np.ptp(mine) == 0  # a mean of equal numbers may be off by a bit
        found[known, column] = 0.0 if alike else (mine - mine.mean()) / mine.std(ddof=0)
    return found


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """Over columns, NaN left out: [B, S] -> [B]; NaN where a row has nothing."""
    known = ~np.isnan(values)
    count = known.sum(axis=1)
    total = np.where(known, values, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
