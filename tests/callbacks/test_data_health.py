from __future__ import annotations

from pathlib import Path

import pytest

from src.callbacks.checkpoints import Checkpoints
from src.callbacks.data_health import DataHealth, TooManyBadSamples
from src.loggers import MetricsFile
from tests.callbacks.small_runs import SmallData, fit


def test_replaced_samples_are_counted_over_the_run_and_over_a_resume(tmp_path: Path) -> None:
    data = lambda: SmallData(length=20, batch_size=4, bad=[3, 11])  # noqa: E731
    metrics = MetricsFile(tmp_path / "metrics.json")
    health = DataHealth()
    fit(tmp_path, health, Checkpoints(tmp_path, every_minutes=None, monitor=None), data=data(), max_epochs=2)
    assert health.totals() == (4, 40)
    resumed = DataHealth()
    fit(tmp_path, resumed, data=data(), max_epochs=3, resume=tmp_path / "last.ckpt", loggers=[metrics])
    assert resumed.totals() == (6, 60)
    assert metrics._read()["train"]["health/replaced_samples"] == 6.0


@pytest.mark.parametrize(("limit", "stops"), [(0.05, False), (0.049, True)])
def test_too_many_bad_samples_stop_the_run_with_the_place_of_their_list(
    tmp_path: Path, limit: float, stops: bool
) -> None:
    data = SmallData(length=200, batch_size=4, bad=range(10))
    data.max_bad_share = limit
    data.bad_log = tmp_path / "bad.tsv"
    if not stops:
        assert fit(tmp_path, DataHealth(every_n_steps=50), data=data, max_epochs=1).global_step == 50
        return
    with pytest.raises(TooManyBadSamples) as stop:
        fit(tmp_path, DataHealth(every_n_steps=50), data=data, max_epochs=1)
    assert "10 of 200 samples (5.0%) could not be read" in str(stop.value)
    assert "max_bad_share allows 4.9%" in str(stop.value)
    assert str(data.bad_log) in str(stop.value)


def test_fewer_than_100_samples_do_not_stop_the_run(tmp_path: Path) -> None:
    data = SmallData(length=112, batch_size=8, bad=range(112))
    data.max_bad_share = 0.5
    health = DataHealth(every_n_steps=1)
    with pytest.raises(TooManyBadSamples):
        fit(tmp_path, health, data=data, max_epochs=1)
    assert health.totals() == (104, 104)  # 13 batches of 8: the first number of at least 100


def test_batches_without_the_field_replaced_are_not_counted() -> None:
    assert DataHealth().totals() == (0, 0)
