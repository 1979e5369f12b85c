"""Jobs that are measured at once; with threads in the place of processes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from src.errors import UserError
from src.measure import side_by_side


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "ProcessPoolExecutor", lambda number, *_, **__: ThreadPoolExecutor(number))


def test_two_at_a_time() -> None:
    together = threading.Barrier(2, timeout=20)  # passed only if two jobs are there

    def square(job: int) -> int:
        together.wait()
        return job**2

    assert dict(side_by_side.results([1, 2, 3, 4], square, 2)) == {1: 1, 2: 4, 3: 9, 4: 16}


def test_one_worker_measures_in_this_thread_and_in_order() -> None:
    found = list(side_by_side.results([3, 1], lambda job: threading.current_thread(), 1))
    assert found == [(3, threading.main_thread()), (1, threading.main_thread())]


def test_after_a_failure_no_other_job_begins() -> None:
    begun: list[int] = []

    def measure(job: int) -> int:
        begun.append(job)
        if job == 0:
            raise UserError("stopped")
        time.sleep(0.2)
        return job

    with pytest.raises(UserError, match="stopped"):
        list(side_by_side.results([0, 1, 2, 3, 4], measure, 2))
    assert 4 not in begun


def test_the_time_left_is_that_of_the_jobs_so_far(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """600 seconds for 1 of 4 jobs: 30 minutes for the other three."""
    clock = iter((0.0, 600.0, 1200.0, 1200.0, 1200.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = side_by_side.Progress(4)
    for text in "abcd":
        progress.report(text)
    assert capsys.readouterr().out.splitlines() == [
        "  1 of 4: a, about 30 minutes left",
        "  2 of 4: b, about 20 minutes left",
        "  3 of 4: c, about 7 minutes left",
        "  4 of 4: d",
    ]


def test_a_number_of_workers() -> None:
    assert (side_by_side.workers_of(None, 3), side_by_side.workers_of("2", 3)) == (3, 2)
    for given in ("0", "two", "-1", "1.5"):
        with pytest.raises(UserError, match=f"workers={given} must be a whole number from 1"):
            side_by_side.workers_of(given, 1)
