"""A method that says what it sees, judged by what people, or the scenes, say of the same images."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torchmetrics.functional.text import bleu_score

from src.collectives import gather_rows
from src.datamodules.datamodule import DataModule
from src.datamodules.extras.captions import CaptionedSource
from src.datamodules.sources.source import Split
from src.errors import SettingError
from src.evaluation.features import autocast
from src.evaluation.run import readable
from src.models.functional import inference
from src.randomness import seeded


@runtime_checkable
class Captioner(Protocol):
    """What a method must answer to be judged here."""

    def caption(self, image: Tensor, *, start: int, end: int, length: int, beams: int = 1) -> Tensor:
        """Token ids int64 [B, length] of images [B, 3, H, W]: ``start``, words, and ``end`` up to the end."""
        ...


@dataclass(frozen=True)
class CaptionEvaluation:
    """``captions_bleu4`` (0 to 1) and ``captions_cider`` (CIDEr-D, 0 to 10) of what a method says of held-out images,
    by the texts that the source has for judging. Papers write both times 100.

    Texts are lower-cased words without punctuation. COCO's server cuts them by rules of its own that are much the same,
    and may find slightly different numbers.

    Args:
        samples: images at most, a fixed random choice; None for all.
        beams: captions followed at a time; 1 takes the likeliest token each time.
        split: "val" or "test".
    """

    samples: int | None = 1000
    beams: int = 1
    split: Split = "val"

    def __call__(
        self, module: nn.Module, datamodule: DataModule, device: torch.device, *, precision: str = "32-true"
    ) -> dict[str, float]:
        """
        Args:
            module: has `Captioner`'s method; left in the modes it was in.

        Raises:
            SettingError: the method says nothing of an image, or the tokenizer has no token that begins a text or none
                that ends it.
        """
        if not isinstance(module, Captioner):
            raise SettingError(f"captions need a method that writes them, which {type(module).__name__} does not")
        captioner: Captioner = module
        tokenizer = datamodule.tokenizer
        start, end = tokenizer.start, tokenizer.end
        if start is None or end is None:
            raise SettingError("data.tokenizer: captions need one that marks where a text begins and ends")
        found = []
        with seeded(0), inference(module), autocast(precision, device):
            for batch in readable(datamodule, self.split, self.samples, device):
                said = captioner.caption(
                    batch["image"], start=start, end=end, length=tokenizer.length, beams=self.beams
                )
                found.append((said, batch["index"]))
        said, index = (gather_rows(torch.cat(column)) for column in zip(*found, strict=True))
        order = index.argsort()
        source = datamodule.test_source if self.split == "test" else datamodule.val_source
        assert isinstance(source, CaptionedSource)
        candidates = tokenizer.decode(said[order])
        references = [source.captions(position) for position in index[order].tolist()]
        return {
            "captions_bleu4": bleu4(candidates, references),
            "captions_cider": cider_d(candidates, references),
        }


def bleu4(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of up to four words (Papineni et al., 2002) over all texts together, each with its references."""
    cut = [[" ".join(words(text)) for text in each] for each in references]
    return bleu_score([" ".join(words(text)) for text in candidates], cut).item()


def cider_d(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, longest: int = 4, sigma: float = 6.0
) -> float:
    """CIDEr-D (Vedantam et al., 2015), the mean over images.

    Texts are compared as vectors of how often runs of 1 to ``longest`` words occur, each times the logarithm of one
    over the share of images whose references have it. What a candidate has more often than the reference counts as
    often as there, and texts of other lengths count for less, by a Gaussian of deviation ``sigma`` words. As in the
    authors' code the counts are not divided by the text's length. A single image has the value 0: its words say
    nothing that others' do not.

    Args:
        candidates: one an image.
        references: of each image at least one.

    Raises:
        ValueError: no candidate, not as many candidates as images, or an image without reference.
    """
    if not candidates or len(candidates) != len(references) or not all(references):
        raise ValueError("CIDEr-D: as many candidates as pictures, and every picture needs a reference")
    said = [_runs(text, longest) for text in candidates]
    heard = [[_runs(text, longest) for text in each] for each in references]
    pictures = Counter(run for each in heard for run in set().union(*each))

    def vector(runs: Mapping[_Run, int]) -> _Vector:
        rarity = {run: math.log(len(candidates) / max(1, pictures[run])) for run in runs}
        weights = {run: count * rarity[run] for run, count in runs.items()}
        norms = [math.hypot(*(w for run, w in weights.items() if len(run) == n)) for n in range(1, longest + 1)]
        return _Vector(weights, norms, sum(count for run, count in runs.items() if len(run) == 1))

    scores = []
    for runs, others in zip(said, heard, strict=True):
        mine = vector(runs)
        scores += [math.fsum(_likeness(mine, vector(other), sigma) for other in others) / len(others)]
    return 10 * math.fsum(scores) / len(scores)


_Run = tuple[str, ...]


@dataclass(frozen=True)
class _Vector:
    weights: Mapping[_Run, float]
    norms: Sequence[float]  # of the weights of runs of 1, 2, … words
    words: int


def _runs(text: str, longest: int) -> Counter[_Run]:
    """How often each run of 1 to ``longest`` words occurs."""
    cut = words(text)
    return Counter(tuple(cut[i : i + n]) for n in range(1, longest + 1) for i in range(len(cut) - n + 1))


def _likeness(candidate: _Vector, reference: _Vector, sigma: float) -> float:
    """The mean over lengths of runs of the cosine, clipped to what the reference has: in [0, 1]."""
    product = [0.0] * len(candidate.norms)
    for run, weight in candidate.weights.items():
        other = reference.weights.get(run, 0.0)
        product[len(run) - 1] += min(weight, other) * other
    norms = (a * b for a, b in zip(candidate.norms, reference.norms, strict=True))
    cosine = math.fsum(p / norm for p, norm in zip(product, norms, strict=True) if norm > 0) / len(product)
    return cosine * math.exp(-((candidate.words - reference.words) ** 2) / (2 * sigma**2))


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; hyphens and apostrophes within one belong to it."""
    return re.findall(r"\w+(?:[-']\w+)*", text.lower())
