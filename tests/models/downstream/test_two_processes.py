"""Tests that two processes with half of a batch each have the gradient of one process, with synchronized batch norm.
Mask R-CNN is left out: each process samples the proposals of its own images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from src.models.pretrain_module import PretrainModule
from src.sync_batchnorm import SyncBatchNormPlugin
from tests.distributed import in_two_processes
from tests.evaluation.toy import SIZE
from tests.models.downstream import test_depth, test_linear, test_normals, test_segmentation
from tests.models.downstream.toy import resnet, vit
from tests.models.joint_embedding.toy import gradients, part_of

HEADS: dict[str, tuple[Callable[[], PretrainModule], Callable[[int], dict[str, Tensor]]]] = {
    "upernet": (lambda: test_segmentation.upernet(resnet()), test_segmentation.batch),
    "linear": (lambda: test_segmentation.linear(vit()), test_segmentation.batch),
    "depth": (lambda: test_depth.dpt(resnet()), test_depth.batch),
    "normals": (lambda: test_normals.head(vit()), test_normals.batch),
}


def gradients_of_all(process: int) -> dict[str, dict[str, Tensor]]:
    return {name: gradients_of(name, process) for name in HEADS}


def gradients_of(name: str, process: int | None) -> dict[str, Tensor]:
    make, data = HEADS[name]
    torch.manual_seed(0)
    module, batch = make().double().train(), data(4)
    for part in module.modules():
        if isinstance(part, nn.Dropout2d):
            part.p = 0.0  # each process draws its own
    batch["index"] = torch.arange(4)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    if process is not None:
        module, batch = SyncBatchNormPlugin().apply(module), part_of(batch, process)
    module.training_step(batch, 0)["loss"].backward()
    return gradients(module)


@pytest.fixture(scope="module")
def parts() -> list[Mapping[str, Mapping[str, Tensor]]]:
    return in_two_processes(gradients_of_all)


@pytest.mark.parametrize("name", HEADS)
def test_two_processes_have_the_gradient_of_one(name: str, parts: list[Mapping[str, Mapping[str, Tensor]]]) -> None:
    whole = gradients_of(name, None)
    assert len(whole) >= 2
    for parameter, gradient in whole.items():
        mean = (parts[0][name][parameter] + parts[1][name][parameter]) / 2
        assert torch.allclose(mean, gradient, rtol=0, atol=1e-8), parameter


def logged_by_half_a_split(process: int) -> dict[str, list[str]]:
    """The metrics that each head logs of a batch without a valid sample, in the second process."""
    logged: dict[str, list[str]] = {}
    for name, (make, data) in HEADS.items():
        module, batch = make().eval(), data(2)
        batch["index"], batch["replaced"] = torch.arange(2), torch.full((2,), process == 1)
        module.log = lambda key, *_args, kind=name, **_kwargs: logged.setdefault(kind, []).append(key)  # type: ignore
        with torch.no_grad():
            module.validation_step(batch, 0)  # type: ignore[operator]
    return logged


def test_a_process_without_a_valid_sample_takes_part_in_the_means() -> None:
    """Otherwise the others would wait for it at the end of the validation."""
    first, second = in_two_processes(logged_by_half_a_split)
    assert first == second
    assert set(first) == set(HEADS)


def validated(process: int | None) -> dict[str, Tensor]:
    """Validates five samples: three in the first process, two in the second."""
    module = test_linear.protocol().eval()
    module.build(3)
    module.log = lambda *_args, **_kwargs: None  # type: ignore[method-assign,assignment]
    batch = {
        "image": torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)),
        "label": torch.tensor([0, 1, 2, 2, 0]),
        "index": torch.arange(5),
        "replaced": torch.zeros(5, dtype=torch.bool),
    }
    with torch.no_grad():
        module.head.weight.mul_(1000.0)  # losses that differ from sample to sample
        part = slice(None) if process is None else (slice(0, 3), slice(3, 5))[process]
        module.validation_step({name: value[part] for name, value in batch.items()}, 0)  # type: ignore[arg-type]
        if process is None:
            losses = nn.functional.cross_entropy(module(batch["image"]), batch["label"], reduction="none")
            assert (losses[:3].mean() - losses[3:].mean()).abs() > 0.1
            torch.testing.assert_close(module.metrics["loss"].compute(), losses.mean())  # type: ignore[operator]
    return {name: metric.compute() for name, metric in module.metrics.items()}  # type: ignore[operator]


def test_two_processes_with_different_numbers_of_samples_have_the_validation_of_one() -> None:
    whole = validated(None)
    for part in in_two_processes(validated):
        for name, value in whole.items():
            torch.testing.assert_close(part[name], value)
