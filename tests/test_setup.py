"""`tools/setup.sh` on a copy of its inputs, with a script in place of Python that notes what it is asked to do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from src.configuration import PROJECT

# plays python, the venv it makes and the pip in there; WORDS in FAKE_* make it misbehave
FAKE_PYTHON = r"""#!/bin/sh
echo "$*" >> "$FAKE_LOG"
case "$*" in
  --version) echo "Python $FAKE_VERSION" ;;
  "-c import sys;"*) case "$FAKE_VERSION" in 3.9.*|3.10.*) exit 1 ;; esac ;;
  "-c import ensurepip, venv") [ -z "$FAKE_NO_VENV" ] ;;
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip install"*"-e"*)
    [ -z "$FAKE_SLEEP" ] || sleep "$FAKE_SLEEP"
    echo "pip has slept" >> "$FAKE_LOG"
    [ -z "$FAKE_KILL" ] || kill -9 "$PPID"
    [ -z "$FAKE_OFFLINE" ] || { echo "pip: no route to the index" >&2; exit 1; } ;;
esac
"""

VENV = "-m venv .venv"


def _heed_signals() -> None:
    """A shell cannot trap a signal that it was started to ignore, as in the background."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Copy:
    """A project folder of its own, with a space in its name."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "my project"
        (self.root / "tools").mkdir(parents=True)
        shutil.copy(PROJECT / "tools/setup.sh", self.root / "tools")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(PROJECT / name, self.root)
        self.python = folder / "python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        self.log = folder / "log"
        self.stamp = self.root / ".venv/.complete"

    def start(self, **settings: str) -> subprocess.Popen[str]:
        fakes = {"FAKE_VERSION": "3.11.2", "FAKE_NO_VENV": "", "FAKE_SLEEP": "", "FAKE_KILL": "", "FAKE_OFFLINE": ""}
        environment = os.environ | fakes | {"PYTHON": str(self.python), "FAKE_LOG": str(self.log)} | settings
        # from elsewhere: the script finds its project itself
        return subprocess.Popen(
            [self.root / "tools/setup.sh"],
            cwd="/",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_heed_signals,
        )

    def setup(self, **settings: str) -> tuple[int, str, list[str]]:
        """The exit code, what was written to stderr, and what Python and pip were asked to do."""
        self.log.write_text("")
        process = self.start(**settings)
        _, errors = process.communicate(timeout=30)
        return process.returncode, errors, self.log.read_text().splitlines()

    def leftovers(self) -> set[str]:
        return {path.name for path in self.root.iterdir()} - {"tools", "pyproject.toml", "constraints.txt", ".venv"}


@pytest.fixture
def project(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def installs(calls: list[str]) -> list[str]:
    return [call for call in calls if call.startswith("-m pip install") and "-e" in call.split()]


def test_a_fresh_machine_gets_a_venv_with_the_tested_pins_and_a_stamp_at_the_end(project: Copy) -> None:
    code, _, calls = project.setup()
    assert code == 0
    assert calls.count(VENV) == 1
    [install] = installs(calls)
    assert "-c constraints.txt" in install
    assert install.endswith("-e .[dev,detection,emoji,slurm,video]")
    assert calls.index(VENV) < calls.index(install)
    assert calls[-1].startswith("-c import torch")  # what was installed is looked at before it counts as done
    assert project.stamp.read_text()
    assert project.leftovers() == set()


def test_where_all_is_done_python_is_not_even_started(project: Copy) -> None:
    project.setup()
    stamp = project.stamp.stat().st_mtime_ns
    assert project.setup() == (0, "", [])
    assert project.stamp.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt", "tools/setup.sh"])
def test_changed_requirements_are_installed_into_the_same_venv(project: Copy, changed: str) -> None:
    project.setup()
    before = project.stamp.read_text()
    mine = project.root / ".venv/mine"
    mine.touch()
    with (project.root / changed).open("a") as file:
        file.write("# another line\n")
    code, _, calls = project.setup()
    assert code == 0
    assert VENV not in calls
    assert len(installs(calls)) == 1
    assert mine.exists()
    assert project.stamp.read_text() != before
    assert project.setup()[2] == []


@pytest.mark.parametrize("first", [False, True], ids=["an update", "the first install"])
def test_an_install_that_was_killed_is_done_again_from_scratch(project: Copy, first: bool) -> None:
    if not first:
        project.setup()
        (project.root / "constraints.txt").write_text("torch==2.6\n")
    code, _, _ = project.setup(FAKE_KILL="yes")
    assert code == -signal.SIGKILL
    assert not project.stamp.exists()
    half = project.root / ".venv/half"
    half.touch()
    code, _, calls = project.setup()
    assert code == 0
    assert VENV in calls
    assert not half.exists()
    assert project.stamp.exists()
    assert project.leftovers() == set()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_stops_pip_too(project: Copy, number: int, code: int) -> None:
    project.log.write_text("")
    process = project.start(FAKE_SLEEP="1")
    while not installs(project.log.read_text().splitlines()):
        time.sleep(0.01)
    process.send_signal(number)
    process.wait(timeout=10)
    assert process.returncode == code
    time.sleep(1.2)  # past the end of what pip was doing
    assert "pip has slept" not in project.log.read_text()
    assert not project.stamp.exists()


def test_a_failed_install_leaves_no_stamp_and_pips_own_words(project: Copy) -> None:
    code, errors, _ = project.setup(FAKE_OFFLINE="yes")
    assert code == 1
    assert "no route to the index" in errors
    assert not project.stamp.exists()


def test_a_venv_whose_python_is_gone_is_made_anew(project: Copy) -> None:
    project.setup()
    interpreter = project.root / ".venv/bin/python"
    interpreter.unlink()
    interpreter.symlink_to(project.root / "python-of-last-year")
    code, _, calls = project.setup()
    assert code == 0
    assert VENV in calls
    assert os.access(interpreter, os.X_OK)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FAKE_VERSION": "3.9.2"}, "needs Python 3.11 or newer; '{python}' is Python 3.9.2."),
        ({"FAKE_NO_VENV": "yes"}, "apt install python3-venv"),
        ({"PYTHON": "python-nowhere"}, "needs Python 3.11 or newer; 'python-nowhere' is missing."),
    ],
)
def test_a_python_that_will_not_do_is_answered_with_what_to_do(
    project: Copy, settings: dict[str, str], message: str
) -> None:
    code, errors, calls = project.setup(**settings)
    assert code == 2
    assert message.format(python=project.python) in errors
    assert len(errors.splitlines()) == 1
    assert VENV not in calls
    assert not (project.root / ".venv").exists()
    assert project.leftovers() == set()


def test_of_two_commands_at_once_one_installs(project: Copy) -> None:
    project.log.write_text("")
    both = [project.start(FAKE_SLEEP="0.5") for _ in range(2)]
    for process in both:
        process.communicate(timeout=30)
    assert [process.returncode for process in both] == [0, 0]
    assert len(installs(project.log.read_text().splitlines())) == 1
    assert project.leftovers() == set()
