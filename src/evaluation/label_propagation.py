"""Following things through a film by the patches that resemble them, without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.collectives import gather_rows, rank, world_size
from src.datamodules.datamodule import DataModule
from src.datamodules.sources.source import Sample, Split
from src.datamodules.video_reader import VideoReader
from src.errors import SettingError
from src.evaluation.features import BadFeatures, autocast, weight_dtype
from src.evaluation.masks import boundary_f, jaccard
from src.evaluation.run import exact_products
from src.models.functional import inference

_ROWS = 30  # of patches of 16 in DAVIS at 480 pixels, where the neighborhood's size comes from
_TARGETS = 1024  # patches compared at a time


@runtime_checkable
class TrackedSource(Protocol):
    """A source of videos with the mask of each object in every frame."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def name(self, index: int) -> str: ...

    def masks(self, index: int) -> Tensor:
        """Returns the visible part of each object: bool [F, T, H, W], disjoint, in all F frames of the video at its
        `VideoReader.rate`."""
        ...


@dataclass(frozen=True)
class LabelPropagation:
    """Video object segmentation as in Emerging Properties in Self-Supervised Vision Transformers (Caron et al., 2021),
    after Jabri et al. (2020), on films whose masks are known.

    The first frame's masks are carried on from frame to frame: every patch takes the labels of the ``neighbors``
    patches most similar to it in the first frame and in the ``context`` frames before it, of those that are near its
    own place, with weight exp(cosine / temperature). Masks are enlarged bilinearly, each stretched to [0, 1], and a
    pixel goes to the greatest.

    Reports as DAVIS does, the first and the last frame left out: ``labelpropagation_j``, the mean over things of the
    mean over frames of the intersection over union, ``labelpropagation_f``, the same of boundaries (see `boundary_f`),
    and their mean ``labelpropagation_jf``. A thing is followed if it is seen in the first frame.

    Args:
        films: makes the source of a split.
        context: frames before the one to be labelled, besides the first.
        neighbors: of each patch, in all of these frames together.
        radius: of the square neighborhood in patches, on a grid of 30 rows; on others in proportion. 0 for all.
        temperature: of the weights.
        batch_size: frames in a forward pass.
    """

    films: Callable[[Split], TrackedSource]
    context: int = 7
    neighbors: int = 5
    radius: int = 12
    temperature: float = 0.1
    batch_size: int = 16

    def __post_init__(self) -> None:
        if min(self.context, self.radius) < 0 or min(self.neighbors, self.batch_size) < 1 or self.temperature <= 0:
            raise SettingError(
                "label propagation needs context and radius of at least 0, neighbors and batch_size of at least 1 and "
                f"a temperature above 0; got {self.context}, {self.radius}, {self.neighbors}, {self.batch_size} and "
                f"{self.temperature}"
            )

    def __call__(
        self,
        encoders: Mapping[str, nn.Module],
        datamodule: DataModule,
        device: torch.device,
        *,
        split: Split = "val",
        precision: str = "32-true",
    ) -> dict[str, dict[str, float]]:
        """Each process takes its share of the films, and all return the same.

        Args:
            encoders: by name, on ``device``; one that reads videos is shown clips in which the frame stands still.
            datamodule: whose normalization the encoders know.

        Raises:
            SettingError: the source has no masks of videos, a film is too short, or nothing is to be followed.
            BadFeatures: NaN or infinite features.
        """
        source = self.films(split)
        if not isinstance(source, TrackedSource):
            raise SettingError(f"label propagation: {type(source).__name__} has no masks of videos; films have")
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in encoders}
        for index in range(rank(), len(source), world_size()):
            masks = source.masks(index)
            masks = masks[:, masks[0].any(dim=(1, 2))]
            if len(masks) < 3:
                raise SettingError(
                    f"label propagation: the first and the last frame are not judged, and {source.name(index)} has "
                    f"{len(masks)}"
                )
            if masks.shape[1] == 0:
                continue
            frames = _frames(source[index]["image"], len(masks))
            for name, encoder in encoders.items():
                features, grid = self._features(encoder, frames, datamodule, device, precision)
                if not torch.isfinite(features).all():
                    raise BadFeatures(f"the encoder '{name}' gives NaN or infinite features of {source.name(index)}")
                found[name] += _fit(self.follow(features, grid, masks[0].to(device)).cpu(), masks)
        return {name: _means(each, device) for name, each in found.items()}

    @torch.no_grad()
    def follow(self, features: Tensor, grid: tuple[int, int], masks: Tensor) -> Tensor:
        """What each pixel of every frame belongs to: int64 [F, H, W], 0 for nothing, 1 + t for thing t.

        Args:
            features: of patches, float32 [F, N, D].
            grid: rows and columns of patches; N is their product.
            masks: of the first frame, bool [T, H, W], disjoint.
        """
        things, height, width = masks.shape
        segments = (masks * torch.arange(1, things + 1, device=masks.device)[:, None, None]).sum(dim=0)
        # a patch of the first frame is what its middle shows
        small = F.interpolate(segments[None, None].float(), grid, mode="nearest-exact")[0, 0].long()
        first = F.one_hot(small.flatten(), 1 + things).to(features.dtype)
        with exact_products():
            labels = self.propagate(F.normalize(features, dim=2), grid, first)
        found = [segments]
        for each in labels[1:]:  # a frame at a time: whole films of large masks need not fit
            soft = F.interpolate(each.T.unflatten(1, grid)[None], (height, width), mode="bilinear")[0]
            found.append(_stretched(soft).argmax(dim=0))
        return torch.stack(found)

    def propagate(self, features: Tensor, grid: tuple[int, int], first: Tensor) -> Tensor:
        """Shares of labels of all patches of all frames: [F, N, C].

        Args:
            features: of unit length, [F, N, D].
            grid: rows and columns of patches.
            first: of the first frame's patches, [N, C].
        """
        radius = max(1, round(self.radius * grid[0] / _ROWS)) if self.radius else max(grid)
        near = neighborhood(grid, radius, features.device)
        labels = [first]
        for frame in range(1, len(features)):
            seen = [0, *range(max(1, frame - self.context), frame)]
            keys, known = features[seen].flatten(0, 1), torch.cat([labels[each] for each in seen])
            parts = []
            for target, places in zip(features[frame].split(_TARGETS), near.split(_TARGETS), strict=True):
                similarity = (target @ keys.T).masked_fill(~places.repeat(1, len(seen)), -torch.inf)
                # what ties with the last neighbor is one too, so that no order decides
                nearest = similarity.topk(min(self.neighbors, similarity.shape[1]), dim=1).values
                similarity = similarity.masked_fill(similarity < nearest[:, -1:], -torch.inf)
                parts.append((similarity / self.temperature).softmax(dim=1) @ known)
            labels.append(torch.cat(parts))
        return torch.stack(labels)

    def _features(
        self, encoder: nn.Module, frames: Tensor, datamodule: DataModule, device: torch.device, precision: str
    ) -> tuple[Tensor, tuple[int, int]]:
        """Of every frame alone: float32 [F, N, D], and the grid."""
        parts = []
        with inference(encoder), autocast(precision, device):
            for each in frames.split(self.batch_size):
                images = datamodule.on_after_batch_transfer({"image": each.to(device)}, 0)["image"]
                features = encoder(datamodule.as_input(images).to(weight_dtype(encoder)))
                # positions of a clip that stands still differ by their times alone
                parts.append(features.patches.float().unflatten(1, (-1, *features.grid[-2:])).mean(dim=1).flatten(1, 2))
        return torch.cat(parts), (features.grid[-2], features.grid[-1])


def neighborhood(grid: tuple[int, int], radius: int, device: torch.device | None = None) -> Tensor:
    """Which patches are at most ``radius`` rows and columns from which: bool [N, N]."""
    rows, columns = (torch.arange(size, device=device) for size in grid)
    by_row, by_column = ((each[:, None] - each).abs() <= radius for each in (rows, columns))
    return (by_row[:, None, :, None] & by_column[None, :, None, :]).flatten(2).flatten(0, 1)


def _frames(footage: object, count: int) -> Tensor:
    """All frames of a film: uint8 [F, 3, H, W]."""
    film: VideoReader = footage  # type: ignore[assignment]
    return film.frames_at([number / film.rate for number in range(count)])


def _stretched(soft: Tensor) -> Tensor:
    """Each label's shares from 0 to 1, so that one that has thinned out still counts: [C, H, W]; a label that is
    nowhere stays 0."""
    low, high = soft.amin(dim=(1, 2), keepdim=True), soft.amax(dim=(1, 2), keepdim=True)
    return torch.where(high > low, (soft - low) / (high - low).clamp(min=torch.finfo(soft.dtype).tiny), 0.0)


def _fit(predicted: Tensor, masks: Tensor) -> list[tuple[float, float]]:
    """Region and boundary of each thing, means over all frames but the first and the last: of predictions int64
    [F, H, W] and masks bool [F, T, H, W]."""
    segments, truth = predicted.numpy()[1:-1], masks.numpy()[1:-1]
    found = []
    for thing in range(truth.shape[1]):
        pairs = [(frame == thing + 1, mask) for frame, mask in zip(segments, truth[:, thing], strict=True)]
        found.append(
            (float(np.mean([jaccard(*pair) for pair in pairs])), float(np.mean([boundary_f(*p) for p in pairs])))
        )
    return found


def _means(found: list[tuple[float, float]], device: torch.device) -> dict[str, float]:
    """Over the things of all processes' films."""
    every = gather_rows(torch.tensor(found, device=device).reshape(-1, 2)).cpu().double()
    if len(every) == 0:
        raise SettingError("label propagation: nothing is seen in the first frame of any film")
    region, border = every.mean(dim=0).tolist()
    return {
        "labelpropagation_jf": (region + border) / 2,
        "labelpropagation_j": region,
        "labelpropagation_f": border,
    }
