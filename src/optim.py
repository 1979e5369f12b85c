"""Optimizers as recipes: which parameters get which learning rate and weight decay, said in one place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.optim.lamb import Lamb
from timm.optim.lars import Lars
from torch import nn

from src.errors import SettingError

Algorithm = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Rule:
    """What parameters whose name matches ``pattern`` (``re.search``) get instead of the recipe's defaults.

    Args:
        max_axes: match only what has at most so many; 1 for biases and norms.
        lr_multiplier: factor on the learning rate, at every step.
        weight_decay: replaces the recipe's; None leaves it.
        frozen: no gradient and no update.
    """

    pattern: str
    lr_multiplier: float = 1.0
    weight_decay: float | None = None
    frozen: bool = False
    max_axes: int | None = None

    def matches(self, name: str, parameter: nn.Parameter) -> bool:
        fits = self.max_axes is None or parameter.ndim <= self.max_axes
        return fits and re.search(self.pattern, name) is not None


@dataclass(frozen=True)
class OptimizerRecipe:
    """An algorithm, its learning rate and weight decay, and the rules for single parameters.

    Biases, norms and everything else with one axis are not decayed. Of the ``rules`` the first that matches a
    parameter's name counts; it may give such a parameter a weight decay after all. Groups carry ``lr_multiplier`` and
    ``decayed``, which is how a schedule for the learning rate or the weight decay reaches each of them.

    Args:
        algorithm: builds the optimizer from parameter groups, e.g. ``partial(adamw, betas=(0.9, 0.95))``.
        lr: peak learning rate.
        weight_decay: of everything with more than one axis.
        rules: ordered.
    """

    algorithm: Algorithm
    lr: float
    weight_decay: float = 0.0
    rules: Sequence[Rule] = field(default=())

    def build(self, module: nn.Module, extra_rules: Iterable[Rule] = ()) -> torch.optim.Optimizer:
        """The optimizer over ``module``'s parameters that take a gradient; rules freeze in place.

        Raises:
            ValueError: a rule matches no parameter (a typo would otherwise go unnoticed), or nothing is left to train.
        """
        rules = [*self.rules, *extra_rules]
        matched = [False] * len(rules)
        groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
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
                (rule.lr_multiplier, decay, follows_schedule),
                {
                    "params": [],
                    "names": [],
                    "lr": self.lr * rule.lr_multiplier,
                    "weight_decay": decay,
                    "lr_multiplier": rule.lr_multiplier,
                    "decayed": follows_schedule,
                },
            )
            group["params"].append(parameter)
            group["names"].append(name)
        for rule, hit in zip(rules, matched, strict=True):
            if not hit and not any(rule.matches(*each) for each in module.named_parameters()):
                raise SettingError(f"no parameter's name matches the optimizer rule '{rule.pattern}'")
        if not groups:
            raise SettingError("no parameter is left to train: every one is frozen")
        # lr and weight_decay stand in every group; the keyword only satisfies algorithms that demand one
        return self.algorithm([{**group} for group in groups.values()], lr=self.lr)


def adamw(
    groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW whose update is one kernel: it reads and writes each tensor once, which a step on a CPU notices. An
    `OptimizerRecipe`'s algorithm: ``partial(adamw, …)``."""
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    # under 16-mixed a fused optimizer would undo the loss scale itself, after clipping and the guards saw the gradients
    optimizer._step_supports_amp_scaling = False
    return optimizer


def sgd(groups: Sequence[dict[str, Any]], *, lr: float, momentum: float = 0.9) -> torch.optim.SGD:
    """SGD with the momentum that ConvNets are trained with; a recipe then names an algorithm alone, which a smaller
    scale can replace by another. An `OptimizerRecipe`'s algorithm: ``partial(sgd, …)``."""
    return torch.optim.SGD(groups, lr=lr, momentum=momentum)


def lars(
    groups: Sequence[dict[str, Any]], *, lr: float, momentum: float = 0.9, trust_coefficient: float = 0.001
) -> Lars:
    """LARS: SGD with momentum where the gradient of each tensor of more than one axis is scaled by trust_coefficient *
    |weight| / |gradient|; for biases and norms it is SGD. An `OptimizerRecipe`'s algorithm: ``partial(lars, …)``."""
    split = []
    for group in groups:
        for adapted in (True, False):
            chosen = [position for position, p in enumerate(group["params"]) if (p.ndim > 1) == adapted]
            if chosen:
                parts = {key: [group[key][position] for position in chosen] for key in ("params", "names")}
                split.append({**group, **parts, "always_adapt": adapted})
    return Lars(split, lr=lr, momentum=momentum, trust_coeff=trust_coefficient)


def larc(
    groups: Sequence[dict[str, Any]], *, lr: float, momentum: float = 0.9, trust_coefficient: float = 0.001
) -> Lars:
    """`lars` that scales the gradients of biases and norms too, as SwAV does (apex's LARC without clipping)."""
    return Lars(
        [{**group} for group in groups], lr=lr, momentum=momentum, trust_coeff=trust_coefficient, always_adapt=True
    )


def lamb(
    groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6
) -> Lamb:
    """LAMB: Adam whose direction is brought, for each tensor that is decayed, to the tensor's own length; for what is
    not decayed it is Adam. Gradients are clipped by the trainer alone. An `OptimizerRecipe`'s algorithm:
    ``partial(lamb, …)``."""
    return Lamb(groups, lr=lr, betas=betas, eps=eps, max_grad_norm=None)


def layer_decay_rules(layers: Sequence[str], decay: float) -> list[Rule]:
    """Layer-wise learning-rate decay: ``layers`` are name patterns from the input to the head, the last gets factor 1
    and each one below it ``decay`` times the one above."""
    depth = len(layers) - 1
    return [Rule(pattern, lr_multiplier=decay ** (depth - level)) for level, pattern in enumerate(layers)]
