"""Zero-shot classification: prompts with the names of the classes make the classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from src.datamodules.batches.base import mean_of_samples
from src.datamodules.sources.source import Prompts
from src.errors import SettingError
from src.evaluation.errors import BadFeatures, NotApplicable
from src.evaluation.image_text import EncodedImages, encode_texts, encoded_images, encoding
from src.evaluation.similarity import CustomSimilarity, Rows, Similarity, dot, similarity_of, take_rows
from src.evaluation.subject import Subject

# for natural images: CLIP's authors found this ensemble to do nearly as well as their eighty prompts
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


@dataclass(frozen=True)
class ZeroShot:
    """Classifies images by the similarity with prompts of each class, an ensemble of ``templates`` as in CLIP.

    Reports ``zeroshot_top1``, ``zeroshot_top5`` if there are more than five classes, and ``zeroshot_single_top1`` by
    the ``single`` prompt alone. If training has seen only some classes, ``zeroshot_unseen_top1`` is the accuracy on
    images of the other classes, among these, and ``zeroshot_seen_top1`` that on images of the seen classes, among
    those. Scores of several clips of a video are averaged.

    The prompts of a class are averaged as vectors, or as scores if the method is `CustomSimilarity`.

    Args:
        templates: prompts of a class, each with one ``{}``; None for those of the data, or of natural images.
        single: the prompt that is used alone; None likewise.
    """

    templates: Sequence[str] | None = None
    single: str | None = None

    def __call__(self, subject: Subject) -> dict[str, float]:
        images = encoded_images(subject)
        classes, source = subject.datamodule.classes, subject.source
        labelled = images.label >= 0
        if len(classes) == 0 or not labelled.any():
            raise NotApplicable("zero-shot classification needs labels with names, which the data does not have")
        prompts = source.prompts or PHOTOS
        with encoding(subject):
            ensemble, label = self._scores(subject, images, labelled, self.templates or prompts.templates)
            scores = {"zeroshot_top1": within(ensemble, label)}
            if ensemble.shape[1] > 5:
                scores["zeroshot_top5"] = within(ensemble, label, k=5)
            if len(source.held_out):
                scores |= _seen_and_unseen(ensemble, label, source.held_out)
            single = self._scores(subject, images, labelled, [self.single or prompts.single])
            scores["zeroshot_single_top1"] = within(*single)
        return scores

    @staticmethod
    def _scores(
        subject: Subject, images: EncodedImages, labelled: Tensor, templates: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Returns the scores of all classes [S, K] and the label [S] of each labelled sample."""
        rows, classes, encode = (
            take_rows(images.rows, labelled),
            subject.datamodule.classes,
            partial(encode_texts, subject),
        )
        if isinstance(subject.module, CustomSimilarity):
            scores = class_scores(rows, classes, encode, similarity_of(subject.module), templates)
        else:
            vectors = classifier(classes, cast(Callable[[list[str]], Tensor], encode), templates)
            scores = dot(rows, vectors)
        mean, first = mean_of_samples(scores, images.index[labelled])  # over the clips of a video
        return mean, images.label[labelled][first]


@torch.no_grad()
def classifier(
    classes: Sequence[str], encode: Callable[[list[str]], Tensor], templates: Sequence[str] = PHOTOS.templates
) -> Tensor:
    """Returns one unit vector a class, the mean of its prompts' unit vectors: [K, D].

    Args:
        classes: names.
        encode: texts -> unit vectors [n, D].
        templates: each with one ``{}``.

    Raises:
        SettingError: no class, no template, or a template that does not have one ``{}``.
    """
    _check(classes, templates)
    vectors = [normalize(encode([template.format(name) for template in templates]), dim=-1) for name in classes]
    return normalize(torch.stack([prompts.mean(dim=0) for prompts in vectors]), dim=-1)


@torch.no_grad()
def class_scores(
    image: Rows,
    classes: Sequence[str],
    encode: Callable[[list[str]], Rows],
    similarity: Similarity,
    templates: Sequence[str],
) -> Tensor:
    """Returns the mean over templates of the images' similarities with the prompts, [N, K]: the ensemble of a method
    whose prompts are no vectors.

    Args:
        image: N images as the method encodes them.
        encode: texts -> rows, as the method encodes them.
        similarity: of the method.
        classes, templates: see `classifier`; errors as there.
    """
    _check(classes, templates)
    scores = (similarity(image, encode([template.format(name) for name in classes])) for template in templates)
    return cast(Tensor, sum(scores)) / len(templates)


def within(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Returns the share of rows [N, K] in which the label is among the ``k`` greatest; of equal scores the smaller
    class comes first.

    Raises:
        BadFeatures: scores are NaN or infinite.
    """
    bad = ~torch.isfinite(scores).all(dim=1)
    if bad.any():
        raise BadFeatures(f"the class scores of {int(bad.sum())} of {len(bad)} images are NaN or infinite")
    own = scores.gather(1, labels[:, None])
    columns = torch.arange(scores.shape[1], device=scores.device)
    # counts the classes that are not behind: if it counted those ahead, NaN scores would be perfect
    behind = (scores < own) | ((scores == own) & (columns > labels[:, None]))
    return ((~behind).sum(dim=1) - 1 < k).double().mean().item()


def _seen_and_unseen(scores: Tensor, labels: Tensor, held_out: Sequence[int]) -> dict[str, float]:
    """Returns ``zeroshot_seen_top1`` and ``zeroshot_unseen_top1`` of scores [N, K]: of the images of these classes,
    among these classes."""
    is_held_out = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
    is_held_out[list(held_out)] = True
    accuracies = {}
    for name, among in (("seen", ~is_held_out), ("unseen", is_held_out)):
        rows = among[labels]
        if len(held_out) and bool(rows.any()):
            column = among.cumsum(dim=0) - 1  # of a class among these
            accuracies[f"zeroshot_{name}_top1"] = within(scores[rows][:, among], column[labels[rows]])
    return accuracies


def _check(classes: Sequence[str], templates: Sequence[str]) -> None:
    if not classes or not templates:
        raise SettingError("zero-shot classification needs at least one class and one template")
    for template in templates:
        if template.count("{}") != 1:
            raise SettingError(f"a template has one {{}} for the name of the class; got '{template}'")
