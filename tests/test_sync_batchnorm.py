"""Synchronized batch norm: two processes have the outputs and gradients of one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from src.models.backbones.efficientnet import headless_efficientnet
from src.models.backbones.video_conv import r2plus1d
from src.models.video.sts import STS
from src.optim import OptimizerRecipe, sgd
from src.sync_batchnorm import SyncBatchNormPlugin
from tests.distributed import in_two_processes


def of_efficientnet(part: slice) -> tuple[nn.Module, Tensor]:
    """ALIGN's image tower, whose batch norms hold the activation after them."""
    backbone = headless_efficientnet("test_efficientnet", num_classes=0).double().train()
    image = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    sync(backbone, part)
    return backbone, backbone(image[part]).square().sum(dim=1).mean()


def of_sts(part: slice) -> tuple[nn.Module, Tensor]:
    method = STS(r2plus1d(layers=(1, 1, 1, 1), width=8), OptimizerRecipe(sgd, lr=1.0)).double().train()
    numbers = torch.Generator().manual_seed(1)
    batch = {
        "video": torch.randn(4, 4, 3, 16, 16, generator=numbers).double()[part],
        "motion": torch.randn(4, 14, generator=numbers).double()[part],
        "appearance": torch.randn(4, 13, generator=numbers).double()[part],
    }
    sync(method, part)
    return method, method.training_step(batch, 0)["loss"]  # type: ignore[arg-type]


METHODS: dict[str, Callable[[slice], tuple[nn.Module, Tensor]]] = {"efficientnet": of_efficientnet, "sts": of_sts}


def sync(module: nn.Module, part: slice) -> None:
    if part != slice(None):
        assert SyncBatchNormPlugin().apply(module) is module


def results(part: slice) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name, method in METHODS.items():
        torch.manual_seed(0)
        module, loss = method(part)
        loss.backward()
        gradients = {key: value.grad for key, value in module.named_parameters() if value.grad is not None}
        found[name] = {"loss": loss.detach(), **gradients}
    return found


def of_process(rank: int) -> dict[str, dict[str, Tensor]]:
    return results(slice(2 * rank, 2 * rank + 2))


@pytest.fixture(scope="module")
def parts() -> list[dict[str, dict[str, Tensor]]]:
    return in_two_processes(of_process)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_are_one(name: str, parts: list[dict[str, dict[str, Tensor]]]) -> None:
    whole = results(slice(None))[name]
    assert len(whole) > 10
    for key, value in whole.items():
        torch.testing.assert_close((parts[0][name][key] + parts[1][name][key]) / 2, value, rtol=1e-9, atol=1e-11)


def test_activations_and_running_statistics_outlive_the_conversion() -> None:
    """In evaluation, and without other processes, the converted network is the network."""
    network = headless_efficientnet("test_efficientnet", num_classes=0).eval()
    assert any(isinstance(module, BatchNormAct2d) for module in network.modules())
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
        expected = network(image)
        assert torch.equal(SyncBatchNormPlugin().apply(network)(image), expected)
