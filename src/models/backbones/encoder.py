"""The interface of every encoder that is evaluated, exported or fine-tuned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """The features of a batch of images, clips, or samples of any other modality that has a grid of vectors."""

    embedding: Tensor  # [B, D], one vector a sample
    patches: Tensor  # [B, N, D], one vector a position of the grid, in raster order
    # Size of each axis of the grid, N in all: (rows, columns) of an image, (times, rows, columns) of a clip, (times,)
    # of audio or text, (depths, rows, columns) of a volume.
    grid: tuple[int, ...]
    class_tokens: Tensor | None = None  # [B, L, D], class tokens after each of the last L blocks, see `Encoder`


class Encoder(nn.Module, ABC):
    """Computes `Features`. Evaluation, export and fine-tuning know no more of an encoder than this; a subclass adapts a
    library's network to it (`ImageEncoder` the image models of timm).

    Attributes:
        backbone: the network whose weights are the encoder's. Checkpoints note where it lies in the method.
        last_blocks: number of last blocks whose class tokens `Features.class_tokens` holds; 0 for none. Encoders
            without class tokens ignore it.
    """

    backbone: nn.Module
    last_blocks: int = 0

    @property
    @abstractmethod
    def dim(self) -> int:
        """D, the width of embedding and patches."""

    @abstractmethod
    def forward(self, x: Tensor) -> Features:
        """Computes the features of a batch, normalized as the DataModule says: images [B, 3, H, W], clips
        [B, T, 3, H, W]."""
