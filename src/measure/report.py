"""The report of a benchmark: required values and whether they are met, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One line of the table at the top of the page."""

    what: str
    wanted: str
    measured: str
    met: bool | None  # None: not known yet, or not required on this machine

    @property
    def answer(self) -> str:
        return {True: "yes", False: "**no**", None: "–"}[self.met]


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Args:
        title: its heading.
        checks: its lines in the table at the top.
        body: markdown.
    """

    title: str
    checks: Sequence[Check]
    body: str


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a markdown table, the first column aligned left and the others right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"
