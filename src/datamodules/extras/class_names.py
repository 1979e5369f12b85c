"""Class names as texts, for methods that compare images or videos with the names of classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from src.datamodules.extras.extras import Extras
from src.datamodules.sources.source import Source
from src.datamodules.views.view import View
from src.errors import SettingError

_SYNSET = re.compile(r"n\d{8}")  # a folder of ImageNet: the offset of a noun in WordNet 3.0


@dataclass(frozen=True)
class ClassNames(Extras):
    """Provides a tokenizer for the class names, learned from them if none is named. Batches contain no texts: a method
    asks for the names once (`DataModule.class_texts`)."""

    def batch_type(self, train_view: View, eval_view: View) -> type:
        return train_view.batch_type

    def check(self, source: Source) -> None:
        class_texts(source)

    def vocabulary_texts(self, source: Source, samples: int) -> Sequence[str]:
        return class_texts(source)


def class_texts(source: Source, template: str | None = "{}") -> list[str]:
    """Returns the prompt of each class, by label.

    Args:
        source: whose classes have names.
        template: with one ``{}`` for the name; None for the source's own, or the name alone if it has none.

    Raises:
        SettingError: the classes have no names.
    """
    names = class_names(source)
    if template is None:
        template = "{}" if source.prompts is None else source.prompts.single
    return [template.format(name) for name in names]


def class_names(source: Source) -> list[str]:
    """Returns the name of each class in words, by label: those of ``data.class_names`` if it names a file; else the
    source's own with spaces for underscores, or WordNet's where all classes are synsets, as ImageNet's folders are.

    Raises:
        SettingError: the classes have no names.
    """
    if source.class_names is not None:
        return list(source.class_names)
    classes = [str(name) for name in source.classes]
    if not classes:
        raise SettingError(
            f"data.source: {type(source).__name__} has no class names; data.class_names=<file> gives them"
        )
    if all(_SYNSET.fullmatch(name) for name in classes):
        return [_synset_name(synset) for synset in classes]
    if not any(character.isalpha() for name in classes for character in name):
        raise SettingError(
            f"data.source: the classes of {type(source).__name__} are numbers ({', '.join(classes[:3])} …), not names; "
            "data.class_names=<file> gives them"
        )
    return [" ".join(name.replace("_", " ").split()) for name in classes]


def read_class_names(path: str | Path, classes: Sequence[str]) -> list[str]:
    """Reads the names of classes, by label, from a text file: a name on each line, in the order of the labels, or a
    class of the data and its name, separated by a tab, on each line in any order. Lines of other classes are ignored.

    Args:
        path: of the file, UTF-8.
        classes: of the data, by label; empty if they are unknown, so that the file has to be in the order of labels.

    Raises:
        SettingError: the file cannot be read, or lacks the name of a class.
    """
    setting = f"data.class_names={path}"
    try:
        lines = [line.strip() for line in Path(path).expanduser().read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as problem:
        raise SettingError(f"{setting} cannot be read as text: {problem}") from problem
    lines = [line for line in lines if line]
    if lines and all("\t" in line for line in lines):
        name_of: Mapping[str, str] = dict(line.split("\t", 1) for line in lines)
        missing = [name for name in classes if not name_of.get(name, "").strip()]
        if missing or not classes:
            has = f"lacks {len(missing)} classes of the data, such as '{missing[0]}'" if missing else "names classes"
            needed = "" if classes else ", which this data does not: write one name on each line, by label"
            raise SettingError(f"{setting} {has}{needed}")
        return [name_of[name].strip() for name in classes]
    if not lines or (classes and len(lines) != len(classes)):
        raise SettingError(f"{setting} has {len(lines)} names; the data has {len(classes)} classes")
    return lines


@cache
def _names_of_synsets() -> dict[str, str]:
    """Returns the name of each of WordNet's synsets that ImageNet-21k has: its first word; for the classes of
    ImageNet-1k torchvision's name, since the first words of two of them can be equal."""
    from timm.data import ImageNetInfo
    from torchvision.models import ResNet50_Weights

    all_synsets = ImageNetInfo("imagenet-21k")
    lemmas = {synset: all_synsets.label_name_to_description(synset, False) for synset in all_synsets.label_names()}
    names = {synset: lemma.split(",")[0] for synset, lemma in lemmas.items()}
    categories = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]  # in the order of sorted synsets
    return names | dict(zip(ImageNetInfo("imagenet-1k").label_names(), categories, strict=True))


def _synset_name(synset: str) -> str:
    names = _names_of_synsets()
    if synset not in names:
        raise SettingError(
            f"data.source: the class '{synset}' is no synset of ImageNet; data.class_names=<file> gives its name"
        )
    return names[synset]
