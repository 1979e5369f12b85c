"""Tests that configs/callbacks/default.yaml repeats no default of the code, and that a composed run warns of a
collapse."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor

from src.callbacks.representation_health import RepresentationHealth
from src.configuration import CONFIGS, compose, instantiate
from tests.callbacks.test_representation_health import Steps
from tests.evaluation.toy import random_rows

# every value in the file, with the reason why it is not the code's default
REASONS = {
    "step_seed.seed": "the run's seed, which the code cannot know",
    "schedules.schedules": "the recipe's schedules",
    "schedules.max_warmup": "a key of the recipe, so that an experiment or the command line can set it",
    "checkpoints.folder": "the run's folder, which the code cannot know",
}
PROTOTYPES = 64


def settings() -> dict[str, tuple[object, object]]:
    """The values in the file and the code's defaults, by ``<callback>.<argument>``."""
    content = OmegaConf.to_container(OmegaConf.load(CONFIGS / "callbacks" / "default.yaml"), resolve=False)
    assert isinstance(content, dict)
    values = {}
    content.pop("defaults")
    for name, node in content.items():
        parameters = inspect.signature(get_class(node["_target_"])).parameters
        for argument, value in node.items():
            if argument != "_target_":
                values[f"{name}.{argument}"] = (value, parameters[argument].default)
    return values


def test_every_value_differs_from_the_codes_default_for_a_reason() -> None:
    values = settings()
    assert values.keys() == REASONS.keys()
    repeated = [key for key, (value, default) in values.items() if value == default]
    assert not repeated


def composed_health() -> RepresentationHealth:
    health = instantiate(compose("train", ["experiment=dino_vits"]).callbacks.representation_health)
    assert isinstance(health, RepresentationHealth)
    return health


COLLAPSED = {
    "one prototype for all images": torch.eye(PROTOTYPES)[:1].expand(16, PROTOTYPES),
    "a uniform distribution for all images": torch.full((16, PROTOTYPES), 1 / PROTOTYPES),
    # scores that differ by a tenth: about 0.005 nats of information about an image
    "almost uniform distributions": (0.1 * random_rows(16, PROTOTYPES, 2)).softmax(dim=1),
}


@pytest.mark.parametrize("targets", COLLAPSED.values(), ids=COLLAPSED.keys())
def test_the_composed_configuration_warns_of_a_collapsed_teacher(
    targets: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    health, steps = composed_health(), Steps()
    with caplog.at_level(logging.WARNING):
        for _ in range(health.every_n_steps):
            steps.run(health, random_rows(16, 8, 0), targets)
    [message] = [record.getMessage() for record in caplog.records]
    assert "the teacher's targets have collapsed" in message
    assert steps.written[-1][1]["health/target_information"] < 0.02


def test_the_composed_configuration_does_not_warn_of_informative_targets(caplog: pytest.LogCaptureFixture) -> None:
    health, steps = composed_health(), Steps()
    with caplog.at_level(logging.WARNING):
        for step in range(health.every_n_steps):
            steps.run(health, random_rows(16, 8, step), random_rows(16, PROTOTYPES, step).softmax(dim=1))
    assert not caplog.records
    assert steps.written[-1][1]["health/target_information"] > 0.1


def test_arguments_that_no_file_sets_can_be_set_on_the_command_line() -> None:
    config = compose("train", ["experiment=dino_vits", "callbacks.representation_health.min_target_information=0.5"])
    assert instantiate(config.callbacks.representation_health).min_target_information == 0.5
