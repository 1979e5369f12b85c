"""Video object segmentation without training: masks are propagated to similar patches of later frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.collectives import gather_rows, rank, world_size
from src.datamodules.channels import to_channels
from src.datamodules.sources.source import Sample, Split
from src.datamodules.video_reader import VideoReader
from src.errors import SettingError
from src.evaluation.errors import BadFeatures, NotApplicable
from src.evaluation.evaluation import EncoderEvaluation
from src.evaluation.features import autocast, weight_dtype
from src.evaluation.masks import boundary_f, jaccard
from src.evaluation.subject import Subject, exact_products
from src.models.functional import inference

_ROWS = 30  # rows of patches of 16 pixels in DAVIS at 480 pixels, for which the default radius was chosen
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
class LabelPropagation(EncoderEvaluation):
    """Video object segmentation as in Emerging Properties in Self-Supervised Vision Transformers (Caron et al., 2021),
    after Jabri et al. (2020), on videos with masks.

    The masks of the first frame are propagated from frame to frame: every patch takes the labels of the ``neighbors``
    most similar patches in the first frame and in the ``context`` frames before it, among those near its own position,
    with weight exp(cosine / temperature). Masks are enlarged bilinearly and each is scaled to [0, 1]; a pixel takes the
    label of the greatest.

    Reports as DAVIS does, without the first and the last frame: ``labelpropagation_j``, the mean over objects of the
    mean over frames of the intersection over union, ``labelpropagation_f``, the same of boundaries (see `boundary_f`),
    and their mean ``labelpropagation_jf``. Objects that are visible in the first frame are followed.

    An encoder of videos reads clips that repeat one frame. Each process takes its share of the videos, and all return
    the same.

    Args:
        films: makes the source of a split.
        context: number of frames before the current one, besides the first.
        neighbors: number of patches, in all of these frames together.
        radius: of the square neighborhood in patches, on a grid of 30 rows; on other grids in proportion. 0 for no
            limit.
        temperature: of the weights.
        batch_size: frames of a forward pass.

    Raises:
        NotApplicable: the source has no masks of videos, a video is too short, or no object is visible in a first
        frame.
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

    def by_encoder(self, subject: Subject) -> dict[str, dict[str, float]]:
        source = self.films(subject.split)
        if not isinstance(source, TrackedSource):
            raise NotApplicable(f"videos with masks are needed, which films have and {type(source).__name__} does not")
        scores: dict[str, list[tuple[float, float]]] = {name: [] for name in subject.encoders}
        for index in range(rank(), len(source), world_size()):
            masks = source.masks(index)
            masks = masks[:, masks[0].any(dim=(1, 2))]
            if len(masks) < 3:
                raise NotApplicable(
                    f"videos of at least 3 frames are needed, and {source.name(index)} has {len(masks)}"
                )
            if masks.shape[1] == 0:
                continue
            frames = _frames(source[index]["image"], len(masks))
            for name, encoder in subject.encoders.items():
                features, grid = self._features(encoder, frames, subject)
                if not torch.isfinite(features).all():
                    raise BadFeatures(f"the encoder '{name}' gives NaN or infinite features for {source.name(index)}")
                scores[name] += _scores(self.follow(features, grid, masks[0].to(subject.device)).cpu(), masks)
        return {name: _means(of_objects, subject.device) for name, of_objects in scores.items()}

    @torch.no_grad()
    def follow(self, features: Tensor, grid: tuple[int, int], masks: Tensor) -> Tensor:
        """Labels each pixel of every frame: int64 [F, H, W], 0 for background, 1 + t for object t.

        Args:
            features: of patches, float32 [F, N, D].
            grid: rows and columns of patches, N in all.
            masks: of the first frame, bool [T, H, W], disjoint.
        """
        objects, height, width = masks.shape
        segments = (masks * torch.arange(1, objects + 1, device=masks.device)[:, None, None]).sum(dim=0)
        # a patch of the first frame has the label of its center
        small = F.interpolate(segments[None, None].float(), grid, mode="nearest-exact")[0, 0].long()
        first = F.one_hot(small.flatten(), 1 + objects).to(features.dtype)
        with exact_products():
            labels = self.propagate(F.normalize(features, dim=2), grid, first)
        frames = [segments]
        for label in labels[1:]:  # a frame at a time, which bounds memory
            soft = F.interpolate(label.T.unflatten(1, grid)[None], (height, width), mode="bilinear")[0]
            frames.append(_scaled(soft).argmax(dim=0))
        return torch.stack(frames)

    def propagate(self, features: Tensor, grid: tuple[int, int], first: Tensor) -> Tensor:
        """Propagates the shares of labels to the patches of all frames: [F, N, C].

        Args:
            features: of unit length, [F, N, D].
            grid: rows and columns of patches.
            first: of the first frame's patches, [N, C].
        """
        radius = max(1, round(self.radius * grid[0] / _ROWS)) if self.radius else max(grid)
        near = neighborhood(grid, radius, features.device)
        labels = [first]
        for frame in range(1, len(features)):
            context = [0, *range(max(1, frame - self.context), frame)]
            keys, key_labels = features[context].flatten(0, 1), torch.cat([labels[number] for number in context])
            parts = []
            for target, allowed in zip(features[frame].split(_TARGETS), near.split(_TARGETS), strict=True):
                similarity = (target @ keys.T).masked_fill(~allowed.repeat(1, len(context)), -torch.inf)
                # patches as similar as the last neighbor are neighbors too, so that their order does not matter
                nearest = similarity.topk(min(self.neighbors, similarity.shape[1]), dim=1).values
                similarity = similarity.masked_fill(similarity < nearest[:, -1:], -torch.inf)
                parts.append((similarity / self.temperature).softmax(dim=1) @ key_labels)
            labels.append(torch.cat(parts))
        return torch.stack(labels)

    def _features(self, encoder: nn.Module, frames: Tensor, subject: Subject) -> tuple[Tensor, tuple[int, int]]:
        """Computes the features of each frame, float32 [F, N, D], and the grid."""
        parts, datamodule = [], subject.datamodule
        with inference(encoder), autocast(subject.precision, subject.device):
            for part in frames.split(self.batch_size):
                pixels = to_channels(part, datamodule.channels).to(subject.device)
                images = datamodule.on_after_batch_transfer({"image": pixels}, 0)["image"]
                features = encoder(datamodule.as_input(images).to(weight_dtype(encoder)))
                # averages over the times of a clip that repeats one frame
                parts.append(features.patches.float().unflatten(1, (-1, *features.grid[-2:])).mean(dim=1).flatten(1, 2))
        return torch.cat(parts), (features.grid[-2], features.grid[-1])


def neighborhood(grid: tuple[int, int], radius: int, device: torch.device | None = None) -> Tensor:
    """Returns True for pairs of patches that are at most ``radius`` rows and columns apart: bool [N, N]."""
    rows, columns = (torch.arange(size, device=device) for size in grid)
    by_row, by_column = ((axis[:, None] - axis).abs() <= radius for axis in (rows, columns))
    return (by_row[:, None, :, None] & by_column[None, :, None, :]).flatten(2).flatten(0, 1)


def _frames(video: object, count: int) -> Tensor:
    """Reads all frames of a video: uint8 [F, 3, H, W]."""
    reader: VideoReader = video  # type: ignore[assignment]
    return reader.frames_at([number / reader.rate for number in range(count)])


def _scaled(soft: Tensor) -> Tensor:
    """Scales each label's shares to [0, 1], so that small shares still count: [C, H, W]; a label that occurs nowhere
    stays 0."""
    low, high = soft.amin(dim=(1, 2), keepdim=True), soft.amax(dim=(1, 2), keepdim=True)
    return torch.where(high > low, (soft - low) / (high - low).clamp(min=torch.finfo(soft.dtype).tiny), 0.0)


def _scores(predicted: Tensor, masks: Tensor) -> list[tuple[float, float]]:
    """Returns region and boundary scores of each object, means over all frames but the first and the last, for
    predictions int64 [F, H, W] and masks bool [F, T, H, W]."""
    segments, truth = predicted.numpy()[1:-1], masks.numpy()[1:-1]
    scores = []
    for number in range(truth.shape[1]):
        pairs = [(frame == number + 1, mask) for frame, mask in zip(segments, truth[:, number], strict=True)]
        scores.append(
            (float(np.mean([jaccard(*pair) for pair in pairs])), float(np.mean([boundary_f(*pair) for pair in pairs])))
        )
    return scores


def _means(scores: list[tuple[float, float]], device: torch.device) -> dict[str, float]:
    """Averages over the objects of all processes' videos."""
    of_objects = gather_rows(torch.tensor(scores, device=device).reshape(-1, 2)).cpu().double()
    if len(of_objects) == 0:
        raise NotApplicable("no object is visible in the first frame of a video")
    region, border = of_objects.mean(dim=0).tolist()
    return {
        "labelpropagation_jf": (region + border) / 2,
        "labelpropagation_j": region,
        "labelpropagation_f": border,
    }
