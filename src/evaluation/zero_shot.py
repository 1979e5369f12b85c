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
from src.errors import SettingError
from src.evaluation.errors import BadFeatures, NotApplicable
from src.evaluation.image_text import EncodedImages, encode_texts, encoded_images, encoding
from src.evaluation.prompts import PHOTOS
from src.evaluation.similarity import CustomSimilarity, Rows, Similarity, dot, similarity_of, take_rows
from src.evaluation.subject import Subject

_PROMPTS = 256  # that are encoded at a time, about


@dataclass(frozen=True)
class ZeroShot:
    """Classifies images by the similarity with prompts of each class, an ensemble of ``templates`` as in CLIP. Images
    and labels are enough; the names are those of `DataModule.class_names`.

    Reports ``zeroshot_top1``, ``zeroshot_top5`` if there are more than five classes, ``zeroshot_per_class_top1``, the
    mean over classes of their accuracy, which CLIP reports on Flowers and Pets, and ``zeroshot_single_top1`` by the
    ``single`` prompt alone. If training has seen only some classes, ``zeroshot_unseen_top1`` is the accuracy on images
    of the other classes, among these, and ``zeroshot_seen_top1`` that on images of the seen classes, among those.
    Scores of several clips of a video are averaged.

    The prompts of a class are averaged as vectors, or as scores if the method is `CustomSimilarity`.

    Args:
        templates: prompts of a class, each with one ``{}``; None for those of the data, or of natural images.
        single: the prompt that is used alone; None likewise.
        name: prefix of the names of its numbers.

    Raises:
        NotApplicable: the data has no labels, or their classes have no names.
    """

    templates: Sequence[str] | None = None
    single: str | None = None
    name: str = "zeroshot"

    def __call__(self, subject: Subject) -> dict[str, float]:
        source, names = subject.source, _names_of_classes(subject)
        images = encoded_images(subject)
        labelled = images.label >= 0
        if not labelled.any():
            raise NotApplicable("zero-shot classification needs labels, which the data does not have (data.source)")
        if int(images.label.max()) >= len(names):
            raise NotApplicable(
                f"zero-shot classification: the data has the label {int(images.label.max())} and names of {len(names)} "
                "classes (data.class_names)"
            )
        prompts = source.prompts or PHOTOS
        with encoding(subject):
            ensemble, label = self._scores(subject, images, labelled, names, self.templates or prompts.templates)
            scores = {"top1": within(ensemble, label)}
            if ensemble.shape[1] > 5:
                scores["top5"] = within(ensemble, label, k=5)
            scores["per_class_top1"] = mean_per_class(ensemble, label)
            if len(source.held_out):
                scores |= _seen_and_unseen(ensemble, label, source.held_out)
            single, label = self._scores(subject, images, labelled, names, [self.single or prompts.single])
            scores["single_top1"] = within(single, label)
        return {f"{self.name}_{key}": value for key, value in scores.items()}

    @staticmethod
    def _scores(
        subject: Subject, images: EncodedImages, labelled: Tensor, names: Sequence[str], templates: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Returns the scores of all classes [S, K] and the label [S] of each labelled sample."""
        rows, encode = take_rows(images.rows, labelled), partial(encode_texts, subject)
        if isinstance(subject.module, CustomSimilarity):
            scores = class_scores(rows, names, encode, similarity_of(subject.module), templates)
        else:
            scores = dot(rows, classifier(names, cast(Callable[[list[str]], Tensor], encode), templates))
        mean, first = mean_of_samples(scores, images.index[labelled])  # over the clips of a video
        return mean, images.label[labelled][first]


def _names_of_classes(subject: Subject) -> list[str]:
    try:
        return subject.datamodule.class_names
    except SettingError as problem:
        raise NotApplicable(f"zero-shot classification needs labels with names: {problem}") from problem


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
    step, means = max(1, _PROMPTS // len(templates)), []
    for begin in range(0, len(classes), step):
        names = classes[begin : begin + step]
        vectors = encode([template.format(name) for name in names for template in templates])
        means.append(normalize(vectors, dim=-1).unflatten(0, (len(names), len(templates))).mean(dim=1))
    return normalize(torch.cat(means), dim=-1)


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


def mean_per_class(scores: Tensor, labels: Tensor) -> float:
    """Returns the mean over classes of the share of their rows [N, K] for which `within` finds the label, over the
    classes that have rows."""
    of_class = [labels == name for name in labels.unique()]
    return sum(within(scores[rows], labels[rows]) for rows in of_class) / len(of_class)


def _seen_and_unseen(scores: Tensor, labels: Tensor, held_out: Sequence[int]) -> dict[str, float]:
    """Returns ``seen_top1`` and ``unseen_top1`` of scores [N, K]: of the images of these classes, among these
    classes."""
    is_held_out = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
    is_held_out[list(held_out)] = True
    accuracies = {}
    for name, among in (("seen", ~is_held_out), ("unseen", is_held_out)):
        rows = among[labels]
        if len(held_out) and bool(rows.any()):
            column = among.cumsum(dim=0) - 1  # of a class among these
            accuracies[f"{name}_top1"] = within(scores[rows][:, among], column[labels[rows]])
    return accuracies


def _check(classes: Sequence[str], templates: Sequence[str]) -> None:
    if not classes or not templates:
        raise SettingError("zero-shot classification needs at least one class and one template")
    for template in templates:
        if template.count("{}") != 1:
            raise SettingError(f"a template has one {{}} for the name of the class; got '{template}'")
