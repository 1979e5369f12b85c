"""Two runs of seconds through the gauntlet: what is kept, what is measured again, and what fails."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from omegaconf import DictConfig

from src import configuration, evaluate, runs, train, trained
from src.configuration import CONFIGS
from src.errors import UserError
from src.evaluation_config import evaluation_config
from src.gauntlet import __main__ as gauntlet
from src.gauntlet.tasks import FineTuned, Frozen, FrozenHeadTask, GauntletEntry, hash_of
from src.models.backbones.image_encoder import ImageEncoder, cls_token
from tests.commands import SECONDS
from tests.evaluation.toy import tiny_encoder
from tests.gauntlet.test_ranking import ABOUT


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[runs.Run]:
    """What training would leave behind, of two seeds whose weights are not those of the beginning."""
    folder = tmp_path_factory.mktemp("runs")
    found = []
    for seed in range(2):
        config = train.compose([*SECONDS, f"paths.runs={folder}", f"seed={seed}"])
        run = runs.Run(folder / "mae_tiny" / f"run{seed}")
        run.last.parent.mkdir(parents=True)
        runs.store(run, config)
        module = trained.fresh(config)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        torch.save({"state_dict": module.state_dict()}, run.last)
        found.append(run)
    return found


@dataclass(frozen=True)
class Fake:
    """Says as many tenths as there were calls, or fails."""

    name: str
    problem: Exception | None = None
    metric: str = "top1"
    kind: str = "classification"
    lower_is_better: bool = False
    data: str | None = None
    version: int = 0
    seen: list[str] = field(default_factory=list)

    adaptation: ClassVar[str] = "frozen"

    def recipe(self, entry: GauntletEntry) -> tuple[DictConfig, Any]:
        return entry.feature_config, [self.name, self.version, entry.weights]

    def sample_fingerprint(self, entry: GauntletEntry) -> str:
        return entry.sample_fingerprint if self.data is None else self.data

    def __call__(self, entry: GauntletEntry) -> float:
        self.seen.append(entry.title)
        if self.problem is not None:
            raise self.problem
        return len(self.seen) / 10


@pytest.fixture
def run_with(two: list[runs.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("src.measure.machine.about", lambda: dict(ABOUT))

    def run(*tasks: Fake, count: int = 2, words: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
        monkeypatch.setattr(gauntlet, "tasks_named", lambda names: {task.name: task for task in tasks})
        given = " ".join(str(each.dir) for each in two[:count])
        assert gauntlet.main([f"run={given}", f"out={tmp_path}", *words]) == 0
        rows = json.loads((tmp_path / "scores.json").read_text())["scores"]
        return {f"{row['run']} {row['setting']}": row for row in rows}

    return run


TITLES = ["mae_tiny/run0", "random mae_tiny/run0", "mae_tiny/run1", "random mae_tiny/run1"]


def test_stored_results_are_not_measured_again(run_with: Any, tmp_path: Path) -> None:
    knn = Fake("knn")
    first = run_with(knn, count=1)
    assert knn.seen == TITLES[:2]
    assert {row["value"] for row in first.values()} == {0.1, 0.2}
    linear = Fake("linear")
    both = run_with(knn, linear)
    assert knn.seen == TITLES
    assert linear.seen == TITLES
    assert {key: both[key] for key in first} == first
    row = both["mae_tiny/run1 knn/scenes"]
    assert {key: row[key] for key in ("backbone", "setting", "metric", "value", "seed", "about")} == {
        "backbone": "mae_tiny",
        "setting": "knn/scenes",
        "metric": "top1",
        "value": 0.3,
        "seed": 1,
        "about": ABOUT,
    }
    assert both["random mae_tiny/run1 knn/scenes"]["backbone"] == "random mae_tiny"
    page = (tmp_path / "report.md").read_text().splitlines()
    # in the ranking and among the z-scores: two seeds are one backbone
    assert sum(line.startswith("| mae_tiny |") for line in page) == 2
    assert list(tmp_path.glob("events.out.tfevents.*"))
    # of a recipe that has changed nothing old is left
    changed = Fake("knn", version=1)
    assert run_with(changed, linear)["mae_tiny/run0 knn/scenes"]["value"] == 0.1
    assert changed.seen == TITLES


def test_failed_tasks_are_reported_and_tried_again(run_with: Any, tmp_path: Path, capsys: Any) -> None:
    good = Fake("good")
    broken, refused = Fake("broken", RuntimeError("out of memory")), Fake("refused", UserError("no masks there"))
    rows = run_with(broken, refused, Fake("nan"), good, count=1, words=("floor=false",))
    assert set(rows) == {"mae_tiny/run0 good/scenes", "mae_tiny/run0 nan/scenes"}
    page, printed = (tmp_path / "report.md").read_text(), capsys.readouterr().out
    for said in (
        "mae_tiny/run0, broken/scenes: RuntimeError: out of memory",
        "mae_tiny/run0, refused/scenes: no masks there",
    ):
        assert said in page
        assert said in printed
    mended = Fake("broken")
    rows = run_with(mended, good, count=1, words=("floor=false",))
    assert rows["mae_tiny/run0 broken/scenes"]["value"] == 0.1
    assert good.seen == TITLES[:1]
    assert "out of memory" not in (tmp_path / "report.md").read_text()


def test_non_finite_numbers_are_reported(run_with: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fake, "__call__", lambda self, entry: float("nan"))
    assert run_with(Fake("knn"), count=1) == {}
    assert "top1 is not a finite number" in (tmp_path / "report.md").read_text()


def test_a_setting_has_the_same_samples_for_all(run_with: Any) -> None:
    run_with(Fake("knn"))
    with pytest.raises(UserError, match=r"mae_tiny/run0 would be evaluated by .*/scenes on other samples"):
        run_with(Fake("linear"), Fake("knn"), count=1, words=("data.eval_samples=8",))


def test_an_untrained_encoder_is_one_whatever_method_begins_with_it() -> None:
    assert hash_of(tiny_encoder(0)) == hash_of(tiny_encoder(0)) != hash_of(tiny_encoder(1))
    assert hash_of(ImageEncoder(tiny_encoder(0).backbone, pool=cls_token)) != hash_of(tiny_encoder(0))


def test_a_task_with_data_of_its_own_is_one_setting_whatever_the_runs_data(run_with: Any) -> None:
    films = Fake("follow", data="films")
    rows = run_with(films, count=1, words=("data=scenes,emoji", "data.num_workers=0"))
    assert films.seen == TITLES[:2]
    assert {row["setting"] for row in rows.values()} == {"follow/films"}


def test_frozen_tasks_are_the_evaluations_of_make_evaluate(two: list[runs.Run], tmp_path: Path) -> None:
    words = [f"run={two[0].dir}", f"out={tmp_path}", "tasks=knn,instances,multilabel", "floor=false"]
    assert gauntlet.main(words) == 0
    rows = {row["setting"]: row for row in json.loads((tmp_path / "scores.json").read_text())["scores"]}
    assert evaluate.main([f"run={two[0].dir}", "eval=knn,instances,multilabel", "checkpoint=last"]) == 0
    judged = two[0].metrics()["evaluate"]["scenes"]["encoder"]
    for setting, metric in {"knn": "knn_top1", "instances": "instances_map", "multilabel": "multilabel_map"}.items():
        assert rows[f"{setting}/scenes"]["value"] == judged[metric]
        assert rows[f"{setting}/scenes"]["metric"] == metric


def test_every_task_of_the_gauntlet_names_what_there_is(two: list[runs.Run]) -> None:
    """Each composes for a run; an evaluation that does not exist would not."""
    run = two[0]
    config = evaluation_config(run, None, [])
    trained_one = GauntletEntry(run, config, "scenes", run.last, [], run.dir)
    tasks = gauntlet.tasks_named(None)
    assert {"knn", "linear", "labelpropagation", "finetune"} <= set(tasks)
    for task in tasks.values():
        recipe, _ = task.recipe(trained_one)
        if isinstance(task, FineTuned):
            frozen = recipe.model.get("frozen", False)
            assert frozen == isinstance(task, FrozenHeadTask)
            assert task.adaptation == ("frozen" if frozen else "fine-tuned")
    odd = Frozen("knnn", metric="knn_top1", kind="classification")
    with pytest.raises(UserError, match="no evaluation 'knnn'; did you mean knn"):
        odd.recipe(trained_one)


def test_fine_tuning_goes_on_from_the_weights_or_begins_anew(
    two: list[runs.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[DictConfig, Path]] = []

    def fine_tune(recipe: DictConfig, folder: Path) -> dict[str, float]:
        asked.append((recipe, folder))
        return {"eval/top1": 0.5, "eval/loss": 2.0}

    monkeypatch.setattr("src.finetuning.fine_tune", fine_tune)
    task = FineTuned(
        "linear_vitb", metric="eval/top1", kind="classification", own_data=["eval_view"], overrides=["optimizer.lr=0.5"]
    )
    run = two[0]
    config = evaluation_config(run, None, [])
    entries = [GauntletEntry(run, config, "scenes", each, [], tmp_path, ["seed=7"]) for each in (run.last, None)]
    assert [task(each) for each in entries] == [0.5, 0.5]
    (recipe, folder), (anew, other) = asked
    assert recipe.run.experiment == "linear_vitb"
    assert (recipe.checkpoint, anew.checkpoint) == (str(run.last), None)
    assert (recipe.optimizer.lr, recipe.seed, recipe.backbone.embed_dim) == (0.5, 7, 32)
    assert folder.parent == other.parent == tmp_path
    assert folder != other
    assert task.recipe(entries[0])[1] != task.recipe(entries[1])[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing value: run; type make gauntlet RUN="),
        (["run=nowhere"], "'nowhere' is not a run's folder"),
        (["run={run}", "tasks=knm"], "the gauntlet has no task 'knm'; did you mean knn?"),
        (["run={run}", "floor=maybe"], "floor is true or false, not 'maybe'"),
        (["run={run}", "evla=knn"], "there is no argument or key 'evla'"),
    ],
)
def test_mistakes_end_with_a_sentence_and_exit_code_2(
    two: list[runs.Run], words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["gauntlet", *(word.format(run=two[0].dir) for word in words)])
    with pytest.raises(SystemExit) as end:
        configuration.run_main(gauntlet.main)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_the_list_of_tasks_is_where_it_is_said() -> None:
    assert (CONFIGS / "gauntlet.yaml").is_file()
    assert list(gauntlet.tasks_named("linear knn")) == ["linear", "knn"]
