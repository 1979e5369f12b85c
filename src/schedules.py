"""Values that change over a run: frozen dataclasses, pure in the number of optimizer steps done."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from src.errors import SettingError

_UNITS = {
    "step": "steps",
    "steps": "steps",
    "epoch": "epochs",
    "epochs": "epochs",
    "sample": "samples",
    "samples": "samples",
    "%": "percent",
}
_DURATION = re.compile(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kM]?)\s*(steps?|epochs?|samples?|%)", re.IGNORECASE)


@dataclass(frozen=True)
class Horizon:
    """How long a run is, which is what durations are measured against.

    Args:
        total_steps: optimizer steps in the whole run.
        steps_per_epoch: optimizer steps in an epoch.
        batch_size: images per optimizer step, over all processes and micro-batches.
    """

    total_steps: int
    steps_per_epoch: float
    batch_size: int

    def steps(self, duration: int | float | str) -> float:
        """A duration in optimizer steps: ``"40 epochs"``, ``"10%"`` (of the run), ``"2M samples"``, ``500``.

        Raises:
            ValueError: not a duration, or negative.
        """
        if isinstance(duration, int | float):
            if duration < 0:
                raise SettingError(f"a duration cannot be negative: {duration}")
            return float(duration)
        match = _DURATION.fullmatch(duration.strip())
        if match is None:
            raise SettingError(
                f"not a duration: '{duration}' (say '40 epochs', '10%', '2M samples', '500 steps' or 500)"
            )
        amount = float(match[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[match[2].lower()]
        match _UNITS[match[3].lower()]:
            case "epochs":
                return amount * self.steps_per_epoch
            case "samples":
                return amount / self.batch_size
            case "percent":
                return amount / 100 * self.total_steps
        return amount


class Schedule(Protocol):
    """A value at every optimizer step, ``step`` counting those already done."""

    def value(self, step: int, horizon: Horizon) -> float: ...


@dataclass(frozen=True)
class Constant:
    """The same value throughout."""

    at: float

    def value(self, step: int, horizon: Horizon) -> float:
        return self.at


@dataclass(frozen=True)
class Switch:
    """``before`` for the duration ``at``, then ``after``."""

    at: int | float | str
    before: float = 0.0
    after: float = 1.0

    def value(self, step: int, horizon: Horizon) -> float:
        return self.before if step < horizon.steps(self.at) else self.after


@dataclass(frozen=True)
class Linear:
    """From ``start`` to ``end`` in a straight line over ``duration``, then ``end``."""

    start: float
    end: float
    duration: int | float | str = "100%"

    def value(self, step: int, horizon: Horizon) -> float:
        return self.start + (self.end - self.start) * _progress(step, 0.0, horizon.steps(self.duration))


@dataclass(frozen=True)
class Cosine:
    """From ``start`` to ``end`` along half a cosine over ``duration``, then ``end``."""

    start: float
    end: float
    duration: int | float | str = "100%"

    def value(self, step: int, horizon: Horizon) -> float:
        return _half_cosine(self.start, self.end, _progress(step, 0.0, horizon.steps(self.duration)))


@dataclass(frozen=True)
class _Warmup(ABC):
    """A line from ``start`` to ``peak`` over ``warmup``, then to ``end`` at the end of the run.

    Step 0 has the value ``start``: with ``start=0`` the first update of a warmed-up run is a null step, as in the
    code of MAE and its followers.
    """

    peak: float
    warmup: int | float | str = 0
    start: float = 0.0
    end: float = 0.0

    def value(self, step: int, horizon: Horizon) -> float:
        warmup = min(horizon.steps(self.warmup), horizon.total_steps)
        if step < warmup:
            return self.start + (self.peak - self.start) * step / warmup
        return self.after(_progress(step, warmup, horizon.total_steps))

    @abstractmethod
    def after(self, progress: float) -> float:
        """What comes behind the warmup: ``peak`` at 0, ``end`` at 1."""


class WarmupCosine(_Warmup):
    """A line from ``start`` to ``peak`` over ``warmup``, then half a cosine to ``end`` at the end of the run."""

    def after(self, progress: float) -> float:
        return _half_cosine(self.peak, self.end, progress)


class WarmupLinear(_Warmup):
    """A line from ``start`` to ``peak`` over ``warmup``, then another one to ``end`` at the end of the run."""

    def after(self, progress: float) -> float:
        return self.peak + (self.end - self.peak) * progress


@dataclass(frozen=True)
class WarmupDrops:
    """A line from ``start`` to ``peak`` over ``warmup``, then ``peak`` times ``factor`` for each of the ``drops`` that
    has passed."""

    peak: float
    drops: Sequence[int | float | str]
    factor: float = 0.1
    warmup: int | float | str = 0
    start: float = 0.0

    def value(self, step: int, horizon: Horizon) -> float:
        warmup = horizon.steps(self.warmup)
        if step < warmup:
            return self.start + (self.peak - self.start) * step / warmup
        return self.peak * self.factor ** sum(step >= horizon.steps(drop) for drop in self.drops)


def _progress(step: float, begin: float, end: float) -> float:
    return 1.0 if end <= begin else min(1.0, max(0.0, (step - begin) / (end - begin)))


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
