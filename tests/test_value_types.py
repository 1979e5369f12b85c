from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf
from torch import nn

from src import configuration, train
from src.errors import UserError
from src.schedules import Schedule
from src.value_types import check_values
from tests.commands import SECONDS


class Base:
    def __init__(self, size: int, *, width: float = 1.0) -> None: ...


class Thing(Base):
    """Hands further arguments on to its base."""

    def __init__(
        self,
        *,
        name: str | None = None,
        mode: Literal["max", "min"] = "max",
        scale: Sequence[float] = (0.0, 1.0),
        path: str | Path = "x",
        counts: Mapping[str, int | None] | None = None,
        layer: nn.Module | None = None,
        function: Callable[[], None] | None = None,
        schedule: Schedule | None = None,
        layers: Mapping[str, nn.Module] | None = None,
        anything: Any = None,
        **others: Any,
    ) -> None:
        super().__init__(**others)


def check(**values: Any) -> None:
    check_values(OmegaConf.create({"thing": {"_target_": f"{__name__}.Thing", "size": 1, **values}}))


@pytest.mark.parametrize(
    "values",
    [
        {"size": 3, "width": 2, "name": None, "mode": "min", "scale": [1, 0.5], "path": "a"},
        {"counts": {"a": 1, "b": None}, "layer": None, "anything": [{}]},
        {"layer": {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}},
        {"size": "${thing.counts.a}", "counts": {"a": 2}},
        {"width": float("inf")},
    ],
)
def test_values_of_the_annotated_types_pass(values):
    check(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 1.5}, "thing.size must be a valid integer, not 1.5"),
        ({"size": True}, "thing.size must be a valid integer, not true"),
        ({"size": None}, "thing.size must be a valid integer, not null"),
        ({"width": "2"}, 'thing.width must be a valid number, not "2"'),
        ({"mode": "best"}, "thing.mode must be 'max' or 'min', not \"best\""),
        ({"scale": 0.5}, "thing.scale must be a valid array, not 0.5"),
        ({"scale": ["a"]}, r"thing.scale must be a valid number, not \[\"a\"\]"),
        ({"path": []}, r"thing.path must be a valid string, not \[\]"),
        ({"counts": {"a": "b"}}, "thing.counts must be a valid integer, not"),
        ({"layer": "linear"}, 'thing.layer must be .*Module.*, which has a _target_, not "linear"'),
        ({"layers": {"a": {"_target_": "torch.nn.ReLU"}, "b": 1}}, "thing.layers must be Module, which has a _target_"),
        ({"function": 1}, "thing.function must be .*, which has a _target_, not 1"),
        ({"schedule": 0.1}, "thing.schedule must be .*, which has a _target_, not 0.1"),
        ({"size": "${thing.counts}", "counts": {"a": 2}}, "thing.counts must be a valid integer, not"),
        ({"layer": {"_target_": 1}}, "thing.layer._target_ must name a class or function, .*, not 1"),
        ({"function": {"_target_": "torch.add", "_partial_": "no"}}, "thing.function._partial_ must be true or false"),
    ],
)
def test_other_values_are_refused_with_their_key(values, message):
    with pytest.raises(UserError, match=message):
        check(**values)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("backbone.depth=[]", r"in model.backbone: TypeError: 'list'"),
        ("trainer.max_epochs=word", "trainer.max_epochs is a number"),
        ("trainer.log_every_n_steps=[]", r"trainer.log_every_n_steps must be a valid integer, not \[\]"),
        ("optimizer.lr=null", "optimizer.lr must be a valid number, not null"),
        ("model.backbone=-1", r"model.backbone must be VisionTransformer, which has a _target_, not -1"),
        ("model.optimizer=word", 'model.optimizer must be .*OptimizerRecipe.*, which has a _target_, not "word"'),
        ("data.train_view=word", "data.train_view has values of its own; set one of them: data.train_view._target_=…"),
        ("seed=-1", "seed=-1 must be a whole number from 0"),
        ("seed={}", "seed={} must be a whole number from 0"),
        ("checkpoint=[]", r"CKPT=\[\] must be a run's folder or a file"),
        ("paths.runs=1.5", "paths.runs=1.5 must be a folder"),
        ("optimizer=null", "optimizer cannot be null: a run needs it"),
        ("model=null", "model cannot be null: a run needs it"),
        ("logger=[]", r"logger=\[\] names no file of configs/logger"),
        ("callbacks.probe._target_=null", "callbacks.probe._target_ must name a class or function"),
    ],
)
def test_a_command_names_the_key(argument, message):
    def build() -> None:
        config = train.compose([*SECONDS, argument])
        for section in ("data", "model", "trainer", "callbacks"):
            configuration.instantiate(config[section])

    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize("scale", ["paper", "smoke", "tiny"])
@pytest.mark.parametrize("experiment", configuration.names("experiment"))
def test_every_experiment_has_values_of_the_annotated_types(experiment, scale):
    config = configuration.compose("train", [f"experiment={experiment}", f"scale={scale}"])
    config.paths.data, config.run.dir, config.trainer.precision = "data", "run", "32-true"
    check_values(config)
