"""Classes by their names: prompts make the classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from src.datamodules.sources.source import Prompts
from src.evaluation.similarity import Similarity

# of natural images: the ensemble is what CLIP's authors found to do nearly as well as their eighty
PHOTOS = Prompts(
    templates=(
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    single="a photo of a {}.",
)


@torch.no_grad()
def classifier(
    classes: Sequence[str], encode: Callable[[list[str]], Tensor], templates: Sequence[str] = PHOTOS.templates
) -> Tensor:
    """One unit vector a class, the mean of its prompts' unit vectors: [K, D].

    Args:
        classes: names.
        encode: texts to unit vectors [n, D].
        templates: each with one ``{}``.

    Raises:
        ValueError: no class, no template, or a template without a place for the name.
    """
    _check(classes, templates)
    each = [normalize(encode([template.format(name) for template in templates]), dim=-1) for name in classes]
    return normalize(torch.stack([prompts.mean(dim=0) for prompts in each]), dim=-1)


@torch.no_grad()
def class_scores(
    image: Tensor,
    classes: Sequence[str],
    encode: Callable[[list[str]], Tensor],
    similarity: Similarity,
    templates: Sequence[str],
) -> Tensor:
    """How well each class fits each image where prompts make no vector: the mean over templates of the images'
    similarities with the prompts, [N, K].

    Args:
        image: N images as the method encodes them.
        encode: texts to what the method encodes them as.
        similarity: of the method.
        classes, templates: see `classifier`; errors as there.
    """
    _check(classes, templates)
    total = torch.zeros(len(image), len(classes), device=image.device)
    for template in templates:
        total += similarity(image, encode([template.format(name) for name in classes]))
    return total / len(templates)


def within(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """The share of rows [N, K] in which the label is among the ``k`` greatest; the smaller of a tie is."""
    mine = scores.gather(1, labels[:, None])
    columns = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > mine) | ((scores == mine) & (columns < labels[:, None]))
    return (before.sum(dim=1) < k).double().mean().item()


def _check(classes: Sequence[str], templates: Sequence[str]) -> None:
    if not classes or not templates:
        raise ValueError("zero-shot classification needs classes and templates")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"a template has one {{}} for the name of the class; got '{template}'")
