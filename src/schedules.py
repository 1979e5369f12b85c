"""Schedules: values that change over a run, as pure functions of the number of optimizer steps done."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

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
_SHARE = re.compile(r"([0-9]*\.?[0-9]+)\s*(%?)")
_DURATION = re.compile(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kM]?)\s*(steps?|epochs?|samples?|%)", re.IGNORECASE)


@dataclass(frozen=True)
class Horizon:
    """The length of a run, which turns durations into optimizer steps.

    Args:
        total_steps: optimizer steps in the whole run.
        steps_per_epoch: optimizer steps in an epoch.
        batch_size: samples per optimizer step, over all processes and micro-batches.
        max_warmup: largest share of the run that a warm-up in steps, epochs or samples may take, 0.2 or ``"20%"``;
            None for no cap. A recipe for 300 epochs warms up for 40, which would be all of a run of 20.

    Raises:
        SettingError: ``max_warmup`` is not a share.
    """

    total_steps: int
    steps_per_epoch: float
    batch_size: int
    max_warmup: float | str | None = None

    def __post_init__(self) -> None:
        share_of(self.max_warmup)

    def steps(self, duration: int | float | str) -> float:
        """Converts a duration to optimizer steps: ``"40 epochs"``, ``"10%"`` (of the run), ``"2M samples"``, ``500``.

        Raises:
            SettingError: not a duration, or negative.
        """
        if isinstance(duration, int | float):
            if duration < 0:
                raise SettingError(f"a duration cannot be negative: {duration}")
            return float(duration)
        match = _DURATION.fullmatch(duration.strip())
        if match is None:
            raise SettingError(
                f"not a duration: '{duration}' (write '40 epochs', '10%', '2M samples', '500 steps' or 500)"
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

    def epoch_start(self, step: int) -> float:
        """Returns the first step of the epoch that ``step`` belongs to."""
        return math.floor(step / self.steps_per_epoch + 1e-9) * self.steps_per_epoch

    def steps_held(self, per_epoch: bool) -> float:
        """Returns the steps for which a value stays the same: an epoch's where it changes ``per_epoch``, else 1."""
        return self.steps_per_epoch if per_epoch else 1.0

    def warmup_steps(self, duration: int | float | str) -> float:
        """Converts a warm-up to optimizer steps, at most ``max_warmup`` of the run. Durations in percent
        scale with the run and are not capped.

        Raises:
            SettingError: see `steps`.
        """
        in_percent = isinstance(duration, str) and duration.strip().endswith("%")
        cap = 1.0 if in_percent else share_of(self.max_warmup)
        return min(self.steps(duration), cap * self.total_steps)


def share_of(max_warmup: float | str | None) -> float:
    """Converts ``0.2`` or ``"20%"`` to 0.2, and None to 1.

    Raises:
        SettingError: neither of them, or not between 0 and 1.
    """
    if max_warmup is None:
        return 1.0
    match = _SHARE.fullmatch(str(max_warmup).strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= share <= 1:
        raise SettingError(f"max_warmup={max_warmup} must be a share of the run such as 20% or 0.2, or null for no cap")
    return share


class Schedule(ABC):
    """A value for every optimizer step."""

    @abstractmethod
    def value(self, step: int, horizon: Horizon) -> float:
        """The value for the step after ``step`` optimizer steps."""

    def value_for(self, lr_multiplier: float, step: int, horizon: Horizon) -> float:
        """The learning rate of a parameter group: ``lr_multiplier`` times the value, unless a subclass says
        otherwise."""
        return self.value(step, horizon) * lr_multiplier


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value throughout."""

    at: float

    def value(self, step: int, horizon: Horizon) -> float:
        return self.at


@dataclass(frozen=True)
class Switch(Schedule):
    """``before`` for the duration ``at``, then ``after``.

    Args:
        warmup: what comes before ``at`` is a warm-up, so it is capped as one (`Horizon.warmup_steps`).
    """

    at: int | float | str
    before: float = 0.0
    after: float = 1.0
    warmup: bool = False

    def value(self, step: int, horizon: Horizon) -> float:
        steps = horizon.warmup_steps(self.at) if self.warmup else horizon.steps(self.at)
        return self.before if step < steps else self.after


@dataclass(frozen=True)
class Linear(Schedule):
    """From ``start`` to ``end`` in a straight line over ``duration``, then ``end``."""

    start: float
    end: float
    duration: int | float | str = "100%"

    def value(self, step: int, horizon: Horizon) -> float:
        return self.start + (self.end - self.start) * _progress(step, 0.0, horizon.steps(self.duration))


@dataclass(frozen=True)
class LinearWarmup(Schedule):
    """From ``start`` to ``end`` in a straight line over ``warmup``, then ``end`` for the rest of the run.

    Args:
        per_epoch: the value changes once an epoch: all its steps have that of the first.
        inclusive: the warm-up's last step, or epoch, has ``end`` already, as in numpy's ``linspace`` (DINO).
    """

    start: float
    end: float
    warmup: int | float | str
    per_epoch: bool = False
    inclusive: bool = False

    def value(self, step: int, horizon: Horizon) -> float:
        now = horizon.epoch_start(step) if self.per_epoch else step
        last = horizon.steps_held(self.per_epoch) if self.inclusive else 0
        return self.start + (self.end - self.start) * _progress(now, 0.0, horizon.warmup_steps(self.warmup) - last)


@dataclass(frozen=True)
class Cosine(Schedule):
    """From ``start`` to ``end`` along half a cosine over ``duration``, then ``end``."""

    start: float
    end: float
    duration: int | float | str = "100%"

    def value(self, step: int, horizon: Horizon) -> float:
        return _half_cosine(self.start, self.end, _progress(step, 0.0, horizon.steps(self.duration)))


@dataclass(frozen=True)
class Momentum(Schedule):
    """Momentum of a moving average: from ``start`` to ``end`` along half a cosine over the run.

    Args:
        half_life: duration in which the average forgets half of what it was, which replaces ``start``. A recipe's start
            is for its own number of steps: BYOL's 0.996 has a half-life of 173 of 312,000 steps, in which a run of
            hundreds would hardly move.
    """

    start: float
    end: float = 1.0
    half_life: int | float | str | None = None

    def value(self, step: int, horizon: Horizon) -> float:
        start = self.start if self.half_life is None else 0.5 ** (1 / max(horizon.steps(self.half_life), 1e-9))
        return _half_cosine(start, self.end, _progress(step, 0.0, horizon.total_steps))


@dataclass(frozen=True)
class _Warmup(Schedule):
    """From ``start`` to ``peak`` in a straight line over ``warmup``, then to ``end`` at the end of the run.

    Step 0 has the value ``start``: with ``start=0`` the first update of a run with a warm-up changes nothing, as in the
    code of MAE and its followers.

    Args:
        per_epoch: the value changes once an epoch, as in MoCo's code: all its steps have that of the first.
        inclusive: the warm-up's last step, or epoch, has ``peak`` already, as in numpy's ``linspace`` (DINO, SwAV).
    """

    peak: float
    warmup: int | float | str = 0
    start: float = 0.0
    end: float = 0.0
    per_epoch: bool = False
    inclusive: bool = False

    def value(self, step: int, horizon: Horizon) -> float:
        warmup, now = horizon.warmup_steps(self.warmup), horizon.epoch_start(step) if self.per_epoch else step
        if now < warmup:
            last = horizon.steps_held(self.per_epoch) if self.inclusive else 0
            return self.start + (self.peak - self.start) * _progress(now, 0.0, warmup - last)
        return self.after(_progress(now, warmup, horizon.total_steps))

    @abstractmethod
    def after(self, progress: float) -> float:
        """The value after the warm-up: ``peak`` at progress 0, ``end`` at 1."""


class WarmupCosine(_Warmup):
    """From ``start`` to ``peak`` in a straight line over ``warmup``, then to ``end`` along half a cosine."""

    def after(self, progress: float) -> float:
        return _half_cosine(self.peak, self.end, progress)


@dataclass(frozen=True)
class CosineWithWarmup(Schedule):
    """Half a cosine from ``peak`` to ``end`` over the whole run, whose beginning a warm-up in a straight line from 0
    replaces, so that it goes on below ``peak``: timm's ``CosineLRScheduler`` without ``warmup_prefix``.

    All parameter groups end at ``end``, whatever their ``lr_multiplier``.
    """

    peak: float
    warmup: int | float | str = 0
    end: float = 0.0

    def value(self, step: int, horizon: Horizon) -> float:
        return self.value_for(1.0, step, horizon)

    def value_for(self, lr_multiplier: float, step: int, horizon: Horizon) -> float:
        warmup = horizon.warmup_steps(self.warmup)
        peak = self.peak * lr_multiplier
        if step < warmup:
            return peak * step / warmup
        return _half_cosine(peak, self.end, _progress(step, 0.0, horizon.total_steps))


class WarmupLinear(_Warmup):
    """From ``start`` to ``peak`` in a straight line over ``warmup``, then to ``end`` in another."""

    def after(self, progress: float) -> float:
        return self.peak + (self.end - self.peak) * progress


@dataclass(frozen=True)
class WarmupDrops(Schedule):
    """From ``start`` to ``peak`` in a straight line over ``warmup``, then ``peak``, multiplied by ``factor`` at each of
    the ``drops``."""

    peak: float
    drops: Sequence[int | float | str]
    factor: float = 0.1
    warmup: int | float | str = 0
    start: float = 0.0

    def value(self, step: int, horizon: Horizon) -> float:
        warmup = horizon.warmup_steps(self.warmup)
        if step < warmup:
            return self.start + (self.peak - self.start) * step / warmup
        return self.peak * self.factor ** sum(step >= horizon.steps(drop) for drop in self.drops)


def _progress(step: float, begin: float, end: float) -> float:
    return 1.0 if end <= begin else min(1.0, max(0.0, (step - begin) / (end - begin)))


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
