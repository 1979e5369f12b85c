"""Class names as texts, for methods that compare images or videos with the names of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from src.datamodules.extras.extras import Extras
from src.datamodules.sources.source import Source
from src.datamodules.views.view import View
from src.errors import SettingError


@dataclass(frozen=True)
class ClassNames(Extras):
    """Provides a tokenizer for the class names, learned from them if none is named. Batches contain no texts: a method
    asks for the names once (`DataModule.class_texts`)."""

    def batch_type(self, train_view: View, eval_view: View) -> type:
        return train_view.batch_type

    def check(self, source: Source) -> None:
        class_texts(source)

    def vocabulary_texts(self, source: Source) -> Sequence[str]:
        return class_texts(source)


def class_texts(source: Source, template: str | None = "{}") -> list[str]:
    """Returns the prompt of each class, by label.

    Args:
        source: whose classes have names.
        template: with one ``{}`` for the name; None for the source's own, or the name alone if it has none.

    Raises:
        SettingError: the classes have no names.
    """
    if not len(source.classes):
        raise SettingError(f"data.source: {type(source).__name__} has no class names")
    if template is None:
        template = "{}" if source.prompts is None else source.prompts.single
    return [template.format(name) for name in source.classes]
