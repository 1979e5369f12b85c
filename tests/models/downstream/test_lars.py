"""Compares one and two steps of LARS with updates by hand in float64."""

from functools import partial

import numpy as np
import torch
from torch import nn

from src.optim import OptimizerRecipe, Rule, larc, lars

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


def test_weight_decay_applies_to_matrices_and_enters_the_trust_ratio():
    linear = layer()
    optimizer = OptimizerRecipe(lars, lr=LR, weight_decay=0.1).build(linear)
    step(linear, optimizer, [[0.6, 0.0], [0.0, 0.8]], [0.0, 0.0])
    weight, gradient = np.array([[3.0, 0.0], [0.0, 4.0]]), np.array([[0.6, 0.0], [0.0, 0.8]])
    ratio = TRUST * 5.0 / (1.0 + 0.1 * 5.0)
    np.testing.assert_allclose(
        linear.weight.detach().numpy(), weight - LR * ratio * (gradient + 0.1 * weight), rtol=1e-6
    )
    assert linear.bias.tolist() == [1.0, -1.0]


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
    assert [group["always_adapt"] for group in optimizer.param_groups] == [True, False]


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
