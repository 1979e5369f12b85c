"""Text augmentation without a language model: stop words are removed, and one operation of EDA (Easy Data Augmentation;
Wei and Zou, 2019) changes a word or two. All functions are pure; the generator decides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from src.errors import SettingError

_TOKEN = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")

# English function words by their part of speech
_FUNCTION_WORDS = """
    a an the this that these those
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves who whom whose which what
    am is are was were be been being have has had having do does did doing done can could will would shall should may
    might must isn't aren't wasn't weren't hasn't haven't hadn't doesn't don't didn't can't couldn't won't wouldn't
    shouldn't it's that's there's
    and but or nor if because while until than so as
    of at by for with about against between into through during before after above below to from up down in out on off
    over under
    again further then once here there when where why how all any both each few more most other some such no not only
    own same too very just now
"""
STOP_WORDS = frozenset(_FUNCTION_WORDS.split())


def tokenize(text: str) -> list[str]:
    """Splits a text into words and punctuation marks."""
    return _TOKEN.findall(text)


def remove_stop_words(text: str) -> str:
    """Removes function words; a text that has no other words stays as it is."""
    kept = [word for word in tokenize(text) if word.lower() not in STOP_WORDS]
    return " ".join(kept) or text


def replace_synonym(text: str, synonyms: Mapping[str, Sequence[str]], rng: np.random.Generator) -> str:
    """Replaces one word, wherever it stands, by one of its synonyms; a text without a word that has some stays as it
    is."""
    words = text.split()
    candidates = [word for word in dict.fromkeys(words) if word.lower() not in STOP_WORDS and word.lower() in synonyms]
    if not candidates:
        return text
    chosen = candidates[int(rng.integers(len(candidates)))]
    options = synonyms[chosen.lower()]
    replacement = options[int(rng.integers(len(options)))]
    return " ".join(replacement if word == chosen else word for word in words)


def swap_words(text: str, rng: np.random.Generator) -> str:
    """Exchanges two words; a text of one word stays as it is."""
    words = text.split()
    if len(words) < 2:
        return text
    first, second = rng.choice(len(words), 2, replace=False)
    words[first], words[second] = words[second], words[first]
    return " ".join(words)


def delete_words(text: str, share: float, rng: np.random.Generator) -> str:
    """Deletes each word with probability ``share``; if none remains, one of them stays."""
    words = text.split()
    kept = [word for word, number in zip(words, rng.random(len(words)), strict=True) if number >= share]
    return " ".join(kept) if kept else words[int(rng.integers(len(words)))]


def read_synonyms(path: str | Path) -> dict[str, list[str]]:
    """Reads groups of synonyms, one a line, separated by commas: each word of a group is replaced by the others. Words
    are lower-case; a word of several groups has the synonyms of all.

    Raises:
        SettingError: the file cannot be read, or a line has fewer than two synonyms.
    """
    setting = f"data.extras.synonyms={path}"
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise SettingError(f"{setting} cannot be read as text: {problem}") from problem
    synonyms: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        group = [word.strip().lower() for word in line.split(",") if word.strip()]
        if not group:
            continue
        if len(group) < 2:
            raise SettingError(f"{setting}: line {number} has one word; synonyms are separated by commas")
        for word in group:
            known = synonyms.setdefault(word, [])
            known += [other for other in group if other != word and other not in known]
    return synonyms
