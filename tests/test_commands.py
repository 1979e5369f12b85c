"""What a person types, and what they are answered: through the Makefile, and on runs of seconds."""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src import configuration, listing, runs
from src.checkpoint_io import load_checkpoint
from src.configuration import PROJECT
from src.datamodules.batches.image import ImageBatch
from src.errors import UserError
from src.models.masked.mae import MAE
from src.train import check_batches, compose, fit, main
from tests.commands import SECONDS, train


def make(*words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`make` on the project's own Makefile, with the Python that runs the tests; setting up is tested by itself."""
    # the suite itself may have been started by make, whose level and flags are not these commands'
    dropped = ("PRETEXT_RUN_DIR", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.run(
        ["make", "-o", "setup", f"PY={sys.executable}", *words],
        cwd=PROJECT,
        env=kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"},  # no line is broken
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def passed_on(*words: str) -> list[str]:
    """What `make <words>` would run, as the program gets it, without the Python and its -m."""
    printed = make("-n", *words).stdout.replace("\\\n", " ")
    command = shlex.split(printed)
    assert command[:3] == ["exec", sys.executable, "-m"]
    return command[3:]


def test_help_names_every_target_and_is_what_make_says_alone() -> None:
    helped = make("help")
    assert helped.returncode == 0
    named = set(re.findall(r"^  make ([a-z]+) {2,}\S", helped.stdout, re.MULTILINE))
    declared = re.search(r"^\.PHONY: (.*)$", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    assert declared
    assert named == set(declared[1].split())
    assert make().stdout == helped.stdout


def test_every_target_but_help_and_clean_sets_up_first() -> None:
    rules = re.findall(r"^([a-z]+): ?(\w*)", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    assert {target for target, needs in rules if needs != "setup"} == {"help", "setup", "clean"}


def test_words_become_overrides_whatever_is_in_a_folders_name() -> None:
    folder = '/data/my pictures, {all}=[1] it\'s "so" $HOME $(pwd) ${image_size} 50%; # `id`'
    words = passed_on(
        "train",
        "EXP=mae_vitb",
        "SCALE=tiny",
        "DATA=imagenet",
        f"DATA_DIR={folder}",
        "CKPT=runs/a run/last.ckpt",
        "NAME=my first: run",
        "SEED=3",
        "DEVICES=2",
        "ARGS=trainer.max_epochs=5 data.batch_size=64",
    )
    assert words[0] == "src.train"
    config = compose(words[1:])
    assert (config.run.experiment, config.run.scale) == ("mae_vitb", "tiny")
    assert config.data.source.root == folder
    assert config.checkpoint == "runs/a run/last.ckpt"
    assert config.run.name == "my first: run"
    assert (config.seed, config.trainer.devices) == (3, 2)
    assert (config.trainer.max_epochs, config.data.batch_size) == (5, 64)


@pytest.mark.parametrize("target", ["train", "setup", "lint"])
def test_a_signal_to_make_alone_reaches_the_program(tmp_path: Path, target: str) -> None:
    """make hands SIGTERM on to its child, which must be the program and not a shell that dies without it."""
    program, started, saved = (tmp_path / name for name in ("program", "started", "saved"))
    # of lint the last program: the first two are those of ruff
    wait = f"case $* in *ruff*) exit 0 ;; esac\ntouch {started}\nwhile :; do sleep 0.05; done\n"
    program.write_text(f"#!/bin/sh\ntrap 'touch {saved}; exit 143' TERM\n{wait}")
    program.chmod(0o755)
    makefile = (PROJECT / "Makefile").read_text()
    (tmp_path / "Makefile").write_text(makefile.replace("exec tools/setup.sh", f"exec {program}"))
    options = [] if target == "setup" else ["-o", "setup"]
    process = subprocess.Popen(["make", *options, f"PY={program}", target], cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not started.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)
    assert saved.exists()


def test_every_recipe_ends_in_the_program() -> None:
    recipes = re.findall(r"^([a-z]+):.*\n((?:\t.*\n)+)", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    assert {name for name, lines in recipes if not re.search("(@|&& )exec ", lines)} == {"help", "clean"}


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["train"], ["src.train"]),
        (
            ["train", "EXP=a b", "SCALE=$x", "DATA=it's", "SEED=`id`", "DEVICES=;"],
            ["src.train", "experiment=a b", "scale=$x", "data=it's", "seed=`id`", "trainer.devices=;"],
        ),
        (["resume", "RUN=runs/a/it's $HOME"], ["src.resume", "run=runs/a/it's $HOME"]),
        (["list"], ["src.listing"]),
        (["resume", "RUN=runs/a/my run", "DEVICES=2"], ["src.resume", "run=runs/a/my run", "trainer.devices=2"]),
        (
            ["evaluate", "RUN=runs/a/b c", "EVAL=knn,linear", "DATA=emoji", "DATA_DIR=/my data"],
            ["src.evaluate", "run=runs/a/b c", "eval=knn,linear", "data=emoji", 'paths.data="/my data"'],
        ),
        (
            ["gauntlet", "RUN=runs/a/x runs/b/y", "DATA=scenes emoji", "ARGS=tasks=knn"],
            ["src.gauntlet", "run=runs/a/x runs/b/y", "data=scenes emoji", "tasks=knn"],
        ),
        (["export", "RUN=runs/a/b c", "FORMAT=hf"], ["src.export", "run=runs/a/b c", "format=hf"]),
        (["new", "METHOD=mine", "FROM=mae"], ["src.new", "method=mine", "from=mae"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_each_target_hands_its_words_on(words: list[str], command: list[str]) -> None:
    assert passed_on(*words) == command


def test_a_name_that_only_the_environment_has_names_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some systems keep the machine's name there; every run but the first would be refused."""
    monkeypatch.setenv("NAME", "this-machine")
    assert passed_on("train", "EXP=mae_tiny") == ["src.train", "experiment=mae_tiny"]
    assert passed_on("train", "EXP=mae_tiny", "NAME=mine") == ["src.train", "experiment=mae_tiny", 'run.name="mine"']
    assert passed_on("train", "EXP=mae_tiny", "NAME=") == ["src.train", "experiment=mae_tiny"]


def test_train_without_an_experiment_lists_them() -> None:
    shown = make("train")
    assert shown.returncode == 0
    for each in listing.experiments():
        [line] = [line for line in shown.stdout.splitlines() if re.match(rf"\s*{each.name} ", line)]
        assert each.family in line
        assert each.data in line
        assert each.paper.split(":")[0] in line
    assert "make train EXP=" in shown.stdout


def test_a_typo_ends_make_with_code_2_and_the_nearest_names() -> None:
    mistaken = make("train", "EXP=mae_vitbb")
    assert mistaken.returncode == 2  # also what make itself says of any failure: its message names the program's code
    assert re.search(r"\*\*\* .*train\] Error 2", mistaken.stderr)
    assert "error: there is no experiment 'mae_vitbb'; did you mean mae_vitb or " in mistaken.stderr
    assert "Traceback" not in mistaken.stderr
    assert mistaken.stdout == ""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[runs.Run, str]:
    """A run of seconds and what it said."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "300")  # nothing is broken over lines
        process = train(folder, "first")
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    return runs.Run(folder / "mae_tiny" / "first"), process.stdout


def test_a_run_leaves_a_folder_with_all_that_others_need(finished: tuple[runs.Run, str]) -> None:
    run, _ = finished
    left = sorted(str(path.relative_to(run.dir)) for path in run.dir.rglob("*") if path.is_file())
    events = [name for name in left if name.startswith("events.out.tfevents.")]
    assert len(events) == 1
    assert set(left) - set(events) == {
        ".lock",
        "config.yaml",
        "metrics.json",
        "card.md",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
    }
    config = run.config()
    assert (config.run.experiment, config.run.name, config.run.dir) == ("mae_tiny", "first", str(run.dir))
    configuration.check_complete(config)
    metrics = run.metrics()["train"]
    assert metrics["step"] == 16  # 32 samples in batches of 4, twice
    for name in ("loss/total", "eval/knn_top1", "eval/probe_top1", "schedule/optimizer.lr", "speed/images_per_second"):
        assert name in metrics
    assert load_checkpoint(run.last)["global_step"] == 16
    assert load_checkpoint(run.best)["encoders"] == {"encoder": "backbone."}
    card = (run.dir / "card.md").read_text()
    assert card.startswith("# first\n")
    assert "He et al., 2021" in card


def test_the_dashboard_groups_scalars_in_the_order_a_newcomer_looks(finished: tuple[runs.Run, str]) -> None:
    run, _ = finished
    events = EventAccumulator(str(run.dir))
    events.Reload()
    tags = events.Tags()
    groups = sorted({tag.split("/")[0] for tag in tags["scalars"]})
    assert groups == ["1_loss", "2_evaluation", "3_schedules", "4_health", "5_speed"]
    losses = events.Scalars("1_loss/total")
    assert [each.step for each in losses] == list(range(16))
    assert losses[-1].value == pytest.approx(run.metrics()["train"]["loss/total"], rel=1e-6)
    assert tags["images"] == ["images/reconstruction"]
    assert "recipe/text_summary" in tags["tensors"]


def test_the_closing_panel_says_where_the_run_is_and_what_to_type_next(finished: tuple[runs.Run, str]) -> None:
    run, said = finished
    opening, closing = said.split(" done ", 1)
    assert "Pretext: mae_tiny" in opening
    assert "tiny  (SCALE=paper, smoke or tiny changes it)" in opening
    assert re.search(r"step 1/16 +epoch 1/2 +loss \d", opening)
    assert f"{run.metrics()['train']['eval/knn_top1']:.4g}" in closing
    for command in (
        "make tensorboard",
        f"make evaluate RUN={run.title} EVAL=knn,linear",
        f'make resume RUN={run.title} ARGS="trainer.max_epochs=4"',
        f"make export RUN={run.title} FORMAT=timm",
    ):
        assert re.search(rf"(?m)^  [a-z ]+ {re.escape(command)}$", closing), command
    assert runs.find(run.title) == run  # as the commands name it


def test_a_name_that_is_taken_is_refused(
    finished: tuple[runs.Run, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run.dir.rglob("*")}
    words = [*SECONDS, f"paths.runs={run.dir.parents[1]}", "run.name=first"]
    monkeypatch.setattr(sys, "argv", ["train", *words])
    with pytest.raises(SystemExit) as end:
        configuration.run_main(main)
    assert end.value.code == 2
    assert f"{run.title} exists: continue it with `make resume RUN={run.title}`" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.dir.rglob("*")} == before


def test_two_processes_share_one_folder(tmp_path: Path) -> None:
    """Without a NAME: the folder's is decided once, before the second process exists."""
    small = [word for word in SECONDS if " " not in word and not word.startswith("experiment=")]
    arguments = [*small, "data.source.count=64", f"paths.runs={tmp_path}", "trainer.max_epochs=1"]
    arguments += ["trainer.strategy=ddp", "trainer.accelerator=cpu"]
    done = make("train", "EXP=mae_tiny", "DEVICES=2", f"ARGS={' '.join(arguments)}")
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / "mae_tiny").iterdir()
    run = runs.Run(folder)
    assert run.metrics()["train"]["step"] == 8  # the batch is that of both together
    assert load_checkpoint(run.last)["global_step"] == 8
    assert "| device | 2 x cpu |" in (folder / "card.md").read_text()
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    assert done.stdout.count("Pretext: mae_tiny") == 1
    assert done.stdout.count("make resume RUN=") == 1


def test_a_method_and_data_that_do_not_fit_are_refused_before_anything_starts() -> None:
    class PairBatch(dict):
        """What another kind of view makes."""

    module = MAE.__new__(MAE)
    with pytest.raises(
        UserError, match=r"MAE trains on ImageBatch, but the data makes PairBatch: data\.train_view must"
    ):
        check_batches(module, SimpleNamespace(batch_type=PairBatch))
    check_batches(module, SimpleNamespace(batch_type=ImageBatch))


def folder_of_pictures(root: Path, *, count: int, broken: Sequence[int]) -> None:
    """``count`` small JPEGs in two classes, those at the positions ``broken`` cut off in the middle."""
    for index in range(count):
        file = io.BytesIO()
        Image.effect_noise((40, 40), 20 + index).convert("RGB").save(file, "jpeg")
        path = root / ("ab"[index % 2]) / f"{index:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue()[: 300 if index in broken else None])


def test_too_many_unreadable_pictures_stop_the_run_with_code_1(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "my pictures"
    broken = range(0, 40, 5)
    folder_of_pictures(data, count=40, broken=broken)
    words = [word for word in SECONDS if not word.startswith("data.source")]
    words += ["data=image_folder", f"paths.data='{data}'", f"paths.runs={tmp_path}", "run.name=poor"]
    config = compose([*words, "trainer.max_epochs=20", "callbacks.evaluation=null"])
    run = runs.create(config)
    assert fit(config, run) == 1
    told = capfd.readouterr().err
    assert re.search(
        r"error: stopped: \d+ of \d+ samples \(.*%\) could not be read and were replaced; "
        r"data.max_bad_share allows 1.0%. They are listed in .*bad_samples.tsv",
        told,
    )
    assert "Traceback" not in told
    listed = {line.split("\t")[0] for line in (run.dir / "bad_samples.tsv").read_text().splitlines()}
    assert listed
    assert {int(Path(name).stem) for name in listed} <= set(broken)
