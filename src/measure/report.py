"""What a part says of its result: thresholds wanted and met, and a few tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One line of the table that opens the page."""

    what: str
    wanted: str
    measured: str
    met: bool | None  # None: cannot be said yet, or nothing is asked for on this machine

    @property
    def answer(self) -> str:
        return {True: "yes", False: "**no**", None: "–"}[self.met]


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Args:
        title: its heading.
        checks: what goes into the opening table.
        body: markdown.
    """

    title: str
    checks: Sequence[Check]
    body: str


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table: first column left, the others right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"
