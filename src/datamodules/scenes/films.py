"""Films of moving scenes as a source of videos, labeled by the action."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count as counting
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from src.datamodules.scenes import render
from src.datamodules.scenes.cache import Array, RenderedSet, image_arrays, open_or_build
from src.datamodules.scenes.motion import Film, MovingWorld, flow
from src.datamodules.scenes.source import SPLITS
from src.datamodules.sources.source import Prompts, Sample, Source, Split
from src.errors import SettingError
from src.randomness import fold


@dataclass(frozen=True)
class FilmReader:
    """A film of a fixed rate; see `VideoReader`.

    Args:
        frames: frame by number -> uint8 [3, H, W].
        count: number of frames.
        rate: frames per second.
        flows: frames by number -> float32 [T - 1, 2, H, W], from each to the next.
    """

    frames: Callable[[int], np.ndarray]
    count: int
    rate: float
    flows: Callable[[Sequence[int]], np.ndarray]

    @property
    def duration(self) -> float:
        return self.count / self.rate

    def frames_at(self, times: Sequence[float]) -> Tensor:
        numbers = self._numbers(times)
        frames = {number: self.frames(number) for number in set(numbers)}
        return torch.from_numpy(np.stack([frames[number] for number in numbers]))

    def flow(self, times: Sequence[float]) -> Tensor:
        """See `FlowFilmReader`; exact."""
        return torch.from_numpy(self.flows(self._numbers(times)))

    def _numbers(self, times: Sequence[float]) -> list[int]:
        return np.clip(np.floor(np.asarray(times) * self.rate + 1e-6).astype(int), 0, self.count - 1).tolist()


@dataclass(frozen=True)
class FilmFrames(RenderedSet):
    """All frames of the films of a `MovingWorld`."""

    frames: int
    rate: float

    @property
    def name(self) -> str:
        return f"films-{self.resolution}px-{self.count}"

    @property
    def arrays(self) -> dict[str, Array]:
        return image_arrays((self.frames, 3, self.resolution, self.resolution))

    def film(self, index: int) -> Film:
        """Returns the scene and motions of sample ``index``."""
        return self.world.film(self.seed, index)

    def render(self, index: int) -> tuple[np.ndarray, int]:
        film = self.film(index)
        return np.stack([self.frame(film, number) for number in range(self.frames)]), film.action

    def frame(self, film: Film, number: int) -> np.ndarray:
        """uint8 [3, H, W]."""
        return render.image(film.at(number / self.rate), self.resolution)

    def flows(self, film: Film, numbers: Sequence[int]) -> np.ndarray:
        """Returns the flow from each of the frames to the next one: float32 [T - 1, 2, H, W]."""
        pairs = [(start / self.rate, end / self.rate) for start, end in pairwise(numbers)]
        return np.stack([flow(film, start, end, self.resolution) for start, end in pairs])


@dataclass(frozen=True)
class FilmFramesWithout(FilmFrames):
    """`FilmFrames` without some actions: a film with one of them is replaced by another film."""

    held_out: tuple[int, ...]

    def film(self, index: int) -> Film:
        candidates = (self.world.film(fold(self.seed, again) if again else self.seed, index) for again in counting())
        return next(film for film in candidates if film.action not in self.held_out)


class FilmsSource(Source):
    """``count`` films of one split (one number, or one a split); the label is the action of the main object.

    The split is folded into the seed, so splits of any size share no film.

    Args:
        split: "train", "val" or "test".
        count: films.
        resolution: side of a frame in pixels.
        duration: of a film in seconds.
        rate: frames per second.
        seed: of the films.
        world: the distribution of the films.
        held_out: actions that no training film shows; the other splits show all, so that methods that recognize
            actions by their names can be evaluated on unseen ones.
        cache_dir: folder for all frames, rendered once; None renders every requested frame.

    Raises:
        SettingError: an unknown split or action, or a number out of range.
    """

    input_key: ClassVar[Literal["image", "video"]] = "video"
    has_flow = True
    prompts = Prompts(templates=("something {}.", "a thing that {}.", "it {}."), single="something {}.")

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
        held_out: Sequence[str] = (),
        cache_dir: str | Path | None = None,
    ) -> None:
        if split not in SPLITS:
            raise SettingError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        count = count if isinstance(count, int) else count[split]
        if count < 1 or resolution < 8 or seed < 0 or rate <= 0 or duration * rate < 1:
            raise SettingError(
                "films need count >= 1, resolution >= 8, seed >= 0 and at least one frame; got "
                f"{count}, {resolution}, {seed} and {duration} s of {rate} frames"
            )
        self.split = split
        self.world = world or MovingWorld()
        self.classes: tuple[str, ...] = tuple(self.world.actions)
        unknown = sorted(set(held_out) - set(self.classes))
        if unknown or set(held_out) == set(self.classes):
            raise SettingError(
                f"data.source.held_out: some of {', '.join(self.classes)}, not {', '.join(unknown) or 'all of them'}"
            )
        self.held_out = tuple(label for label, name in enumerate(self.classes) if name in held_out)
        self.films = FilmFrames(
            self.world, fold(seed, SPLITS.index(split)), count, resolution, max(1, round(duration * rate)), rate
        )
        if split == "train" and self.held_out:
            self.films = FilmFramesWithout(**vars(self.films), held_out=self.held_out)
        self.cache_dir = cache_dir
        self._open()

    def __len__(self) -> int:
        return self.films.count

    def __getitem__(self, index: int) -> Sample:
        if self._cached is None:
            film = self.film(index)
            flows = partial(self.films.flows, film)
            footage = FilmReader(partial(self.films.frame, film), self.films.frames, self.films.rate, flows)
            return {"image": footage, "label": film.action}
        self._check(index)
        frames, labels = self._cached
        flows = partial(self._flows, index)
        footage = FilmReader(frames[index].__getitem__, self.films.frames, self.films.rate, flows)
        return {"image": footage, "label": int(labels[index])}

    def name(self, index: int) -> str:
        """Returns a name such as "films/train/123"."""
        return f"films/{self.split}/{index}"

    def film(self, index: int) -> Film:
        """Returns the scene and motions of film ``index``."""
        self._check(index)
        return self.films.film(index)

    def _flows(self, index: int, numbers: Sequence[int]) -> np.ndarray:
        return self.films.flows(self.film(index), numbers)

    def masks(self, index: int) -> Tensor:
        """Returns the visible part of each object in all frames: bool [F, T, H, W], disjoint."""
        film = self.film(index)
        times = (number / self.films.rate for number in range(self.films.frames))
        return torch.from_numpy(
            np.stack([render.instance_masks(film.at(time), self.films.resolution) for time in times])
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the mapped arrays, because pickling would copy all frames."""
        return self.__dict__ | {"_cached": None, "labels": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self._cached = None if self.cache_dir is None else open_or_build(self.films, self.cache_dir)
        self.labels = None if self._cached is None else np.asarray(self._cached[1])

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"film {index} of {len(self)}")
