"""The cap on warm-ups leaves the papers' recipes as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from src import configuration
from src.callbacks.schedules import Schedules
from src.errors import SettingError
from src.schedules import Horizon

# samples of the papers' datasets, for recipes whose warm-up is in steps
SAMPLES = {
    "align": 1_800_000_000,
    "bag_of_words": 400_000_000,
    "clip": 400_000_000,
    "filip": 300_000_000,
    "siglip": 400_000_000,
    "detection": 118_287,
}
IMAGENET = 1_281_167


def horizon_of(name: str, config: Any) -> Horizon:
    samples = next((count for start, count in SAMPLES.items() if name.startswith(start)), IMAGENET)
    steps_per_epoch = samples // config.data.batch_size
    steps = config.trainer.max_steps
    return Horizon(
        total_steps=steps if steps > 0 else config.trainer.max_epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        batch_size=config.data.batch_size,
        max_warmup=config.max_warmup,
    )


@pytest.mark.parametrize("name", configuration.names("experiment"))
def test_the_cap_changes_no_paper_recipe(name: str):
    config = configuration.compose("train", [f"experiment={name}", "scale=paper"])
    assert config.callbacks.schedules.max_warmup == config.max_warmup == "20%"
    capped = horizon_of(name, config)
    uncapped = replace(capped, max_warmup=None)
    schedules = Schedules(configuration.instantiate(config.schedules)).schedules
    steps = [round(share / 200 * capped.total_steps) for share in range(200)] + list(range(0, 2000, 50))
    for path, schedule in schedules.items():
        values = ([schedule.value(step, horizon) for step in steps] for horizon in (capped, uncapped))
        assert next(values) == pytest.approx(next(values)), path
    freeze = config.callbacks.get("freeze")
    if freeze is not None:
        assert capped.warmup_steps(freeze.duration) == uncapped.warmup_steps(freeze.duration)


@pytest.mark.parametrize("schedules", [{"optimizer": 0}, {"optimizer": {"lr": 0.1}}, {"teacher_momentum": "cosine"}])
def test_a_value_that_is_no_schedule_is_refused(schedules):
    with pytest.raises(SettingError, match=r"schedules\.\S+ must be a schedule with a _target_, not"):
        Schedules(schedules)
