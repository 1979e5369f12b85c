"""Optimizer recipes: the learning rate and weight decay of every parameter, in one place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.optim.lamb import Lamb
from timm.optim.lars import Lars
from torch import Tensor, nn

from src.errors import SettingError

Algorithm = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Rule:
    """Other settings than the recipe's for the parameters whose name matches ``pattern`` (``re.search``).

    Args:
        max_axes: match only parameters with at most this many axes; 1 for biases and norms.
        lr_multiplier: factor on the learning rate, at every step.
        constant_lr: the learning rate stays the recipe's times ``lr_multiplier``, whatever its schedule (SimSiam's
            predictor).
        weight_decay: replaces the recipe's, and does not follow its schedule; None leaves it.
        frozen: no gradient and no update.
    """

    pattern: str
    lr_multiplier: float = 1.0
    constant_lr: bool = False
    weight_decay: float | None = None
    frozen: bool = False
    max_axes: int | None = None

    def matches(self, name: str, parameter: nn.Parameter) -> bool:
        fits = self.max_axes is None or parameter.ndim <= self.max_axes
        return fits and re.search(self.pattern, name) is not None


@dataclass(frozen=True)
class OptimizerRecipe:
    """An algorithm, its learning rate and weight decay, and rules for single parameters.

    Biases, norms and everything else with one axis are not decayed. The first of the ``rules`` that matches a parameter
    applies; it may give such a parameter a weight decay after all. Parameter groups hold ``lr_multiplier``,
    ``constant_lr`` and ``decayed``, which tell the callback `Schedules` how a schedule applies to them.

    Args:
        algorithm: builds the optimizer from parameter groups, e.g. ``partial(adamw, betas=(0.9, 0.95))``.
        lr: peak learning rate.
        weight_decay: of everything with more than one axis.
        rules: in order of precedence.
        parameters: pattern (``re.search``) of the names of the parameters that the optimizer updates, such as
            ``^generator\\.``, for methods with several optimizers; by default all.
    """

    algorithm: Algorithm
    lr: float
    weight_decay: float = 0.0
    rules: Sequence[Rule] = field(default=())
    parameters: str = ""

    def build(self, module: nn.Module, extra_rules: Iterable[Rule] = ()) -> torch.optim.Optimizer:
        """Builds the optimizer over ``module``'s parameters that take a gradient; rules freeze parameters in place.

        Raises:
            SettingError: a rule or ``parameters`` matches no parameter (a typo would otherwise go unnoticed), every
                parameter is frozen, or the algorithm refuses a value.
        """
        rules = [*self.rules, *extra_rules]
        matched = [False] * len(rules)
        groups: dict[tuple[float, float, bool, bool], dict[str, Any]] = {}
        named = [(name, p) for name, p in module.named_parameters() if re.search(self.parameters, name)]
        if self.parameters and not named:
            raise SettingError(f"optimizer: no parameter's name matches parameters='{self.parameters}'")
        for name, parameter in named:
            rule = Rule(pattern="")
            for position, candidate in enumerate(rules):
                if candidate.matches(name, parameter):
                    rule, matched[position] = candidate, True
                    break
            if rule.frozen:
                parameter.requires_grad_(False)
            if not parameter.requires_grad:
                continue
            decayed = parameter.ndim > 1 and not name.endswith(".bias")
            decay = rule.weight_decay if rule.weight_decay is not None else self.weight_decay * decayed
            follows_schedule = decayed and rule.weight_decay is None
            group = groups.setdefault(
                (rule.lr_multiplier, decay, follows_schedule, rule.constant_lr),
                {
                    "params": [],
                    "names": [],
                    "lr": self.lr * rule.lr_multiplier,
                    "weight_decay": decay,
                    "lr_multiplier": rule.lr_multiplier,
                    "constant_lr": rule.constant_lr,
                    "decayed": follows_schedule,
                },
            )
            group["params"].append(parameter)
            group["names"].append(name)
        for rule, hit in zip(rules, matched, strict=True):
            if not hit and not any(rule.matches(name, parameter) for name, parameter in named):
                raise SettingError(f"optimizer.rules: no parameter's name matches pattern '{rule.pattern}'")
        if not groups:
            raise SettingError("optimizer.rules: no parameter is left to train, every one is frozen")
        # every group has its lr and weight_decay; the keyword is for algorithms that demand one
        try:
            return self.algorithm([{**group} for group in groups.values()], lr=self.lr)
        except ValueError as problem:  # torch checks values when an optimizer is built
            raise SettingError(f"optimizer: {problem}") from problem


def build_optimizers(module: nn.Module, recipes: Mapping[str, OptimizerRecipe]) -> list[torch.optim.Optimizer]:
    """Builds an optimizer from each recipe, in their order.

    Raises:
        SettingError: two recipes update the same parameter, or none a parameter that takes a gradient; and those of
            `OptimizerRecipe.build`.
    """
    optimizers = {name: recipe.build(module) for name, recipe in recipes.items()}
    owners: dict[str, str] = {}
    for name, optimizer in optimizers.items():
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["names"]):
            if parameter in owners:
                raise SettingError(
                    f"optimizer.{name}.parameters and optimizer.{owners[parameter]}.parameters both match '{parameter}'"
                )
            owners[parameter] = name
    for parameter, value in module.named_parameters():
        if value.requires_grad and parameter not in owners:
            raise SettingError(
                f"optimizer: no recipe's `parameters` matches '{parameter}', which takes a gradient; add it to one, or "
                "freeze it with a rule"
            )
    return list(optimizers.values())


def adamw(
    groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW in one fused kernel, which reads and writes each tensor once: noticeably faster on a CPU. An algorithm for
    `OptimizerRecipe`: ``partial(adamw, …)``."""
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    # with precision 16-mixed a fused optimizer would unscale gradients itself, after clipping and NanGuard saw them
    optimizer._step_supports_amp_scaling = False
    return optimizer


def sgd(groups: Sequence[dict[str, Any]], *, lr: float, momentum: float = 0.9) -> torch.optim.SGD:
    """SGD with momentum 0.9, as ConvNets are trained. An algorithm for `OptimizerRecipe`: ``partial(sgd, …)``."""
    return torch.optim.SGD(groups, lr=lr, momentum=momentum)


class LARS(torch.optim.Optimizer):
    """LARS (You et al., 2017) as in the code of SimCLR, BYOL, Barlow Twins, VICReg and MoCo v3.

    The update of a tensor w with more than one axis is u = g + weight_decay * w, scaled by the trust ratio
    trust_coefficient * |w| / |u|, or unscaled where a norm is 0. Biases and norms take plain steps of SGD. The sum of
    updates (momentum) is then multiplied by the learning rate.

    timm's Lars differs: it divides by |g| + weight_decay * |w|, which is more than |u| unless g and w are parallel, and
    does not scale where g is 0, such as in residual branches that start at zero. It is apex's LARC (`larc`).

    Args:
        groups: of parameters, with ``lr`` and ``weight_decay``.
        lr: learning rate of groups that have none.
        momentum: factor of the sum of earlier updates.
        trust_coefficient: eta in the paper.
        classic_momentum: multiply each update by the learning rate of its own step, as in SimCLR's code, instead of
            their sum by that of the current step. They differ while the rate changes.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        classic_momentum: bool = False,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": 0.0, "momentum": momentum, "trust_coefficient": trust_coefficient}
        super().__init__(groups, {**defaults, "classic_momentum": classic_momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate_of_update, rate_of_sum = (group["lr"], 1.0) if group["classic_momentum"] else (1.0, group["lr"])
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = weight.grad.add(weight, alpha=group["weight_decay"])
                if weight.ndim > 1:
                    update *= trust_ratio(weight, update, group["trust_coefficient"])
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                momentum = state["momentum_buffer"]
                momentum.mul_(group["momentum"]).add_(update, alpha=rate_of_update)
                weight.sub_(momentum, alpha=rate_of_sum)
        return loss


def trust_ratio(weight: Tensor, update: Tensor, coefficient: float) -> Tensor:
    """LARS's coefficient * |weight| / |update|, or 1 where either norm is 0: scalar."""
    weight_norm, update_norm = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(update)
    ratio = coefficient * weight_norm / update_norm
    return torch.where((weight_norm > 0) & (update_norm > 0), ratio, torch.ones_like(ratio))


def lars(
    groups: Sequence[dict[str, Any]], *, lr: float, momentum: float = 0.9, trust_coefficient: float = 0.001
) -> LARS:
    """`LARS`, an algorithm for `OptimizerRecipe`: ``partial(lars, …)``."""
    return LARS([{**group} for group in groups], lr, momentum=momentum, trust_coefficient=trust_coefficient)


def classic_lars(
    groups: Sequence[dict[str, Any]], *, lr: float, momentum: float = 0.9, trust_coefficient: float = 0.001
) -> LARS:
    """SimCLR's `LARS`, with ``classic_momentum``."""
    return LARS(
        [{**group} for group in groups],
        lr,
        momentum=momentum,
        trust_coefficient=trust_coefficient,
        classic_momentum=True,
    )


def larc(
    groups: Sequence[dict[str, Any]], *, lr: float, momentum: float = 0.9, trust_coefficient: float = 0.001
) -> Lars:
    """SwAV's LARC (apex's, without clipping): SGD with momentum where the gradient of every tensor, biases and norms
    included, is scaled by trust_coefficient * |weight| / (|gradient| + weight_decay * |weight|)."""
    return Lars(
        [{**group} for group in groups], lr=lr, momentum=momentum, trust_coeff=trust_coefficient, always_adapt=True
    )


def lamb(
    groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6
) -> Lamb:
    """LAMB: Adam whose update of each decayed tensor is scaled to the tensor's own norm; the others take Adam's steps.
    Only the trainer clips gradients. An algorithm for `OptimizerRecipe`: ``partial(lamb, …)``."""
    return Lamb(groups, lr=lr, betas=betas, eps=eps, max_grad_norm=None)


def layer_decay_rules(layers: Sequence[str], decay: float) -> list[Rule]:
    """Rules for layer-wise learning-rate decay.

    Args:
        layers: name patterns from the input to the head. The last has factor 1, each one before it ``decay`` times that
            of the next.
    """
    depth = len(layers) - 1
    return [Rule(pattern, lr_multiplier=decay ** (depth - level)) for level, pattern in enumerate(layers)]
