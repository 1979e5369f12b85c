"""Small backbones and batches for the tests of joint-embedding methods."""

from __future__ import annotations

from functools import partial

import timm
import torch
from torch import Tensor, nn

from src.optim import OptimizerRecipe
from tests.toys import small_vit

SIDE = 16


def optimizer() -> OptimizerRecipe:
    return OptimizerRecipe(partial(torch.optim.SGD, momentum=0.9), lr=0.1)


def vit(**options: object) -> nn.Module:
    return small_vit(**{"img_size": SIDE, "embed_dim": 12, **options})


def resnet() -> nn.Module:
    """With batch norms all over."""
    return timm.create_model("resnet10t", channels=[8, 8, 8, 16], stem_width=8, num_classes=0)


def batch(count: int = 4, views: int = 2, local_views: int = 0, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {
        "views": torch.randn(count, views, 3, SIDE, SIDE, generator=generator, dtype=torch.float64),
        "label": torch.zeros(count, dtype=torch.int64),
        "index": torch.arange(count),
        "replaced": torch.zeros(count, dtype=torch.bool),
    }
    if local_views:
        made["local_views"] = torch.randn(count, local_views, 3, SIDE // 2, SIDE // 2, generator=generator).double()
    return made


def part_of(batch: dict[str, Tensor], process: int, processes: int = 2) -> dict[str, Tensor]:
    """A process's share of a batch."""
    share = len(batch["index"]) // processes
    return {name: value[process * share : (process + 1) * share] for name, value in batch.items()}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
