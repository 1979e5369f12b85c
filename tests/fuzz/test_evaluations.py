"""Every value of an evaluation replaced by one of another kind: `make evaluate` gives its table, or a sentence.

`make fuzz` tries more of them.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from src import evaluate, runs, train
from src.evaluation_config import evaluation_config
from tests.commands import SECONDS
from tests.fuzz.cases import count, seed
from tests.fuzz.forks import in_fork
from tests.fuzz.test_configuration import VALUES, keys

EVALUATIONS = ["knn", "linear", "lineargrid", "fewshot", "lowshot", "multilabel", "instances", "patchknn"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step."""
    folder = tmp_path_factory.mktemp("runs")

    def one_step(argv: list[str]) -> int:
        config = train.compose(argv)
        return train.fit(config, runs.create(config))

    options = [f"paths.runs={folder}", "run.name=small", "trainer.max_steps=1", "callbacks.evaluation=null"]
    assert in_fork(one_step, [*SECONDS, *options]) == ""
    return folder / "mae_tiny" / "small"


def test_any_value_of_an_evaluation_is_used_or_answered_by_a_sentence(run: Path) -> None:
    config = evaluation_config(runs.find(str(run)), None, [], as_online=True)
    every = [
        (name, f"evaluation.{name}.{key}={value}")
        for name in EVALUATIONS
        for key in keys(config.evaluation[name])
        for value in VALUES
    ]
    every += [("knn", f"evaluate.{key}={value}") for key in keys(config.evaluate) for value in VALUES]
    wrong = []
    for name, override in random.Random(seed()).sample(every, min(count(12), len(every))):
        answer = in_fork(evaluate.main, [f"run={run}", f"eval={name}", override])
        if answer:
            wrong.append(f"{name} {override}: {answer}")
    assert not wrong, "\n".join(wrong)
