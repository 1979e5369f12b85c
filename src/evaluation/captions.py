"""Captions that a method generates, compared with the reference captions of the same images."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from src.collectives import gather_rows
from src.datamodules.extras.captions import CaptionedSource
from src.errors import SettingError
from src.evaluation.errors import NotApplicable
from src.evaluation.image_text import encoding, tokenizer_of
from src.evaluation.subject import Subject


@runtime_checkable
class Captioner(Protocol):
    """A method that generates captions."""

    def caption(self, image: Tensor, *, start: int, end: int, length: int, beams: int = 1) -> Tensor:
        """Returns token ids int64 [B, length] for images [B, 3, H, W]: ``start``, the caption, then ``end`` up to the
        full length."""
        ...


@dataclass(frozen=True)
class CaptionEvaluation:
    """Reports ``captions_bleu4`` (0 to 1) and ``captions_cider`` (CIDEr-D, 0 to 10) of generated captions against the
    source's captions. Papers write both times 100.

    Texts are split into lower-case words without punctuation. The server of COCO tokenizes by slightly different rules
    and may give slightly different numbers.

    Args:
        samples: number of images at most, besides the subject's own limit, since generation is slow; None for no
            further limit.
        beams: width of the beam search; 1 is greedy decoding.
    """

    samples: int | None = 1000
    beams: int = 1

    def __call__(self, subject: Subject) -> dict[str, float]:
        module, source = subject.module, subject.source
        if not isinstance(module, Captioner):
            raise NotApplicable(f"a method that generates captions is needed, which {type(module).__name__} is not")
        if not isinstance(source, CaptionedSource):
            raise NotApplicable(f"captions are needed, which {type(source).__name__} (data.source) does not have")
        tokenizer = tokenizer_of(subject)
        start, end = tokenizer.start, tokenizer.end
        if start is None or end is None:
            raise NotApplicable("a tokenizer with a start and an end token is needed (data.tokenizer)")
        parts = []
        with encoding(subject):
            for batch in subject.batches(self.samples):
                ids = module.caption(batch["image"], start=start, end=end, length=tokenizer.length, beams=self.beams)
                parts.append((ids, batch["index"]))
        ids, index = (gather_rows(torch.cat(column)) for column in zip(*parts, strict=True))
        order = index.argsort()
        candidates = tokenizer.decode(ids[order])
        references = [source.captions(position) for position in index[order].tolist()]
        return {
            "captions_bleu4": bleu4(candidates, references),
            "captions_cider": cider_d(candidates, references),
        }


def bleu4(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns corpus BLEU of up to four words (Papineni et al., 2002), as COCO's server computes it: of references
    whose length is equally near to a candidate's the shortest counts, and an n-gram that never matches counts 1e-15
    times, so that the value is not 0 if only the longest n-grams are missing.

    Args:
        candidates: one for each image.
        references: at least one for each image.

    Raises:
        SettingError: no candidate, another number of candidates than images, or an image without reference.
    """
    _check(candidates, references, "BLEU-4")
    matched, total, length, reference_length = [0] * 4, [0] * 4, 0, 0
    for candidate, texts in zip(candidates, references, strict=True):
        counts, of_references = _ngrams(candidate, 4), [_ngrams(text, 4) for text in texts]
        most: Counter[_Ngram] = reduce(or_, of_references)
        for ngram, count in counts.items():
            total[len(ngram) - 1] += count
            matched[len(ngram) - 1] += min(count, most[ngram])
        words_in = _count_words(counts)
        length += words_in
        reference_length += min(map(_count_words, of_references), key=lambda other: (abs(other - words_in), other))
    tiny, small = 1e-15, 1e-9  # the constants of COCO's code
    precision = math.prod((m + tiny) / (t + small) for m, t in zip(matched, total, strict=True)) ** 0.25
    ratio = (length + tiny) / (reference_length + small)
    return precision * min(1.0, math.exp(1 - 1 / ratio))


def cider_d(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, longest: int = 4, sigma: float = 6.0
) -> float:
    """Returns CIDEr-D (Vedantam et al., 2015), the mean over images.

    A text is the vector of its counts of n-grams of 1 to ``longest`` words, each weighted by the log of the inverse
    share of images whose references contain it (TF-IDF). A candidate's count is clipped to that of the reference, and
    texts of different lengths are penalized by a Gaussian with a standard deviation of ``sigma`` words. As in the
    authors' code counts are not divided by the length of the text. The value for a single image is 0, as all inverse
    shares are 1.

    Args:
        candidates: one for each image.
        references: at least one for each image.

    Raises:
        SettingError: no candidate, another number of candidates than images, or an image without reference.
    """
    _check(candidates, references, "CIDEr-D")
    candidate_ngrams = [_ngrams(text, longest) for text in candidates]
    reference_ngrams = [[_ngrams(text, longest) for text in texts] for texts in references]
    images_with = Counter(ngram for texts in reference_ngrams for ngram in set().union(*texts))

    def vector(counts: Mapping[_Ngram, int]) -> _Vector:
        rarity = {ngram: math.log(len(candidates) / max(1, images_with[ngram])) for ngram in counts}
        weights = {ngram: count * rarity[ngram] for ngram, count in counts.items()}
        norms = [math.hypot(*(w for ngram, w in weights.items() if len(ngram) == n)) for n in range(1, longest + 1)]
        return _Vector(weights, norms, _count_words(counts))

    scores = []
    for counts, texts in zip(candidate_ngrams, reference_ngrams, strict=True):
        candidate = vector(counts)
        scores += [math.fsum(_cosine(candidate, vector(text), sigma) for text in texts) / len(texts)]
    return 10 * math.fsum(scores) / len(scores)


_Ngram = tuple[str, ...]


@dataclass(frozen=True)
class _Vector:
    weights: Mapping[_Ngram, float]
    norms: Sequence[float]  # of the weights of n-grams of 1, 2, … words
    words: int


def _ngrams(text: str, longest: int) -> Counter[_Ngram]:
    """Counts the n-grams of 1 to ``longest`` words."""
    tokens = words(text)
    return Counter(tuple(tokens[i : i + n]) for n in range(1, longest + 1) for i in range(len(tokens) - n + 1))


def _count_words(counts: Mapping[_Ngram, int]) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 1)


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]], name: str) -> None:
    if not candidates or len(candidates) != len(references) or not all(references):
        raise SettingError(f"{name}: one candidate and at least one reference are needed for every image")


def _cosine(candidate: _Vector, reference: _Vector, sigma: float) -> float:
    """Returns the mean over lengths of n-grams of the cosine with clipped counts, penalized by length: in [0, 1]."""
    product = [0.0] * len(candidate.norms)
    for ngram, weight in candidate.weights.items():
        other = reference.weights.get(ngram, 0.0)
        product[len(ngram) - 1] += min(weight, other) * other
    norms = (a * b for a, b in zip(candidate.norms, reference.norms, strict=True))
    cosine = math.fsum(p / norm for p, norm in zip(product, norms, strict=True) if norm > 0) / len(product)
    return cosine * math.exp(-((candidate.words - reference.words) ** 2) / (2 * sigma**2))


def words(text: str) -> list[str]:
    """Splits into lower-case words without punctuation; hyphens and apostrophes within a word are part of it."""
    return re.findall(r"\w+(?:[-']\w+)*", text.lower())
