"""`make config`: the values of an experiment with the files they come from, or where two experiments differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src import configuration
from src.composition import Composition, leaves
from src.errors import UserError

_ORDER = ("about", "model", "backbone", "optimizer", "schedules", "data", "trainer", "callbacks", "logger", "paths")


def main(argv: Sequence[str]) -> int:
    experiments = [word for word in argv if word.startswith("experiment=")]
    other = [word.removeprefix("vs=") for word in argv if word.startswith("vs=")]
    if not experiments:
        raise UserError("name an experiment: make config EXP=mae_vitb [SCALE=tiny] [VS=dino_vits]")
    overrides = [word for word in argv if not word.startswith("vs=")]
    composed = configuration.composition("train", overrides)
    if other:
        rest = [word for word in overrides if word not in experiments]
        second = configuration.composition("train", [f"experiment={other[-1]}", *rest])
        rows = differences(composed, second)
        head = ("key", experiments[-1].removeprefix("experiment="), other[-1])
    else:
        rows = values(composed)
        head = ("key", "value", "from")
    print_table(head, rows)
    if composed.replaced and not other:
        print(f"\nSCALE={composed.config.run.scale} replaced {len(composed.replaced)} values of the recipe:")
        print_table(
            ("key", "without it", "with it"),
            [(key, str(before), str(after)) for key, (before, after) in composed.replaced.items()],
        )
    return 0


def values(composed: Composition) -> list[tuple[str, str, str]]:
    """(key, effective value, file) of every value; a value that refers to others is followed by what was written."""
    return [(key, shown, composed.origin(key)) for key, shown in _effective(composed)]


def differences(first: Composition, second: Composition) -> list[tuple[str, str, str]]:
    """(key, value in the first, value in the second) where they differ; "–" where one has no such key."""
    left, right = dict(_effective(first)), dict(_effective(second))
    keys = list(dict.fromkeys([*left, *right]))
    return [(key, left.get(key, "–"), right.get(key, "–")) for key in keys if left.get(key) != right.get(key)]


def _effective(composed: Composition) -> Iterator[tuple[str, str]]:
    config = composed.config
    written_values = leaves(OmegaConf.to_container(config, resolve=False))
    for key, written in sorted(written_values, key=lambda item: _place(item[0])):
        if key.partition(".")[0] == "run":
            continue
        try:
            value: Any = OmegaConf.select(config, key, throw_on_missing=False)
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except (OmegaConfBaseException, UserError):  # still missing, such as a folder of the user's
            value = written
        is_reference = isinstance(written, str) and "${" in written and not isinstance(value, dict)
        if isinstance(value, dict) and isinstance(written, str):
            value = written  # a reference to a whole section, whose values have rows of their own
        yield key, f"{value}  = {written}" if is_reference and str(value) != written else f"{value}"


def _place(key: str) -> tuple[int, str]:
    """Sorts keys by what a reader looks for first."""
    group = key.partition(".")[0]
    return (_ORDER.index(group) if group in _ORDER else -1, group)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns without a frame, so that a line can be searched and copied."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head) - 1)]
    for row in [head, *rows]:
        cells = [cell.ljust(min(width, 70)) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]).rstrip())


if __name__ == "__main__":
    configuration.run_main(main)
