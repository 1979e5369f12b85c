"""Localization: the similarity of patches and words points at the objects that a caption names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from src.collectives import gather_rows
from src.datamodules.datamodule import DataModule
from src.datamodules.sources.source import Grounding
from src.datamodules.text.tokenizer import Tokenizer
from src.errors import SettingError
from src.evaluation.errors import BadFeatures, NotApplicable
from src.evaluation.image_text import encoding, tokenizer_of
from src.evaluation.subject import Subject

_SMALLEST = 0.002  # share of an image that an object must fill to be looked for


@runtime_checkable
class PatchTower(Protocol):
    """A method that encodes patches and texts as vectors of one space."""

    def encode_patches(self, image: Tensor) -> Tensor:
        """Returns unit vectors of the patches: [B, rows, columns, E]."""
        ...

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor: ...


@runtime_checkable
class WordTower(Protocol):
    """A method that also encodes the tokens of a text, in the space of its patches."""

    def encode_words(self, text: Tensor, mask: Tensor) -> Tensor:
        """Returns unit vectors of the tokens: [B, L, E]."""
        ...


@runtime_checkable
class GroundedSource(Protocol):
    """A source that knows which objects the words of a text name."""

    def grounding(self, index: int) -> Grounding:
        """Returns a text of the image with the objects its words name, the same every time."""
        ...


@dataclass(frozen=True)
class Localization:
    """Looks for each object that an image's caption names among the patches of the image, by a map of similarities.

    A `WordTower` reads the whole caption, and the map of an object is the mean similarity of each patch with the words
    that name it, without the article. For other methods the map is the similarity of each patch, projected as if it
    were the image, with the text of these words alone. Reports over all named objects that fill at least 0.2 % of the
    image

    - ``localization_pointing``: share of objects on which the center of the most similar patch lies, the pointing game
      (Zhang et al., 2016); of equal patches the first
    - ``localization_chance``: the same of a patch drawn at random
    - ``localization_iou``: intersection over union of the object and the thresholded map

    Args:
        samples: number of images at most, besides the subject's own limit; None for no further limit.
        threshold: of the map, scaled from 0, its smallest value, to 1, its greatest, and interpolated to the image's
            size.
    """

    samples: int | None = None
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise SettingError(f"Localization: threshold must be in (0, 1], got {self.threshold}")

    def __call__(self, subject: Subject) -> dict[str, float]:
        module, source, device = subject.module, subject.source, subject.device
        if not isinstance(module, PatchTower):
            raise NotApplicable(
                f"a method that encodes patches and texts is needed, which {type(module).__name__} is not"
            )
        if not isinstance(source, GroundedSource):
            raise NotApplicable(
                f"captions whose words name objects with masks are needed, which scenes have and "
                f"{type(source).__name__} (data.source) does not"
            )
        tokenizer = tokenizer_of(subject)
        parts = [torch.zeros(0, 3, device=device)]
        with encoding(subject):
            for batch in subject.batches(self.samples):
                objects = _Objects.named(source, batch["index"].tolist(), subject.datamodule)
                if not objects.masks:
                    continue
                words = _words(module, objects, tokenizer, device)
                patches = module.encode_patches(batch["image"]).float()[objects.owner]
                maps = torch.einsum("sijd,sd->sij", patches, words)
                parts.append(self._scores(maps, torch.stack(objects.masks).to(device)))
        rows = gather_rows(torch.cat(parts))
        if len(rows) == 0:
            raise NotApplicable("no caption names an object that is visible (data.source)")
        bad = ~torch.isfinite(rows).all(dim=1)
        if bad.any():
            raise BadFeatures(
                f"similarities of patches and words are NaN or infinite for {int(bad.sum())} of {len(bad)}"
            )
        means = rows.double().mean(dim=0).tolist() if device.type != "mps" else rows.mean(dim=0).tolist()
        return dict(zip(("localization_pointing", "localization_chance", "localization_iou"), means, strict=True))

    def _scores(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Returns hit, chance and intersection over union [S, 3] of maps [S, h, w] and masks, float in [0, 1]
        [S, H, W]; NaN for a map that is not finite."""
        finite = torch.isfinite(maps).flatten(1).all(dim=1)
        centers = F.interpolate(masks[:, None], size=maps.shape[-2:], mode="nearest-exact").flatten(1) > 0.5
        hit = centers.gather(1, maps.flatten(1).argmax(dim=1, keepdim=True))[:, 0]
        low, high = maps.flatten(1).aminmax(dim=1)
        soft = (maps - low[:, None, None]) / (high - low).clamp(min=1e-12)[:, None, None]
        full = F.interpolate(soft[:, None], size=masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        predicted, true = full >= self.threshold, masks > 0.5
        iou = (predicted & true).flatten(1).sum(dim=1) / (predicted | true).flatten(1).sum(dim=1)
        scores = torch.stack([hit.float(), centers.float().mean(dim=1), iou], dim=1)
        return scores.masked_fill(~finite[:, None], torch.nan)


@dataclass(frozen=True)
class _Objects:
    """The objects that the captions of a batch name and the images show."""

    texts: list[str]  # of each image
    owner: list[int]  # of each object, the row of its image
    spans: list[tuple[int, int]]  # of each object, the characters of the caption that name it
    masks: list[Tensor]  # of each object, float [H, W] in [0, 1]

    @staticmethod
    def named(source: GroundedSource, index: Sequence[int], datamodule: DataModule) -> _Objects:
        objects = _Objects([], [], [], [])
        for row, position in enumerate(index):
            grounding = source.grounding(position)
            objects.texts.append(grounding.text)
            masks = datamodule.view_masks(grounding.masks)
            for begin, end, number in grounding.spans:
                if masks[number].mean() >= _SMALLEST and (masks[number] > 0.5).any():
                    objects.owner.append(row)
                    objects.spans.append((begin, end))
                    objects.masks.append(masks[number])
        return objects


def _words(module: PatchTower, objects: _Objects, tokenizer: Tokenizer, device: torch.device) -> Tensor:
    """Returns one vector of the words that name each object: [S, E]."""
    if not isinstance(module, WordTower):
        phrases = [
            objects.texts[row][begin:end] for row, (begin, end) in zip(objects.owner, objects.spans, strict=True)
        ]
        ids, mask = tokenizer(phrases)
        return module.encode_text(ids.to(device), mask.to(device)).float()
    ids, mask = tokenizer(objects.texts)
    words = module.encode_words(ids.to(device), mask.to(device)).float()[objects.owner]
    places, spans = tokenizer.character_spans(objects.texts)[objects.owner], torch.tensor(objects.spans)
    named = ((places[..., 0] < spans[:, 1:]) & (places[..., 1] > spans[:, :1])).to(words)
    return (words * named[:, :, None]).sum(dim=1) / named.sum(dim=1, keepdim=True).clamp(min=1)
