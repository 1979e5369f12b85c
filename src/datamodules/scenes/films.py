"""Films of moving scenes as a source of videos: what happens is the label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from src.datamodules.scenes import render
from src.datamodules.scenes.motion import Film, MovingWorld
from src.datamodules.scenes.source import SPLITS
from src.datamodules.sources.source import Sample, Split
from src.errors import SettingError
from src.randomness import fold


@dataclass(frozen=True)
class FilmFootage:
    """A film, drawn when it is asked for; see `Footage`.

    Args:
        film: what happens.
        resolution: side of a frame in pixels.
        duration: seconds.
        rate: frames a second.
    """

    film: Film
    resolution: int
    duration: float
    rate: float

    def at(self, times: Sequence[float]) -> Tensor:
        last = max(0, round(self.duration * self.rate) - 1)
        numbers = np.clip(np.floor(np.asarray(times) * self.rate + 1e-6), 0, last)
        frames = {number: render.image(self.film.at(number / self.rate), self.resolution) for number in set(numbers)}
        return torch.from_numpy(np.stack([frames[number] for number in numbers]))


class FilmsSource:
    """``count`` films of one split (one number, or one a split); the label is what the main thing does.

    The split is folded into the seed, so no two splits share a film, whatever their sizes.

    Args:
        split: "train", "val" or "test".
        count: films.
        resolution: side of a frame in pixels.
        duration: of a film, seconds.
        rate: frames a second.
        seed: of the films.
        world: what there is to be seen.

    Raises:
        SettingError: an unknown split, or a number out of range.
    """

    def __init__(
        self,
        split: Split,
        *,
        count: int | Mapping[Split, int],
        resolution: int = 128,
        duration: float = 4.0,
        rate: float = 12.0,
        seed: int = 0,
        world: MovingWorld | None = None,
    ) -> None:
        if split not in SPLITS:
            raise SettingError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        count = count if isinstance(count, int) else count[split]
        if count < 1 or resolution < 8 or seed < 0 or rate <= 0 or duration * rate < 1:
            raise SettingError(
                "films need count >= 1, resolution >= 8, seed >= 0 and at least one frame; got "
                f"{count}, {resolution}, {seed} and {duration} s of {rate} frames"
            )
        self.split, self.count, self.resolution = split, count, resolution
        self.duration, self.rate = duration, rate
        self.world = world or MovingWorld()
        self.classes: tuple[str, ...] = tuple(self.world.actions)
        self._seed = fold(seed, SPLITS.index(split))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        film = self.film(index)
        return {"image": FilmFootage(film, self.resolution, self.duration, self.rate), "label": film.action}

    def name(self, index: int) -> str:
        """Such as "films/train/123"."""
        return f"films/{self.split}/{index}"

    def film(self, index: int) -> Film:
        """What happens in film ``index``, as data."""
        if not 0 <= index < self.count:
            raise IndexError(f"film {index} of {self.count}")
        return self.world.film(self._seed, index)
