"""Whether a model reads what texts say of things, or only which things they name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from src.datamodules.sources.source import HardNegative


@runtime_checkable
class HardNegativeSource(Protocol):
    """A source that also has texts which are wrong about its images."""

    def mistakes(self, index: int) -> Sequence[HardNegative]:
        """Returns hard negatives of the image, the same every time: any number of each kind, none if there can be none."""
        ...


@torch.no_grad()
def preference(right: Tensor, wrong: Tensor, kinds: Sequence[str]) -> dict[str, float]:
    """How often the right text is nearer to its image than the wrong one, by kind of mistake; chance is 0.5.

    Two texts that are equally near count half, so that a model which cannot tell them apart (a bag of words of which
    two have changed places) is at chance.

    Args:
        right, wrong: similarities [M] of an image with either text.
        kinds: of the mistakes, M names.

    Raises:
        ValueError: not as many of each.
    """
    if not len(right) == len(wrong) == len(kinds):
        raise ValueError(f"{len(right)} right texts, {len(wrong)} wrong ones and {len(kinds)} kinds are no pairs")
    won = ((right > wrong).float() + (right >= wrong).float()).cpu() / 2
    found = {}
    for kind in sorted(set(kinds)):
        mine = torch.tensor([each == kind for each in kinds])
        found[kind] = won[mine].double().mean().item()
    return found
