import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler

from src.errors import SettingError
from src.schedules import (
    Constant,
    Cosine,
    CosineWithWarmup,
    Horizon,
    Linear,
    LinearWarmup,
    Momentum,
    Schedule,
    Switch,
    WarmupCosine,
    WarmupDrops,
    WarmupLinear,
)

RUN = Horizon(total_steps=1000, steps_per_epoch=50.0, batch_size=256)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (500, 500),
        ("500 steps", 500),
        ("1 step", 1),
        ("4 epochs", 200),
        ("0.5 epochs", 25),
        ("10%", 100),
        ("2560 samples", 10),
        ("1.28M samples", 5000),
        ("25.6k samples", 100),
        (0, 0),
    ],
)
def test_durations_in_every_unit(duration, steps):
    assert RUN.steps(duration) == pytest.approx(steps, rel=1e-12)


@pytest.mark.parametrize("wrong", ["forty epochs", "40 epoch s", "-3 epochs", -1, "40", "", "10 percent"])
def test_bad_durations_are_refused(wrong):
    with pytest.raises(ValueError, match="duration"):
        RUN.steps(wrong)


def test_warmup_cosine_at_hand_worked_points():
    schedule = WarmupCosine(peak=2.0, warmup="4 epochs", start=0.4, end=0.2)
    assert schedule.value(0, RUN) == 0.4
    assert schedule.value(100, RUN) == pytest.approx(1.2)  # half of the way up
    assert schedule.value(200, RUN) == pytest.approx(2.0)
    assert schedule.value(400, RUN) == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule.value(600, RUN) == pytest.approx(1.1)  # half of the way down
    assert schedule.value(1000, RUN) == pytest.approx(0.2)
    assert schedule.value(1200, RUN) == pytest.approx(0.2)


def test_a_cosine_over_the_whole_run_is_timms():
    schedule = CosineWithWarmup(peak=2.0, warmup="4 epochs", end=0.02)
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [parameter], "lr": lr} for parameter, lr in zip(parameters, (2.0, 20.0), strict=True)]
    theirs = CosineLRScheduler(
        torch.optim.SGD(groups),
        t_initial=1000,
        lr_min=0.02,
        warmup_t=200,
        warmup_lr_init=0,
        cycle_limit=1,
        t_in_epochs=False,
    )
    for step in (0, 100, 199, 200, 500, 999):
        assert [schedule.value_for(factor, step, RUN) for factor in (1, 10)] == pytest.approx(theirs._get_lr(step))
    assert schedule.value(200, RUN) == pytest.approx(0.02 + 1.98 * 0.5 * (1 + math.cos(0.2 * math.pi)))  # not the peak
    assert schedule.value_for(10, 1000, RUN) == schedule.value(1000, RUN) == pytest.approx(0.02)
    assert WarmupCosine(peak=2.0).value_for(10, 500, RUN) == pytest.approx(10.0)


def test_a_value_per_epoch_is_that_of_the_epoch_s_first_step():
    """MoCo's rate: peak / 2 * (1 + cos(pi * epoch / epochs)), in 20 epochs of 50 steps."""
    schedule = WarmupCosine(peak=0.03, per_epoch=True)
    for epoch in range(20):
        rate = 0.015 * (1 + math.cos(math.pi * epoch / 20))
        assert [schedule.value(50 * epoch + step, RUN) for step in (0, 1, 49)] == pytest.approx([rate] * 3)
    odd = Horizon(total_steps=21, steps_per_epoch=21 / 9, batch_size=1)  # an epoch's last step is also the next's first
    assert [odd.epoch_start(step) for step in (0, 2, 3, 7)] == pytest.approx([0, 0, 21 / 9, 7])


def test_an_inclusive_warmup_is_numpy_s_linspace():
    """DINO's and SwAV's rates step by step, and DINO's temperature epoch by epoch."""
    schedule = WarmupCosine(peak=2.0, warmup="2 epochs", start=0.5, inclusive=True)
    steps = np.linspace(0.5, 2.0, 100)
    assert [schedule.value(step, RUN) for step in range(100)] == pytest.approx(steps.tolist(), rel=1e-12)
    assert schedule.value(100, RUN) == 2.0
    warm = LinearWarmup(0.04, 0.07, "3 epochs", per_epoch=True, inclusive=True)
    assert [warm.value(step, RUN) for step in (0, 49, 50, 99, 100, 149, 150)] == pytest.approx(
        [0.04, 0.04, 0.055, 0.055, 0.07, 0.07, 0.07]
    )


def test_warmup_linear_at_hand_worked_points():
    schedule = WarmupLinear(peak=2.0, warmup="20%", start=0.4, end=0.2)
    steps = {0: 0.4, 100: 1.2, 200: 2.0, 400: 1.55, 600: 1.1, 1000: 0.2, 1200: 0.2}
    assert {step: schedule.value(step, RUN) for step in steps} == pytest.approx(steps)
    assert WarmupLinear(peak=1.0, warmup="40 epochs").value(500, RUN) == pytest.approx(0.5)


def test_drops_at_hand_worked_points():
    schedule = WarmupDrops(peak=2.0, drops=["60%", "16 epochs"], warmup=100, start=0.4)
    steps = {0: 0.4, 50: 1.2, 100: 2.0, 599: 2.0, 600: 0.2, 799: 0.2, 800: 0.02, 1000: 0.02}
    assert {step: schedule.value(step, RUN) for step in steps} == pytest.approx(steps)
    assert WarmupDrops(peak=1.0, drops=[500], factor=0.5).value(500, RUN) == 0.5


def test_a_warmup_longer_than_the_run_ends_below_the_peak_without_dividing_by_zero():
    schedule = WarmupCosine(peak=1.0, warmup="40 epochs")
    assert schedule.value(500, RUN) == pytest.approx(0.5)
    assert WarmupCosine(peak=1.0).value(0, RUN) == 1.0
    assert WarmupCosine(peak=1.0).value(0, Horizon(total_steps=0, steps_per_epoch=1, batch_size=1)) == 0.0


def test_a_switch_turns_at_the_end_of_its_duration():
    switch = Switch(at="10%")
    turned = RUN.total_steps // 10
    assert [switch.value(step, RUN) for step in (0, turned - 1, turned, RUN.total_steps)] == [0, 0, 1, 1]
    assert Switch(at=0, before=2.0, after=3.0).value(0, RUN) == 3.0


def test_lines_cosines_and_constants():
    assert Linear(0.04, 0.07, "10 epochs").value(250, RUN) == pytest.approx(0.055)
    assert Linear(0.04, 0.07, "10 epochs").value(900, RUN) == pytest.approx(0.07)
    assert Cosine(0.996, 1.0).value(0, RUN) == pytest.approx(0.996)
    assert Cosine(0.996, 1.0).value(500, RUN) == pytest.approx(0.998)
    assert Cosine(0.996, 1.0).value(250, RUN) == pytest.approx(1 - 0.004 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert Constant(0.9).value(123, RUN) == 0.9


def test_a_switch_turns_after_its_duration():
    schedule = Switch(at="2 epochs", before=0.0, after=1.0)
    boundary = int(RUN.steps("2 epochs"))
    assert [schedule.value(step, RUN) for step in (0, boundary - 1, boundary, RUN.total_steps)] == [0, 0, 1, 1]


def test_drops_without_a_warmup():
    horizon = Horizon(total_steps=180, steps_per_epoch=10, batch_size=4)
    schedule = WarmupDrops(peak=0.5, drops=["6 epochs", "12 epochs"])
    found = [schedule.value(step, horizon) for step in (0, 59, 60, 119, 120, 179)]
    assert found == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])


@pytest.mark.parametrize(
    "schedule",
    [
        WarmupCosine(peak=1.0, warmup="10 epochs"),
        WarmupLinear(peak=1.0, warmup="500 steps"),
        WarmupDrops(peak=1.0, drops=["90%"], warmup="128k samples"),
        LinearWarmup(start=0.0, end=1.0, warmup=500),
    ],
)
def test_a_warmup_is_capped_at_a_share_of_the_run(schedule: Schedule):
    """500 of 1000 steps, capped at 200."""
    capped = replace(RUN, max_warmup="20%")
    assert schedule.value(100, RUN) == pytest.approx(0.2)
    assert schedule.value(100, capped) == schedule.value(100, replace(RUN, max_warmup=0.2)) == pytest.approx(0.5)
    assert schedule.value(200, capped) == 1.0
    assert schedule.value(100, replace(RUN, max_warmup=0.5)) == pytest.approx(0.2)


def test_shorter_warmups_and_those_in_percent_are_not_capped():
    capped = replace(RUN, max_warmup="20%")
    assert [capped.warmup_steps(duration) for duration in ("2 epochs", "20 epochs", "30%", "200%")] == [
        100,
        200,
        300,
        1000,
    ]
    assert RUN.warmup_steps("40 epochs") == 1000  # never more than the run
    assert replace(RUN, max_warmup=0).warmup_steps("2 epochs") == 0


def test_a_switch_is_capped_only_after_a_warmup():
    capped = replace(RUN, max_warmup="20%")
    for warmup, turn in ((True, 200), (False, 500)):
        switch = Switch(at="10 epochs", warmup=warmup)
        assert [switch.value(step, capped) for step in (turn - 1, turn)] == [0, 1]
        assert [switch.value(step, RUN) for step in (499, 500)] == [0, 1]


@pytest.mark.parametrize("wrong", ["twenty", "120%", 1.5, -0.1, "20 %%", "5 epochs"])
def test_a_cap_that_is_no_share_is_refused_by_its_key(wrong):
    with pytest.raises(SettingError, match=f"max_warmup={wrong} must be a share of the run"):
        Horizon(total_steps=10, steps_per_epoch=1, batch_size=1, max_warmup=wrong)


def test_a_momentum_by_its_half_life() -> None:
    """In a hundredth of 1,000 steps an average with the first momentum forgets half; the way to 1 is a cosine."""
    schedule = Momentum(start=0.996, half_life="1%")
    assert schedule.value(0, RUN) ** 10 == pytest.approx(0.5)
    half = 0.5**0.1
    assert schedule.value(500, RUN) == pytest.approx((half + 1) / 2)
    assert schedule.value(1000, RUN) == pytest.approx(1.0)
    assert Momentum(start=0.996, half_life=0).value(0, RUN) == 0.0
    for step in (0, 250, 990):
        assert Momentum(start=0.996).value(step, RUN) == Cosine(start=0.996, end=1.0).value(step, RUN)
