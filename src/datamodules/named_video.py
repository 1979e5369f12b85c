"""Videos whose classes are told by their names."""

from __future__ import annotations

from collections.abc import Sequence

from src.datamodules.sources.source import HeldOutClassSource, PromptedSource
from src.datamodules.text.tokenizing import TokenizingDataModule
from src.datamodules.video import VideoDataModule
from src.errors import SettingError


class NamedVideoDataModule(TokenizingDataModule, VideoDataModule):
    """`VideoDataModule` with a tokenizer for the names of its classes; one that has to be learned is learned from
    these. Batches hold no texts: a method asks for the names once."""

    def class_texts(self, template: str | None = "{}") -> list[str]:
        """What each class is called, by label.

        Args:
            template: with one ``{}`` for the name; None for the source's own, or the name alone where it has none.

        Raises:
            SettingError: the classes have no names.
        """
        source = self.train_source
        if not len(source.classes):
            raise SettingError(f"data.source: {type(source).__name__} has no names of classes")
        if template is None:
            template = source.prompts.single if isinstance(source, PromptedSource) else "{}"
        return [template.format(name) for name in source.classes]

    @property
    def held_out(self) -> Sequence[int]:
        """Labels of classes that training goes without."""
        source = self.train_source
        return source.held_out if isinstance(source, HeldOutClassSource) else ()

    def texts_to_learn_from(self) -> Sequence[str]:
        return self.class_texts()
