"""The page is a function of what is stored; a verdict needs every pair; nothing finished is measured twice."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from src import configuration
from src.claims import __main__ as command
from src.claims import ledger, page
from src.claims.claim import Claim, as_dict, load
from src.configuration import PROJECT
from src.errors import UserError
from src.measure import machine, result_cache
from src.measure.train_command import TrainingFailed
from src.runs import Run
from tests.claims.test_claim import RANK, arms, claim
from tests.commands import SECONDS

ABOUT = {
    "date": "2030-01-01 10:00",
    "commit": "abc",
    "cpu": "a CPU",
    "cores": 2,
    "torch": "2",
    "threads": 1,
    "others": 0.0,
}


def run(value: float, **more: Any) -> dict[str, Any]:
    spent = {"steps": 100, "images": 6400, "seconds": 60.0, "flops": 1e12} | more
    return {"about": ABOUT, "recipe": "r", "values": {"effective rank": value}, "spent": spent}


def broken(reason: str) -> dict[str, Any]:
    return {"about": ABOUT, "recipe": "r", "failed": reason}


def runs(less: list[Any], more: list[Any], data: str = "scenes") -> dict[str, Any]:
    """Seeds 0, 1, …; a number is a run's value."""
    found = {}
    for arm, values in (("less", less), ("more", more)):
        for seed, value in enumerate(values):
            if value is not None:
                found[f"{data}/{seed}/{arm}"] = value if isinstance(value, dict) else run(value)
    return found


def entry(of: Claim, found: dict[str, Any]) -> dict[str, Any]:
    difference = {data: {"model.mask_ratio": [0.5, 0.75]} for data in of.data}
    return {"claim": as_dict(of), "difference": difference, "runs": found}


def outcome(of: Claim, stored: dict[str, Any], data: str = "scenes") -> ledger.Outcome:
    return ledger.outcome(of, stored, data, of.metrics[0])


def measure(
    of: Claim, stored: dict[str, Any] | None = None, save: Any = None, data: str | None = None, **options: Any
) -> dict[str, Any]:
    """Measures one claim."""

    def save_copy(name: str, entry: dict[str, Any]) -> None:
        if save:
            save(json.loads(json.dumps(entry)))

    return ledger.measure({of.name: ledger.plan(of, stored or {}, data)}, save=save_copy, **options)[of.name]


def rank(**changes: Any) -> list[dict[str, Any]]:
    return [RANK | changes]


def value(result: dict[str, Any]) -> float | None:
    return result.get("values", {}).get("effective rank")


class TestOutcome:
    def test_a_verdict_of_pairs(self) -> None:
        found = outcome(claim(), {"runs": runs([1.0, 2.0, 3.0], [2.0, 3.1, 3.9])})
        assert (found.verdict, found.note) == ("reproduced", "")
        assert found.pairs == {0: (1.0, 2.0), 1: (2.0, 3.1), 2: (3.0, 3.9)}
        lower = outcome(claim(metrics=rank(direction="lower")), {"runs": runs([1.0, 2.0, 3.0], [2.0, 3.1, 3.9])})
        assert lower.verdict == "not reproduced"

    def test_before_the_last_pair_there_is_none(self) -> None:
        found = outcome(claim(), {"runs": runs([1.0, 2.0, 3.0], [2.0, 3.0, None])})
        assert (found.verdict, found.note) == ("unfinished", "2 of 3 pairs")
        assert outcome(claim(), {}).verdict == "not measured yet"

    def test_a_failed_run_costs_the_verdict(self) -> None:
        found = outcome(claim(), {"runs": runs([1.0, 2.0, 3.0], [2.0, broken("the loss is nan"), 4.0])}, "scenes")
        assert (found.verdict, found.note) == ("inconclusive", "1 of 6 runs failed")
        assert found.failed == {"1/more": "the loss is nan"}
        assert found.pairs == {0: (1.0, 2.0), 2: (3.0, 4.0)}

    def test_without_any_pair_it_has_failed(self) -> None:
        found = outcome(claim(), {"runs": runs([1.0, 2.0, 3.0], [broken("nan")] * 3)})
        assert (found.verdict, found.note, found.difference) == ("failed", "3 of 6 runs failed", None)

    def test_one_seed_is_no_verdict(self) -> None:
        found = outcome(claim(seeds=[0]), {"runs": runs([1.0], [9.0])})
        assert (found.verdict, found.note) == ("inconclusive", "one seed is no verdict")

    def test_budgets_that_are_not_equal_are_no_verdict(self) -> None:
        long = [run(2.0), run(3.0), run(4.0, steps=125, seconds=63.0)]
        found = outcome(claim(), {"runs": runs([1.0, 2.0, 3.0], long)})
        assert (found.verdict, found.note) == ("no verdict", "budgets are 20 % apart in steps (100 and 125)")
        by_time = claim(budget={"equal": "seconds", "how": "x", "within": 0.05})  # 3 of 63 seconds are 4.8 %
        assert outcome(by_time, {"runs": runs([1.0, 2.0, 3.0], long)}).verdict == "reproduced"
        stricter = claim(budget={"equal": "seconds", "how": "x", "within": 0.04})
        assert outcome(stricter, {"runs": runs([1.0, 2.0, 3.0], long)}).verdict == "no verdict"

    def test_what_was_not_counted_cannot_be_equal(self) -> None:
        uncounted = run(1.0)
        del uncounted["spent"]["flops"]
        of = claim(budget={"equal": "flops", "how": "x"})
        assert outcome(of, {"runs": runs([uncounted, 1.0, 1.0], [2.0] * 3)}).note == "flops were not counted"

    def test_arms_that_have_not_learned_say_so(self) -> None:
        """Both means are 2 and 3; the floor's is 2.9, then 3. A floor that is not there says nothing."""
        of, found = claim(), runs([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])

        def note(*floors: float) -> str:
            stored = {f"scenes/{seed}": {"values": {"effective rank": floor}} for seed, floor in enumerate(floors)}
            return outcome(of, {"runs": found, "floors": stored}).note

        assert note(2.9, 2.8, 3.0) == ""
        assert note(3.0, 2.8, 3.2) == "neither arm ends above its random start"
        assert note(9.0, 9.0) == ""


class TestOverallVerdict:
    """A claim with two metrics on two data sets: retrieval judges on emoji, the rank on both."""

    of = claim(
        data={"scenes": [], "emoji": []},
        metrics=[RANK, RANK | {"name": "std", "value": "health/feature_std", "data": ["emoji"], "direction": "lower"}],
    )

    def entry(self, scenes: list[float], emoji: list[float], std: list[float]) -> dict[str, Any]:
        """Values of the second arm; the first has 1, 2, 3 in all metrics."""
        found = runs([1.0, 2.0, 3.0], scenes) | runs([1.0, 2.0, 3.0], emoji, "emoji")
        for seed in range(3):
            found[f"emoji/{seed}/less"]["values"]["std"] = seed + 1.0
        for seed, number in enumerate(std):
            found[f"emoji/{seed}/more"]["values"]["std"] = number
        return entry(self.of, found)

    def test_all_metrics_on_all_data_sets_or_in_part(self) -> None:
        more, same, fewer = [2.0, 3.1, 3.9], [1.0, 2.1, 2.9], [0.0, 1.1, 2.1]
        assert ledger.overall_verdict(self.of, self.entry(more, more, fewer)) == "reproduced"
        assert ledger.overall_verdict(self.of, self.entry(more, more, more)) == "in part"
        assert ledger.overall_verdict(self.of, self.entry(more, same, more)) == "in part"
        assert ledger.overall_verdict(self.of, self.entry(same, same, same)) == "not reproduced"
        assert ledger.overall_verdict(self.of, self.entry(more, more[:2], fewer[:2])) == "unfinished"
        assert ledger.overall_verdict(self.of, {}) == "not measured yet"

    def test_the_page_opens_with_the_count_and_has_a_row_for_each_metric(self) -> None:
        more, fewer = [2.0, 3.1, 3.9], [0.0, 1.1, 2.1]
        stored = self.entry(more, more, fewer)
        text = page.render({"more": stored}, [self.of])
        assert "**Of 1 claims: 1 reproduced.**" in text
        rows = [line for line in text.splitlines() if line.startswith("| [More is more]")]
        assert [row.split(" | ")[1:3] for row in rows] == [
            ["scenes", "effective rank"],
            ["emoji", "effective rank"],
            ["emoji", "std"],
        ]
        assert "effective rank higher by at least 0.5; std on emoji lower by at least 0.5" in text
        assert text.count("| less | 1 | 2 | 3 | 2 ± 1 |") == 3
        text = page.render({"more": stored}, [self.of, claim(title="Other")], {"more": {"emoji"}})
        assert "**Of 1 claims: 1 measured with an earlier recipe alone.**" in text


class TestPage:
    def test_the_projects_page_is_what_its_numbers_render_to(self) -> None:
        results = json.loads((PROJECT / "docs/claims.json").read_text())
        claims = [load(name) for name in configuration.names("claim")]
        outdated = {each.name: ledger.outdated(each, results.get(each.name, {})) for each in claims}
        written = (PROJECT / "docs/claims.md").read_text()
        assert written == page.render(results, claims, outdated), "python -m src.claims --write brings it up to date"

    def test_verdicts_of_an_earlier_recipe_are_marked(self) -> None:
        of = claim(data={"scenes": [], "emoji": []})
        found = runs([1.0, 2.0, 3.0], [2.0, 3.1, 3.9]) | runs([1.0, 2.0, 3.0], [2.0, 3.1, 3.9], "emoji")
        text = page.render({"more": entry(of, found)}, [of], {"more": {"emoji"}})
        rows = [line for line in text.splitlines() if line.startswith("| [More is more]")]
        assert ["earlier recipe" in line for line in rows] == [False, True]
        assert "1 of the verdicts below were measured before" in text

    def test_nothing_measured(self) -> None:
        text = page.render({}, [claim()])
        assert (
            "| [More is more](#more) | scenes | effective rank | higher by 0.5 | – | 0 of 3 | not measured yet |"
            in text
        )
        assert "Not measured yet: `make claim CLAIM=more`." in text
        assert "There are no claims yet." in page.render({}, [])

    def test_numbers_spread_interval_budget_and_place(self) -> None:
        """Differences 0.9, 1.0, 1.1: deviation 0.1, half the interval 4.303 * 0.1 / sqrt(3) = 0.2484."""
        of = claim()
        text = page.render({"more": entry(of, runs([1.0, 2.0, 3.0], [1.9, 3.0, 4.1]))}, [of])
        assert "| +1 [+0.7516, +1.248] | 3 of 3 | **reproduced** |" in text
        assert "| less | 1 | 2 | 3 | 2 ± 1 |" in text
        assert "| more | 1.9 | 3 | 4.1 | 3 ± 1.1 |" in text
        assert "| difference | +0.9 | +1 | +1.1 | +1 [+0.7516, +1.248] |" in text
        assert "| `model.mask_ratio` | `0.5` | `0.75` |" in text
        assert "- A run of *more* took on average 100 steps, 6,400 images, 60 seconds, 1e+12 flops" in text
        assert text.count("commit abc") == 1

    def test_the_floor_is_a_row_and_what_was_tried_is_a_line(self) -> None:
        of = claim(tried="Half of the\n rate.")
        stored = entry(of, runs([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]))
        stored["floors"] = {"scenes/0": run(3.0), "scenes/1": run(4.0), "scenes/2": broken("no data")}
        text = page.render({"more": stored}, [of])
        assert "| random start | 3 | 4 | failed | 3.5 ± 0.71 |" in text
        assert "\n\nTried: Half of the rate.\n\n" in text
        assert "tried" not in stored["claim"]  # it may be written after measuring

    def test_failures_stay_with_their_reasons(self) -> None:
        of = claim(data={"scenes": [], "emoji": []})
        found = runs([1.0, 2.0, 3.0], [broken("the loss is nan at step 7")] * 3)
        text = page.render({"more": entry(of, found)}, [])  # its file may be gone
        assert "| scenes | effective rank | higher by 0.5 | – | 0 of 3 | **failed** (3 of 6 runs failed) |" in text
        assert "| more | failed | failed | failed | – |" in text
        assert "- Failed, seed 1, more: the loss is nan at step 7" in text
        assert "### more on emoji: not measured yet" in text

    def test_several_days_and_a_busy_hour_are_said_once(self) -> None:
        later = run(1.0) | {"about": ABOUT | {"date": "2030-01-03 09:00", "others": 1.5}}
        text = page.render({"more": entry(claim(), runs([1.0, 1.0, later], [1.0] * 3))}, [])
        assert "- 2030-01-01 10:00 to 2030-01-03 09:00, commit abc" in text
        assert "Other processes kept 1.5 cores busy" in text


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores_in_use", lambda: 0.0)


class TestMeasure:
    """With trainings that are not done."""

    @pytest.fixture(autouse=True)
    def fake(self, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
        self.done: list[str] = []
        self.stop_after = 99

        def one_run(job: result_cache.TrainingJob, *_: Any) -> dict[str, Any]:
            if len(self.done) == self.stop_after:
                raise KeyboardInterrupt
            self.done.append(f"{job.overrides[2]} {job.overrides[-2]}")
            return {"values": {"effective rank": float(len(self.done))}, "spent": {"steps": 1}}

        monkeypatch.setattr(ledger, "_measure_run", one_run)

    def of(self, **changes: Any) -> Claim:
        return claim(seeds=[0, 3], **changes)

    def test_one_data_set_now_and_the_other_later(self) -> None:
        both = self.of(data={"scenes": [], "emoji": []})
        first = measure(both, data="emoji")
        assert list(first["runs"]) == [f"emoji/{seed}/{arm.name}" for seed in (0, 3) for arm in both.arms]
        second = measure(both, stored=first, data="scenes")
        assert len(self.done) == len(second["runs"]) == 8
        assert second["runs"].items() >= first["runs"].items()
        with pytest.raises(UserError, match=r"data=stl10: claim .more. is measured on scenes, emoji"):
            measure(both, data="stl10")

    def test_pair_by_pair_and_on_where_it_was_killed(self) -> None:
        kept: list[dict[str, Any]] = []
        self.stop_after = 3
        with pytest.raises(KeyboardInterrupt):
            measure(self.of(), save=kept.append)
        assert self.done == ["seed=0 model.mask_ratio=0.5", "seed=0 scale=tiny", "seed=3 model.mask_ratio=0.5"]
        self.stop_after = 99
        found = measure(self.of(), stored=json.loads(json.dumps(kept[-1])))
        assert self.done[3:] == ["seed=3 scale=tiny"]
        assert [value(each) for each in found["runs"].values()] == [1.0, 2.0, 3.0, 4.0]
        assert found["difference"] == {"scenes": {"model.mask_ratio": [0.5, 0.75]}}

    def test_the_floor_is_what_the_second_arm_begins_with(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not where the metric is of training alone, where less is better, nor where the arms go on from a run."""
        asked: list[list[str]] = []

        def one_floor(job: result_cache.TrainingJob, *_: Any) -> dict[str, Any]:
            asked.append(list(job.overrides))
            return {"values": {"effective rank": 0.5}}

        monkeypatch.setattr(ledger, "_measure_floor", one_floor)
        patches = {"metrics": rank(evaluation="patchknn", value="patch_miou"), "split": "val"}
        of = self.of(**patches, arms=arms([], ["model.mask_ratio=0.5"]))
        found = measure(of)
        assert asked == [of.run_overrides(of.arms[1], "scenes", seed) for seed in (0, 3)]
        assert {key: value(each) for key, each in found["floors"].items()} == {"scenes/0": 0.5, "scenes/3": 0.5}
        assert len(found["runs"]) == 4
        measure(of, stored=found)
        assert (len(asked), len(self.done)) == (2, 4)
        less = self.of(**patches | {"metrics": rank(evaluation="patchknn", value="patch_miou", direction="lower")})
        begun = self.of(**patches, start={"name": "before", "experiment": "mae_tiny"})
        assert not any(measure(each)["floors"] for each in (self.of(), less, begun))
        assert len(asked) == 2

    def test_another_recipe_metric_or_split_is_measured_again_and_nothing_else(self) -> None:
        stored = measure(self.of())
        self.done.clear()
        measure(self.of(title="Another title", metrics=rank(least=0.1)), stored=stored)
        assert self.done == []
        measure(self.of(arms=[*arms(["model.mask_ratio=0.4"], [])[:1], stored["claim"]["arms"][1]]), stored=stored)
        assert len(self.done) == 2
        self.done.clear()
        measure(self.of(metrics=rank(value="health/feature_std")), stored=stored)
        assert len(self.done) == 4

    def test_runs_of_another_recipe_metric_or_data_set_are_outdated(self) -> None:
        both = self.of(data={"scenes": [], "emoji": []})
        stored = measure(both)
        assert ledger.outdated(both, stored) == set()
        assert ledger.outdated(self.of(data=both.data, common=["scale=tiny", "data.batch_size=32"]), stored) == {
            "scenes",
            "emoji",
        }
        on_one = self.of(data={"scenes": [], "emoji": ["data.batch_size=32"]})
        assert ledger.outdated(on_one, stored) == {"emoji"}
        assert ledger.outdated(self.of(data={"scenes": []}), stored) == {"emoji"}  # no longer part of the claim
        assert ledger.outdated(both, {}) == set()

    def test_runs_of_two_recipes_never_stand_side_by_side(self) -> None:
        stored = measure(self.of())
        kept: list[dict[str, Any]] = []
        changed = self.of(common=["scale=tiny", "data.batch_size=32"])
        self.done.clear()
        self.stop_after = 1
        with pytest.raises(KeyboardInterrupt):
            measure(changed, stored=stored, save=kept.append)
        assert list(kept[-1]["runs"]) == ["scenes/0/less"]

    def test_nothing_is_trained_for_arms_that_differ_in_more_or_a_metric_that_cannot_judge_there(self) -> None:
        with pytest.raises(UserError, match=r"differ in keys that `differs` does not list: model\.mask_ratio"):
            measure(self.of(differs=["optimizer"]))
        with pytest.raises(UserError, match="split=test, but effective rank is measured on train"):
            measure(self.of(split="test"))
        assert self.done == []


@contextmanager
def finished(folder: Path, logged: dict[str, float]) -> Iterator[result_cache.TrainedRun]:
    """A run that is gone when it was looked at."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        run = Run(Path(name))
        run.config_file.write_text("run: {dir: moved}\n")
        run.metrics_file.write_text(json.dumps({"train": logged}))
        run.last.parent.mkdir()
        for checkpoint in (run.last, run.best):
            checkpoint.write_text(str(logged))
        yield result_cache.TrainedRun(run, 1.5)


def test_both_arms_of_a_pair_go_on_from_one_run(monkeypatch: pytest.MonkeyPatch, quick: None, tmp_path: Path) -> None:
    """Trained once a seed, before them; gone afterwards; a changed start is a changed recipe."""
    trained: list[list[str]] = []
    there: list[Path] = []

    @contextmanager
    def fake(words: Sequence[str], config: Any) -> Iterator[result_cache.TrainedRun]:
        trained.append(list(words))
        for word in words:
            if word.startswith("checkpoint="):
                checkpoint = Path(word.removeprefix("checkpoint=").strip("'"))
                assert checkpoint.parent.parent.is_dir()
                there.append(checkpoint.parent.parent)
        with finished(tmp_path, {"step": 3, "health/effective_rank": 2.0}) as done:
            yield done

    monkeypatch.setattr(result_cache, "train_once", fake)
    start = {"name": "before", "experiment": "mae_tiny", "overrides": ["trainer.max_epochs=5"]}
    of = claim(seeds=[0, 3], start=start)
    found = measure(of)
    begins = [words for words in trained if "trainer.max_epochs=5" in words]
    assert [words[2] for words in begins] == ["seed=0", "seed=3"]
    assert trained.index(begins[1]) == 3
    assert there[0] == there[1] != there[2] == there[3]
    assert not any(folder.exists() for folder in there)
    assert all("values" in run for run in found["runs"].values())
    assert "both arms start from one run of *before*: `experiment=mae_tiny trainer.max_epochs=5`" in page.render(
        {"more": found}, [of]
    )
    trained.clear()
    measure(claim(seeds=[0], start=start), stored=found)
    assert trained == []
    measure(claim(seeds=[0], start=start | {"overrides": ["trainer.max_epochs=6"]}), stored=found)
    assert len(trained) == 3


def test_arms_that_differ_in_what_they_are_judged_by_are_one_run(
    monkeypatch: pytest.MonkeyPatch, quick: None, tmp_path: Path
) -> None:
    trained: list[str] = []

    def fake(words: Sequence[str], config: Any) -> AbstractContextManager[result_cache.TrainedRun]:
        trained.append(words[2])
        logged = {"step": 3, "health/effective_rank": 2.0, "health/feature_std": float(len(trained))}
        return finished(tmp_path, logged)

    monkeypatch.setattr(result_cache, "train_once", fake)
    other = {"evaluation": {"_target_": "src.claims.metrics.Logged"}, "value": "health/feature_std"}
    both = [{"name": "less", "experiment": "mae_tiny", "metric": other}, {"name": "more", "experiment": "mae_tiny"}]
    of = claim(seeds=[0, 3], arms=both, differs=["metric.value"])
    found = measure(of)
    assert trained == ["seed=0", "seed=3"]
    assert [value(run) for run in found["runs"].values()] == [1.0, 2.0, 2.0, 2.0]
    assert found["difference"]["scenes"] == {"metric.value": ["health/feature_std", "health/effective_rank"]}
    assert "`metric.value`" in page.render({"more": found}, [of])
    with pytest.raises(UserError, match="do not differ"):
        claim(arms=[each | {"metric": other} for each in both], differs=["metric.value"]).difference("scenes")


def test_what_two_claims_want_is_trained_once(monkeypatch: pytest.MonkeyPatch, quick: None, tmp_path: Path) -> None:
    """Judged by another number the run is there; one that failed is trained again. What began elsewhere is another."""
    trained: list[str] = []

    def fake(words: Sequence[str], config: Any) -> AbstractContextManager[result_cache.TrainedRun]:
        trained.append(" ".join(words))
        if "model.mask_ratio=0.5" in words and len(trained) < 3:
            raise TrainingFailed(words, 1, "no space left")
        return finished(tmp_path, {"step": 3, "health/effective_rank": 2.0, "health/feature_std": 0.5})

    monkeypatch.setattr(result_cache, "train_once", fake)
    run_folder = tmp_path / "kept"
    with monkeypatch.context() as before:
        before.setattr(machine, "about", lambda: ABOUT | {"commit": "trained"})
        found = measure(claim(seeds=[0]), run_folder=run_folder)
    assert [value(run) for run in found["runs"].values()] == [None, 2.0]
    again = measure(claim(seeds=[0], metrics=rank(value="health/feature_std")), run_folder=run_folder)
    assert [value(run) for run in again["runs"].values()] == [0.5, 0.5]
    assert [run["spent"]["seconds"] for run in again["runs"].values()] == [1.5, 1.5]
    first, second = (measured["runs"]["scenes/0/more"]["about"] for measured in (found, again))
    assert (first["commit"], second) == ("trained", first)  # judged later, and trained when it was
    assert len(trained) == 3
    assert trained[2] == trained[0]
    assert len(list(run_folder.glob("*/checkpoints/last.ckpt"))) == 2
    assert not list(run_folder.glob("*/checkpoints/best.ckpt"))
    for kept in run_folder.glob("*/trained.json"):
        kept.unlink()  # as somebody left it who was in a hurry
    measure(claim(seeds=[0]), run_folder=run_folder)
    assert len(trained) == 5
    begun = claim(seeds=[0], start={"name": "before", "experiment": "mae_tiny", "overrides": ["scale=smoke"]})
    measure(begun, run_folder=run_folder)
    assert len(trained) == 8


@pytest.mark.parametrize("code", ledger.STOPPED_CODES)
def test_a_training_that_somebody_stops_did_not_fail(code: int) -> None:
    def stopped(*_: Any) -> Any:
        raise TrainingFailed(["x"], code, "terminated")

    with pytest.raises(UserError, match="continues with the missing runs"):
        ledger._measure_run(result_cache.TrainingJob([]), None, stopped)  # type: ignore[arg-type]


def test_from_the_command_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """One arm stays as it began and is judged on the test split, so its floor is the same; the other one's loss is no
    number: it is said, and kept."""
    of = claim(
        seeds=[0],
        common=["scale=tiny", *SECONDS[1:-1], "trainer.max_epochs=1", "callbacks.throughput.every_n_steps=2"],
        arms=arms(["optimizer.lr=0.0"], ["optimizer.lr=1e20"]),
        differs=["optimizer.lr", "schedules.optimizer.lr.peak"],
        split="test",
        metrics=rank(
            evaluation={"_target_": "src.evaluation.patch_knn.PatchSegmentation", "k": 3}, value="patch_accuracy"
        ),
    )
    monkeypatch.setattr(command, "RUN_FOLDER", tmp_path / "kept")  # not the project's, which may hold it already
    command.measure([of], tmp_path)
    stored = json.loads((tmp_path / "claims.json").read_text())["more"]
    good, bad = stored["runs"]["scenes/0/a"], stored["runs"]["scenes/0/b"]
    assert (good["spent"]["steps"], good["spent"]["images"]) == (8, 32)
    assert good["spent"]["flops"] > 0
    # 16 test images of 4 x 4 patches
    assert 256 * value(good) == pytest.approx(round(256 * value(good)), abs=1e-4)
    assert stored["floors"]["scenes/0"]["values"] == good["values"]
    assert "the loss is" in bad["failed"]
    assert str(Path(tmp_path).parent) not in bad["failed"]
    text = (tmp_path / "claims.md").read_text()
    assert "**failed** (1 of 2 runs failed)" in text
    assert f"- Failed, seed 0, b: {bad['failed']}" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["claim=mae_mask"], "there is no claim 'mae_mask'; did you mean mae_mask_ratio"),
        (["clami=x"], "no option 'clami=x'; did you mean claim?"),
        (["claim=mae_mask_ratio", "workers=two"], "workers=two must be a whole number from 1"),
        (["claim=mae_mask_ratio", "again=fail"], "again must be failed or all, not 'fail'; did you mean failed"),
    ],
)
def test_typos_end_with_exit_code_2(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["claims", *words])
    with pytest.raises(SystemExit) as end:
        configuration.run_main(command.main)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_name_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in configuration.names("claim"))


def test_forgetting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[set[str]] = []
    elsewhere: list[bool] = []

    def plan(of: Claim, stored: dict[str, Any], data: None) -> ledger.Plan:
        planned.append(set(stored["runs"]))
        return ledger.Plan(entry(of, stored["runs"]) | {"floors": {}}, [])

    def measure(plans: dict[str, ledger.Plan], *, save: Any, run_folder: Path | None, workers: int) -> dict[str, Any]:
        elsewhere.append(run_folder is None)
        return {name: of.entry for name, of in plans.items()}

    monkeypatch.setattr(ledger, "plan", plan)
    monkeypatch.setattr(ledger, "measure", measure)
    found = runs([1.0, 2.0, 3.0], [2.0, broken("nan"), 4.0])
    for again in (None, "failed", "all"):
        (tmp_path / "claims.json").write_text(json.dumps({"more": entry(claim(), found)}))
        command.measure([claim()], tmp_path, again)
    assert planned == [set(found), set(found) - {"scenes/1/more"}, set()]
    assert elsewhere == [False, False, True]  # of a training that failed nothing is kept


def test_a_claim_that_cannot_be_measured_does_not_keep_others_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """Its problem is told at the end; a title that was changed is stored although nothing is missing."""
    measured: list[str] = []

    def one_run(job: result_cache.TrainingJob, *_: Any) -> dict[str, Any]:
        measured.append(job.overrides[-2])
        return {"values": {"effective rank": 1.0}, "spent": {"steps": 1}}

    monkeypatch.setattr(ledger, "_measure_run", one_run)
    bad = replace(claim(differs=["optimizer"]), name="bad")
    with pytest.raises(UserError, match="claim 'bad' on scenes: the arms differ in keys"):
        command.measure([bad, claim(seeds=[0])], tmp_path)
    assert len(measured) == 2
    command.measure([claim(seeds=[0], title="Less is less")], tmp_path)
    assert len(measured) == 2
    stored = json.loads((tmp_path / "claims.json").read_text())
    assert stored.keys() == {"more"}
    assert stored["more"]["claim"]["title"] == "Less is less"


def test_a_metric_that_a_stored_run_lacks_is_not_measured_yet() -> None:
    of = claim(metrics=[RANK, RANK | {"name": "std", "value": "health/feature_std"}])
    stored = {"runs": runs([1.0, 2.0, 3.0], [2.0, 3.1, 3.9])}
    assert ledger.outcome(of, stored, "scenes", of.metrics[1]).verdict == "unfinished"
    assert ledger.overall_verdict(of, stored) == "unfinished"
