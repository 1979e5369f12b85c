"""What a claim's file has to say, and what its arms may differ in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from src import configuration, train
from src.claims.claim import Claim, as_dict, difference, load, parse
from src.claims.metrics import Metric
from src.errors import UserError

RANK: dict[str, Any] = {
    "name": "effective rank",
    "evaluation": {"_target_": "src.claims.metrics.Logged"},
    "value": "health/effective_rank",
    "least": 0.5,
}
CONTENT: dict[str, Any] = {
    "title": "More is more",
    "paper": "A paper (Somebody, 2020)",
    "claim": "More is more.",
    "arms": [
        {"name": "less", "experiment": "mae_tiny", "overrides": ["model.mask_ratio=0.5"]},
        {"name": "more", "experiment": "mae_tiny"},
    ],
    "differs": ["model.mask_ratio"],
    "metrics": [RANK],
    "budget": {"equal": "steps", "how": "the same epochs"},
    "split": "train",
}


def claim(**changes: Any) -> Claim:
    return parse("more", copy.deepcopy(CONTENT) | changes)


def arms(first: list[str], second: list[str], experiments: tuple[str, str] = ("mae_tiny", "mae_tiny")) -> list[Any]:
    return [
        {"name": name, "experiment": experiment, "overrides": words}
        for name, experiment, words in zip(("a", "b"), experiments, (first, second), strict=True)
    ]


@pytest.mark.parametrize("name", configuration.names("claim"))
def test_every_claim_of_the_project_can_be_measured(name: str) -> None:
    """It parses, its metric can be built and judges on its split, and its arms differ in what it lists, in no more."""
    found = load(name)
    for data in found.data:
        for arm in found.arms:
            specs = found.metrics_of(arm, data).values()
            assert all(found.split in Metric(**spec).splits for spec in specs)
        assert found.difference(data)
    assert as_dict(parse(name, as_dict(found))) == as_dict(found)
    assert len(found.seeds) > 1


def test_what_is_not_said() -> None:
    found = claim()
    assert (found.seeds, found.common, found.data) == ([0, 1, 2], ["scale=tiny"], {"scenes": []})
    assert (found.budget.within, found.arms[1].overrides) == (0.0, [])
    assert claim(data={"emoji": None}).data == {"emoji": []}


def test_what_both_arms_go_on_from() -> None:
    start = {"name": "CLIP", "experiment": "clip_vitb32", "overrides": ["scale=tiny"]}
    found = claim(start=start)
    assert found.start_overrides("scenes", 2) == ["experiment=clip_vitb32", "data=scenes", "seed=2", "scale=tiny"]
    assert as_dict(found)["start"] == start
    assert "start" not in as_dict(claim())
    assert claim().start_overrides("scenes", 2) == []
    with pytest.raises(UserError, match=r"claim 'more': unknown key 'start.experimnet'; did you mean experiment"):
        claim(start=start | {"experimnet": "x"})
    with pytest.raises(UserError, match=r"claim 'more': start.overrides: .* is not a ListConfig, list or tuple"):
        claim(start=start | {"overrides": "scale=tiny"})


def test_an_arm_has_the_last_word() -> None:
    found = claim(common=["scale=smoke", "data.batch_size=4"], data={"emoji": ["data.batch_size=8"]})
    assert found.run_overrides(found.arms[0], "emoji", 7) == [
        "experiment=mae_tiny",
        "data=emoji",
        "seed=7",
        "scale=smoke",
        "data.batch_size=4",
        "data.batch_size=8",
        "model.mask_ratio=0.5",
    ]


def test_an_override_may_refer_to_the_run() -> None:
    found = claim(data={"emoji": ["data.source.fold=${seed}"]})
    assert found.run_overrides(found.arms[1], "emoji", 3)[-1] == "data.source.fold=${seed}"
    assert as_dict(parse("more", as_dict(found))) == as_dict(found)
    config = train.compose(found.run_overrides(found.arms[1], "emoji", 3))
    assert config.data.source.fold == 3


def test_the_exact_difference() -> None:
    assert claim().difference("scenes") == {"model.mask_ratio": (0.5, 0.75)}


def test_what_follows_from_a_difference_is_one_too() -> None:
    """The learning rate's rule is the same in both arms, what it comes to is not."""
    batches = claim(
        arms=arms(["scale=paper"], ["scale=paper", "data.batch_size=1024"]), common=[], differs=["data.batch_size"]
    )
    with pytest.raises(UserError, match=r"optimizer.lr \(0.0024\d* against 0.0006") as refused:
        batches.difference("scenes")
    assert "data.batch_size" not in str(refused.value).split("does not list:")[1].replace("optimizer.lr", "")
    found = claim(
        arms=arms(["scale=paper"], ["scale=paper", "data.batch_size=1024"]),
        common=[],
        differs=["data.batch_size", "optimizer.lr", "schedules.optimizer.lr.peak"],
    ).difference("scenes")
    assert found["data.batch_size"] == (4096, 1024)
    assert found["optimizer.lr"] == (pytest.approx(1.5e-4 * 4096 / 256), pytest.approx(1.5e-4 * 1024 / 256))


def test_a_listed_key_stands_for_everything_below_it_and_for_no_namesake() -> None:
    words = arms([], ["model.decoder_depth=2", "model.norm_pix=false"])
    assert set(claim(arms=words, differs=["model"]).difference("scenes")) == {"model.decoder_depth", "model.norm_pix"}
    with pytest.raises(UserError, match=r"model.decoder_depth \(1 against 2\), model.norm_pix \(True against False\)"):
        claim(arms=words, differs=["model.dec", "mod"]).difference("scenes")


def test_arms_that_do_not_differ_are_refused() -> None:
    with pytest.raises(UserError, match="do not differ"):
        claim(arms=arms([], ["model.mask_ratio=0.75"])).difference("scenes")


def test_another_experiment_differs_in_what_it_trains_not_in_what_it_is_called() -> None:
    found = claim(arms=arms([], [], ("mae_vitb", "mae_vitl")), differs=["backbone"], common=["scale=smoke"])
    assert found.difference("scenes") == {"backbone.model_name": ("vit_base_patch16_224", "vit_large_patch16_224")}


def test_differences_of_lists_absent_keys_and_references() -> None:
    first = OmegaConf.create({"a": [1, {"b": 2}], "c": {}, "d": "${a}", "e": 1, "run": {"name": "x"}, "n": None})
    second = OmegaConf.create({"a": [1, {"b": 3}], "c": {"f": 0}, "d": "${a}", "n": None, "run": {"name": "y"}})
    found = difference(first, second)
    assert found == {"a.1.b": (2, 3), "c": ({}, None), "c.f": (None, 0), "e": (1, None)}
    assert difference(first, first) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"metrics": [RANK | {"direction": "up"}]},
            "metrics.effective rank.direction: 'up' is not one of higher, lower",
        ),
        ({"metrics": [RANK | {"least": -1}]}, "metrics.effective rank.least must be at least 0, not -1"),
        ({"metrics": [RANK | {"least": True}]}, "least: Value 'True' of type 'bool'"),
        ({"metrics": [RANK, RANK]}, "metrics must have different names, not effective rank, effective rank"),
        ({"metrics": [RANK | {"data": ["emoji"]}]}, "metrics.effective rank.data: 'emoji' is not one of scenes"),
        ({"metrics": []}, "metrics: none of them judges on scenes"),
        ({"metrics": [{"name": "x", "value": "y", "least": 0}]}, r"missing keys: metrics\[0\].evaluation"),
        ({"metrics": [RANK | {"encoders": "x"}]}, "unknown key 'encoders'; did you mean encoder"),
        (
            {"data": {"scenes": [], "emoji": []}, "metrics": [RANK | {"data": ["emoji"]}]},
            "metrics: none of them judges on scenes",
        ),
        (
            {"arms": [{"name": "a", "experiment": "mae_tiny", "metric": {"valeu": "x"}}, *arms([], [])[1:]]},
            "arms.a.metric: there is no key 'valeu'; did you mean value",
        ),
        ({"seeds": [0, 0]}, "seeds must be different whole numbers"),
        ({"seeds": []}, "seeds must be different whole numbers"),
        ({"seeds": [0.5]}, r"seeds\[0\]: Value '0.5' of type 'float' could not be converted to Integer"),
        ({"split": "tset"}, "split: 'tset' is not one of test, val, train; did you mean test"),
        ({"data": {"scene": []}}, "data.scene: 'scene' is not one of .*; did you mean scenes?"),
        ({"budget": {"equal": "step", "how": "x"}}, "budget.equal: .* did you mean steps?"),
        ({"budget": {"equal": "steps"}}, "missing keys: budget.how"),
        ({"budget": {"equal": "steps", "how": "x", "within": "much"}}, "budget.within: Value 'much'"),
        ({"title": None}, "claim 'more': missing keys: title"),
        ({"differ": ["model"]}, "unknown key 'differ'; did you mean differs"),
        ({"name": "x"}, "unknown key 'name'"),
        ({"differs": "model"}, "differs: .* is not a ListConfig, list or tuple"),
        ({"common": "scale=tiny"}, "common: .* is not a ListConfig, list or tuple"),
        ({"data": {"scenes": "data.batch_size=8"}}, r"data.scenes: Value 'data.batch_size=8' \(str\) is incompatible"),
        ({"arms": [{"name": "a", "experiment": "mae_tiny"}]}, "arms must be two"),
        ({"arms": [{"name": "a", "experiment": "mae_tiny"}] * 2}, "different names"),
        ({"arms": [{"name": "a"}, {"name": "b", "experiment": "mae_tiny"}]}, r"missing keys: arms\[0\].experiment"),
        ({"arms": [*arms(["x=1"], [])[:1], {"name": "b", "experimnet": "x"}]}, "did you mean experiment"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        claim(**changes)


def test_a_claim_like_another_says_what_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key is said in one of the files as a whole; what was tried about the other one was not tried here."""
    for group in ("claim", "data"):
        (tmp_path / group).mkdir()
    (tmp_path / "data" / "scenes.yaml").touch()
    own = {"metrics": [{"name": "deviation", "evaluation": "y", "value": "z", "least": 0.1}]}
    files = {
        "more": CONTENT | {"tried": "Half of the rate."},
        "deviation": {"like": "more", **own},
        "later": {"like": "deviation", "seeds": [5]},
        "egg": {"like": "hen"},
        "hen": {"like": "egg"},
        "lost": {"like": "mroe"},
    }
    for name, content in files.items():
        OmegaConf.save(content, tmp_path / "claim" / f"{name}.yaml")
    monkeypatch.setattr("src.configuration.CONFIGS", tmp_path)
    monkeypatch.setattr("src.claims.claim.CONFIGS", tmp_path)
    assert load("deviation") == parse("deviation", CONTENT | own)
    assert load("later") == parse("later", CONTENT | own | {"seeds": [5]})
    assert load("more").tried == "Half of the rate."
    with pytest.raises(UserError, match="in a circle: egg, hen, egg"):
        load("egg")
    with pytest.raises(UserError, match="there is no claim 'mroe'; did you mean more"):
        load("lost")


def test_metrics_judge_on_their_data_sets() -> None:
    """An arm with a metric of its own needs a claim with one."""
    retrieval = {"name": "retrieval", "evaluation": "retrieval", "value": "retrieval_rsum", "least": 5.0}
    of = claim(data={"scenes": [], "emoji": []}, metrics=[RANK | {"data": ["scenes"]}, retrieval | {"data": ["emoji"]}])
    assert [metric.name for metric in of.metrics_on("emoji")] == ["retrieval"]
    assert of.metrics_of(of.arms[0], "emoji") == {
        "retrieval": {"evaluation": "retrieval", "value": "retrieval_rsum", "encoder": None}
    }
    own = [{"name": "a", "experiment": "mae_tiny", "metric": {"value": "x"}}, *arms([], ["model.mask_ratio=0.5"])[1:]]
    assert claim(arms=own).metrics_of(claim(arms=own).arms[0], "scenes")["effective rank"]["value"] == "x"
    with pytest.raises(UserError, match="an arm has a metric of its own only where the claim has one"):
        claim(arms=own, metrics=[RANK, retrieval])


def test_a_file_that_is_no_yaml_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "claim").mkdir()
    (tmp_path / "claim" / "bad.yaml").write_text("a: 1\n  b: 2\n")
    monkeypatch.setattr("src.configuration.CONFIGS", tmp_path)
    monkeypatch.setattr("src.claims.claim.CONFIGS", tmp_path)
    with pytest.raises(UserError, match=r"configs/claim/bad.yaml cannot be read: mapping values are not allowed here"):
        load("bad")


def test_a_claim_that_does_not_exist() -> None:
    with pytest.raises(UserError, match="there is no claim 'mae_mask_ration'; did you mean mae_mask_ratio"):
        load("mae_mask_ration")
