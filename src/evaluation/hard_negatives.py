"""Hard negatives: captions that are wrong in one detail, which a model that only recognizes objects cannot refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from src.datamodules.sources.source import HardNegative
from src.errors import SettingError
from src.evaluation.errors import BadFeatures, NotApplicable
from src.evaluation.image_text import encode_texts, encoded_images, encoding
from src.evaluation.similarity import pairwise, similarity_of, take_rows
from src.evaluation.subject import Subject


@runtime_checkable
class HardNegativeSource(Protocol):
    """A source that also has texts which are wrong about its images."""

    def mistakes(self, index: int) -> Sequence[HardNegative]:
        """Returns hard negatives of the image, the same every time: any number of each kind, none if there can be
        none."""
        ...


@dataclass(frozen=True)
class HardNegatives:
    """Compares the similarity of each image to a right caption and to one that is wrong in one detail. Reports
    ``hardnegatives_<kind>`` for each kind of mistake, see `preference`.

    Args:
        samples: number of images at most, evenly spaced in the split; None for all.
    """

    samples: int | None = 1000

    def __call__(self, subject: Subject) -> dict[str, float]:
        source = subject.source
        if not isinstance(source, HardNegativeSource):
            raise NotApplicable(
                f"captions with a mistake are needed, which scenes have and {type(source).__name__} (data.source) does "
                "not"
            )
        images, similarity = encoded_images(subject), similarity_of(subject.module)
        total = len(images.index)
        count = min(total, self.samples or total)
        chosen = [number * total // count for number in range(count)]
        negatives = [(row, negative) for row in chosen for negative in source.mistakes(int(images.index[row]))]
        if not negatives:
            raise NotApplicable("none of the images has a caption with a mistake (data.source)")
        rows = take_rows(images.rows, [row for row, _ in negatives])
        with encoding(subject):
            right = pairwise(similarity, rows, encode_texts(subject, [negative.right for _, negative in negatives]))
            wrong = pairwise(similarity, rows, encode_texts(subject, [negative.wrong for _, negative in negatives]))
        by_kind = preference(right, wrong, [negative.kind for _, negative in negatives])
        return {f"hardnegatives_{kind}": value for kind, value in by_kind.items()}


@torch.no_grad()
def preference(right: Tensor, wrong: Tensor, kinds: Sequence[str]) -> dict[str, float]:
    """Returns the share of images that are more similar to the right text than to the wrong one, by kind of mistake;
    chance is 0.5. Equal similarities count half, so that a bag of words, which cannot tell two texts with exchanged
    words apart, is at chance.

    Args:
        right, wrong: similarities [M] of an image with either text.
        kinds: M names of mistakes.

    Raises:
        SettingError: the numbers differ.
        BadFeatures: similarities are NaN or infinite.
    """
    if not len(right) == len(wrong) == len(kinds):
        raise SettingError(f"preference: {len(right)} right texts, {len(wrong)} wrong ones and {len(kinds)} kinds")
    if not (torch.isfinite(right).all() and torch.isfinite(wrong).all()):
        raise BadFeatures("similarities of images and hard negatives are NaN or infinite")
    won = ((right > wrong).float() + (right >= wrong).float()).cpu() / 2
    shares = {}
    for kind in sorted(set(kinds)):
        of_kind = torch.tensor([name == kind for name in kinds])
        shares[kind] = won[of_kind].double().mean().item()
    return shares
