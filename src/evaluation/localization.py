"""Whether a method with two towers sees where the things are that a text names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.collectives import gather_rows
from src.datamodules.datamodule import DataModule
from src.datamodules.sources.source import Grounding, Split
from src.errors import SettingError
from src.evaluation.features import autocast
from src.evaluation.run import readable
from src.models.functional import inference
from src.randomness import seeded

_SEEN = 0.002  # share of an image that a thing must fill to be looked for


@runtime_checkable
class PatchTower(Protocol):
    """What a method must answer to be judged here."""

    def encode_patches(self, image: Tensor) -> Tensor:
        """Unit vectors of an image's positions: [B, rows, columns, E]."""
        ...

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor: ...


@runtime_checkable
class WordTower(Protocol):
    """What a method may answer besides, whose words are comparable with patches."""

    def encode_words(self, text: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors of a text's tokens: [B, L, E]."""
        ...


@runtime_checkable
class GroundedSource(Protocol):
    """A source that knows which objects the words of a text name."""

    def grounding(self, index: int) -> Grounding:
        """Returns a text of the image with the objects its words name, the same every time."""
        ...


@dataclass(frozen=True)
class Localization:
    """Each thing that an image's text names is looked for among the image's patches.

    A method that compares words with patches reads the whole text, and its map of a thing is the mean similarity of
    each patch with the words that name it, less their article. Of another one the map is the similarity of each patch,
    taken as if it were the image, with the vector of these words alone. Reports over all named things that fill at
    least 0.2 % of the image

    - ``localization_pointing``: how often the middle of the patch with the highest similarity lies on the thing, the
      pointing game (Zhang et al., 2016); of patches that tie, the first
    - ``localization_chance``: how often that of a patch drawn at random does
    - ``localization_iou``: intersection over union of the thing and what ``threshold`` leaves of the map

    Args:
        samples: images at most, a fixed random choice; None for all.
        split: "val" or "test".
        threshold: of a map that runs from 0, its smallest value, to 1, its greatest, and is brought to the image's
            size by interpolation.
    """

    samples: int | None = 1000
    split: Split = "val"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise SettingError(f"Localization: threshold must be in (0, 1], got {self.threshold}")

    def __call__(
        self, module: nn.Module, datamodule: DataModule, device: torch.device, *, precision: str = "32-true"
    ) -> dict[str, float]:
        """
        Args:
            module: a `PatchTower`; left in the modes it was in.

        Raises:
            SettingError: it is none, the source does not know where things are, or there is none to be looked for.
        """
        source = datamodule.test_source if self.split == "test" else datamodule.val_source
        if not isinstance(module, PatchTower):
            raise SettingError(f"localization needs patches beside texts, which {type(module).__name__} does not give")
        if not isinstance(source, GroundedSource):
            raise SettingError(
                f"data.source: {type(source).__name__} does not know what its texts' words name; scenes do"
            )
        found = [torch.zeros(0, 3, device=device)]
        with seeded(0), inference(module), autocast(precision, device):
            for batch in readable(datamodule, self.split, self.samples, device):
                things = _Things.named(source, batch["index"].tolist(), datamodule)
                if not things.masks:
                    continue
                words = _words(module, things, datamodule, device)
                patches = module.encode_patches(batch["image"]).float()[things.owner]
                maps = torch.einsum("sijd,sd->sij", patches, words)
                found.append(self._judge(maps, torch.stack(things.masks).to(device)))
        rows = gather_rows(torch.cat(found))
        if len(rows) == 0:
            raise SettingError("data.source: no text names a thing that is seen")
        means = rows.double().mean(dim=0).tolist() if device.type != "mps" else rows.mean(dim=0).tolist()
        return dict(zip(("localization_pointing", "localization_chance", "localization_iou"), means, strict=True))

    def _judge(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Maps [S, h, w] and masks, float in [0, 1] [S, H, W] -> hit, chance and intersection over union [S, 3]."""
        middles = F.interpolate(masks[:, None], size=maps.shape[-2:], mode="nearest-exact").flatten(1) > 0.5
        hit = middles.gather(1, maps.flatten(1).argmax(dim=1, keepdim=True))[:, 0]
        low, high = maps.flatten(1).aminmax(dim=1)
        soft = (maps - low[:, None, None]) / (high - low).clamp(min=1e-12)[:, None, None]
        full = F.interpolate(soft[:, None], size=masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        said, true = full >= self.threshold, masks > 0.5
        iou = (said & true).flatten(1).sum(dim=1) / (said | true).flatten(1).sum(dim=1)
        return torch.stack([hit.float(), middles.float().mean(dim=1), iou], dim=1)


@dataclass(frozen=True)
class _Things:
    """What the texts of a batch name and the images show."""

    texts: list[str]  # of the images
    owner: list[int]  # of each thing, its image's row
    spans: list[tuple[int, int]]  # of each thing, which characters of the image's text name it
    masks: list[Tensor]  # of each thing, float [H, W] in [0, 1]

    @staticmethod
    def named(source: GroundedSource, index: Sequence[int], datamodule: DataModule) -> _Things:
        things = _Things([], [], [], [])
        for row, position in enumerate(index):
            grounding = source.grounding(position)
            things.texts.append(grounding.text)
            masks = datamodule.view_masks(grounding.masks)
            for begin, end, thing in grounding.spans:
                if masks[thing].mean() >= _SEEN and (masks[thing] > 0.5).any():
                    things.owner.append(row)
                    things.spans.append((begin, end))
                    things.masks.append(masks[thing])
        return things


def _words(module: PatchTower, things: _Things, datamodule: DataModule, device: torch.device) -> Tensor:
    """One vector for the words that name each thing: [S, E]."""
    tokenizer = datamodule.tokenizer
    if not isinstance(module, WordTower):
        phrases = [things.texts[row][begin:end] for row, (begin, end) in zip(things.owner, things.spans, strict=True)]
        ids, mask = tokenizer(phrases)
        return module.encode_text(ids.to(device), mask.to(device)).float()
    ids, mask = tokenizer(things.texts)
    words = module.encode_words(ids.to(device), mask.to(device)).float()[things.owner]
    places, spans = tokenizer.character_spans(things.texts)[things.owner], torch.tensor(things.spans)
    named = ((places[..., 0] < spans[:, 1:]) & (places[..., 1] > spans[:, :1])).to(words)
    return (words * named[:, :, None]).sum(dim=1) / named.sum(dim=1, keepdim=True).clamp(min=1)
