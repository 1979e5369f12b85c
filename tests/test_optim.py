from functools import partial

import pytest
import torch
from torch import nn

from src.errors import SettingError
from src.optim import OptimizerRecipe, Rule, adamw, build_optimizers, lamb, layer_decay_rules


def model() -> nn.Module:
    module = nn.Module()
    module.token = nn.Parameter(torch.zeros(1, 1, 4))
    module.stem = nn.Linear(4, 4)
    module.norm = nn.LayerNorm(4)
    module.head = nn.Linear(4, 2)
    module.table = nn.Parameter(torch.zeros(3, 4), requires_grad=False)
    return module


def settings(optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    return {name: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for name in g["names"]}


def recipe(**changes) -> OptimizerRecipe:
    return OptimizerRecipe(
        **{"algorithm": partial(torch.optim.AdamW, betas=(0.9, 0.95)), "lr": 0.1, "weight_decay": 0.05, **changes}
    )


def test_biases_and_norms_are_not_decayed_but_tokens_are():
    found = settings(recipe().build(model()))
    assert found == {
        "token": (0.1, 0.05),
        "stem.weight": (0.1, 0.05),
        "stem.bias": (0.1, 0.0),
        "norm.weight": (0.1, 0.0),
        "norm.bias": (0.1, 0.0),
        "head.weight": (0.1, 0.05),
        "head.bias": (0.1, 0.0),
    }
    assert recipe().build(model()).defaults["betas"] == (0.9, 0.95)


def test_the_first_rule_that_matches_counts():
    module = model()
    rules = [Rule(r"^stem", frozen=True), Rule(r"bias$", weight_decay=0.3), Rule("head", lr_multiplier=2.0)]
    found = settings(recipe(rules=rules).build(module))
    assert "stem.weight" not in found
    assert not module.stem.weight.requires_grad
    assert not module.stem.bias.requires_grad
    assert found["head.bias"] == (0.1, 0.3)  # the second rule, not the third
    assert found["head.weight"] == (pytest.approx(0.2), 0.05)
    assert found["norm.weight"] == (0.1, 0.0)


def test_a_rule_may_be_for_biases_and_norms_alone():
    module = model()
    found = settings(recipe(rules=[Rule("", max_axes=1, lr_multiplier=0.5)]).build(module))
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            expected = (0.05, 0.0) if parameter.ndim == 1 else (0.1, 0.05)
            assert found[name] == pytest.approx(expected), name
    with pytest.raises(ValueError, match=r"'head\.weight'"):
        recipe(rules=[Rule("head.weight", max_axes=1)]).build(module)


def test_a_rule_with_a_constant_learning_rate_has_a_group_of_its_own():
    groups = recipe(rules=[Rule("^head", constant_lr=True, lr_multiplier=0.5)]).build(model()).param_groups
    constant = {name: group["lr"] for group in groups if group["constant_lr"] for name in group["names"]}
    assert constant == {"head.weight": 0.05, "head.bias": 0.05}


def test_several_optimizers_divide_the_parameters():
    module = model()
    first, second = build_optimizers(
        module,
        {"body": recipe(parameters="^(token|stem|norm)"), "head": recipe(parameters="^head", lr=0.3, weight_decay=0)},
    )
    assert set(settings(first)) == {"token", "stem.weight", "stem.bias", "norm.weight", "norm.bias"}
    assert settings(second) == {"head.weight": (0.3, 0), "head.bias": (0.3, 0)}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["", "^head"], r"optimizer\.second\.parameters and optimizer\.first\.parameters both match 'head\.weight'"),
        (["^stem", "^head"], r"no recipe's `parameters` matches 'token', which takes a gradient"),
        (["^stem", "^tail"], r"no parameter's name matches parameters='\^tail'"),
    ],
)
def test_parameters_of_two_optimizers_or_of_none_are_refused(patterns, message):
    recipes = dict(zip(("first", "second"), (recipe(parameters=pattern) for pattern in patterns), strict=True))
    with pytest.raises(SettingError, match=message):
        build_optimizers(model(), recipes)


def test_layer_decay_multiplies_from_the_head_downwards():
    rules = layer_decay_rules([r"^(token|stem)", r"^norm", r"^head"], 0.5)
    found = settings(recipe(rules=rules).build(model()))
    assert found["stem.weight"] == (pytest.approx(0.025), 0.05)
    assert found["token"] == (pytest.approx(0.025), 0.05)
    assert found["norm.weight"] == (pytest.approx(0.05), 0.0)
    assert found["head.weight"] == (pytest.approx(0.1), 0.05)


def test_a_rule_that_matches_nothing_and_a_model_with_nothing_to_train_are_refused():
    with pytest.raises(ValueError, match=r"'blocks.3'"):
        recipe(rules=[Rule("blocks.3", frozen=True)]).build(model())
    with pytest.raises(ValueError, match="frozen"):
        recipe(rules=[Rule("", frozen=True)]).build(model())


def test_adamw_takes_the_papers_steps():
    """Two steps against the equations, in float64."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    group = {"params": [weight], "lr": 0.1, "weight_decay": 0.2}
    optimizer = adamw([group], lr=0.1, betas=(0.8, 0.9), eps=1e-6)
    expected, first, second = weight.detach().clone(), torch.zeros(3).double(), torch.zeros(3).double()
    for step, gradient in enumerate(([0.3, -1.0, 0.0], [0.1, 2.0, 4.0]), start=1):
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        first = 0.8 * first + 0.2 * weight.grad
        second = 0.9 * second + 0.1 * weight.grad**2
        root = (second / (1 - 0.9**step)).sqrt() + 1e-6
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * first / (1 - 0.8**step) / root
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=0)


def test_adamw_leaves_unscaling_to_the_scaler():
    """Whoever looks at gradients between unscaling and the step has to see the true ones."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = adamw([{"params": [weight]}], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((weight**2).sum()).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(weight.grad, torch.tensor([2.0, -4.0]))
    scaler.step(optimizer)
    torch.testing.assert_close(weight.detach(), torch.tensor([0.899, -1.898]))  # by lr and decay 0.01
    weight.grad = torch.tensor([float("inf"), 0.0])
    scaler.update()
    scaler.step(optimizer)
    torch.testing.assert_close(weight.detach(), torch.tensor([0.899, -1.898]))


def test_lamb_scales_updates_to_the_norm_of_decayed_weights_and_is_adam_for_others():
    """A first step of Adam is the gradient's sign; the decay adds 0.5 of the weight, whose length is 4."""
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, 2.0)
    nn.init.constant_(module.bias, 2.0)
    optimizer = OptimizerRecipe(partial(lamb, eps=1e-12), lr=0.1, weight_decay=0.5).build(module)
    module.weight.grad, module.bias.grad = torch.full((2, 2), 100.0), torch.full((2,), -100.0)
    optimizer.step()
    # direction 1 + 0.5 * 2 = 2 everywhere, of length 4; as long as the weight itself, so the ratio is 1
    torch.testing.assert_close(module.weight, torch.full((2, 2), 2.0 - 0.1 * 2))
    torch.testing.assert_close(module.bias, torch.full((2,), 2.0 + 0.1))
    nn.init.constant_(module.weight, 2.0)
    optimizer = OptimizerRecipe(partial(lamb, eps=1e-12), lr=0.1, weight_decay=1e-6).build(module)
    optimizer.step()  # direction 1, of length 2 against 4
    torch.testing.assert_close(module.weight, torch.full((2, 2), 2.0 - 0.1 * 2))
