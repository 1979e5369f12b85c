"""Compares one and two steps of LARS and LARC with updates by hand in float64."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from src.optim import OptimizerRecipe, Rule, classic_lars, larc, lars
from tests.distributed import in_two_processes

LR, MOMENTUM, TRUST = 0.5, 0.9, 0.001


def layer() -> nn.Linear:
    linear = nn.Linear(2, 2)
    linear.weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    linear.bias.data = torch.tensor([1.0, -1.0])
    return linear


def step(linear: nn.Linear, optimizer: torch.optim.Optimizer, weight: list, bias: list) -> None:
    linear.weight.grad, linear.bias.grad = torch.tensor(weight), torch.tensor(bias)
    optimizer.step()


def test_matrices_are_scaled_by_the_trust_ratio_and_biases_are_not():
    linear = layer()
    optimizer = OptimizerRecipe(partial(lars, momentum=MOMENTUM, trust_coefficient=TRUST), lr=LR).build(linear)
    step(linear, optimizer, [[0.6, 0.0], [0.0, 0.8]], [2.0, 0.0])
    # |w| = 5, |g| = 1: the gradient is scaled by 0.001 * 5 / 1
    expected = np.array([[3.0, 0.0], [0.0, 4.0]]) - 0.5 * 0.005 * np.array([[0.6, 0.0], [0.0, 0.8]])
    np.testing.assert_allclose(linear.weight.detach().numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(linear.bias.detach().numpy(), [1.0 - 0.5 * 2.0, -1.0], rtol=1e-6)
    momentum = 0.005 * np.array([[0.6, 0.0], [0.0, 0.8]])
    step(linear, optimizer, [[0.0, 2.0], [0.0, 0.0]], [0.0, 1.0])
    scaled = TRUST * np.linalg.norm(expected) / 2.0 * np.array([[0.0, 2.0], [0.0, 0.0]])
    expected = expected - LR * (MOMENTUM * momentum + scaled)
    np.testing.assert_allclose(linear.weight.detach().numpy(), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(linear.bias.detach().numpy(), [0.0 - 0.5 * 0.9 * 2.0, -1.0 - 0.5 * 1.0], rtol=1e-6)


@pytest.mark.parametrize("gradient", [[[0.6, 0.0], [0.0, 0.8]], [[0.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
def test_weight_decay_applies_to_matrices_and_is_part_of_the_update_that_is_scaled(gradient):
    """The update has the length lr * trust * |w| whatever the gradient, also where it is zero (residual branches that
    start at zero), where only the decay moves the weight."""
    linear = layer()
    optimizer = OptimizerRecipe(lars, lr=LR, weight_decay=0.1).build(linear)
    step(linear, optimizer, gradient, [0.0, 0.0])
    weight = np.array([[3.0, 0.0], [0.0, 4.0]])
    direction = np.array(gradient) + 0.1 * weight
    moved = weight - LR * TRUST * 5.0 * direction / np.linalg.norm(direction)
    np.testing.assert_allclose(linear.weight.detach().numpy(), moved, rtol=1e-6, atol=1e-9)
    assert linear.bias.tolist() == [1.0, -1.0]


def test_classic_momentum_keeps_the_rate_of_each_update():
    """Two steps at rates 0.5 and 0.1 on a bias, whose gradients 2 and 1 are not scaled."""
    moved = {}
    for classic in (False, True):
        linear = layer()
        optimizer = OptimizerRecipe(classic_lars if classic else lars, lr=0.5).build(linear)
        step(linear, optimizer, [[0.0, 0.0], [0.0, 0.0]], [2.0, 0.0])
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        step(linear, optimizer, [[0.0, 0.0], [0.0, 0.0]], [1.0, 0.0])
        moved[classic] = linear.bias[0].item()
    # both begin with 1 - 0.5 * 2 = 0; then 0.9 * 2 + 1 at the new rate, or 0.9 * (0.5 * 2) + 0.1 * 1
    assert moved == {False: pytest.approx(-0.1 * 2.8), True: pytest.approx(-(0.9 + 0.1))}


def test_a_zero_weight_or_gradient_is_not_scaled():
    linear = layer()
    linear.weight.data.zero_()
    optimizer = OptimizerRecipe(lars, lr=LR).build(linear)
    step(linear, optimizer, [[1.0, 0.0], [0.0, 0.0]], [0.0, 0.0])
    np.testing.assert_allclose(linear.weight.detach().numpy(), [[-0.5, 0.0], [0.0, 0.0]], rtol=1e-6)


def test_parameter_groups():
    optimizer = OptimizerRecipe(lars, lr=LR).build(layer())
    assert [group["names"] for group in optimizer.param_groups] == [["weight"], ["bias"]]
    assert [group["lr_multiplier"] for group in optimizer.param_groups] == [1.0, 1.0]


def test_larc_also_scales_biases():
    linear = layer()
    optimizer = OptimizerRecipe(larc, lr=LR, weight_decay=0.1, rules=[Rule("", weight_decay=0.1)]).build(linear)
    step(linear, optimizer, [[0.6, 0.0], [0.0, 0.8]], [2.0, 0.0])
    weight, gradient = np.array([[3.0, 0.0], [0.0, 4.0]]), np.array([[0.6, 0.0], [0.0, 0.8]])
    moved = weight - LR * TRUST * 5.0 / (1.0 + 0.1 * 5.0) * (gradient + 0.1 * weight)
    np.testing.assert_allclose(linear.weight.detach().numpy(), moved, rtol=1e-6)
    bias, gradient = np.array([1.0, -1.0]), np.array([2.0, 0.0])
    moved = bias - LR * TRUST * 2**0.5 / (2.0 + 0.1 * 2**0.5) * (gradient + 0.1 * bias)
    np.testing.assert_allclose(linear.bias.detach().numpy(), moved, rtol=1e-6)


def sharded_steps(process: int) -> torch.Tensor:
    """Two steps of LARS on a matrix of 4 rows, of which each process holds two."""
    linear = nn.Linear(3, 4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(12.0).view(4, 3))
    if process >= 0:
        fully_shard(linear, mesh=init_device_mesh("cpu", (2,)))
    optimizer = OptimizerRecipe(lars, lr=LR, weight_decay=0.1).build(linear)
    for number in (1.0, -2.0):
        linear(torch.full((2, 3), number)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weight = linear.weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def test_sharded_weights_take_the_steps_of_whole_ones():
    whole = sharded_steps(-1)
    for part in in_two_processes(sharded_steps):
        torch.testing.assert_close(part, whole, rtol=1e-6, atol=0)
