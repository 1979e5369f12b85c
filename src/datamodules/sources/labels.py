"""Class names of labels that are numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from src.datamodules.decoding import DataError

MOST_CLASSES = 1_000_000
"""Labels above this number are taken for a mistake, such as a column of something else."""


def numbered_classes(labels: Sequence[int] | np.ndarray, key: str) -> list[str]:
    """Returns names of classes that have none: the numbers from 0 to the largest label.

    Args:
        labels: of the training split, -1 for unlabeled samples.
        key: the setting that names the labels, for messages.

    Raises:
        DataError: a label is above `MOST_CLASSES`.
    """
    highest = max((int(label) for label in labels), default=-1)
    if highest >= MOST_CLASSES:
        raise DataError(f"{key}: a label is {highest}, where labels are numbers of classes, from 0")
    return [str(number) for number in range(highest + 1)]


def class_list(classes: int | Sequence[str]) -> list[str]:
    """Returns class names: those that are given, or the numbers below a number of classes."""
    return [str(number) for number in range(classes)] if isinstance(classes, int) else list(classes)


def check_labels(labels: np.ndarray, classes: Sequence[str], place: str) -> None:
    """Checks that a split has no label that the training split lacks.

    Raises:
        DataError: it has one.
    """
    highest = int(labels.max(initial=-1))
    if classes and highest >= len(classes):
        raise DataError(f"{place} has the label {highest}, and its training split only 0 to {len(classes) - 1}")
