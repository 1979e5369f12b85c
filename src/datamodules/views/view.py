"""Views: what samples of a source become in a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from src.datamodules.decoding import EncodedImage
from src.datamodules.sources.source import Sample


class View(ABC):
    """Turns samples into rows of a batch.

    All randomness comes in as ``uniform``, ``num_uniforms`` numbers in [0, 1) for each sample, so a view is a pure
    function. Image tensors leave it as uint8; the DataModule normalizes them on the device.
    """

    batch_type: ClassVar[type]  # TypedDict of src.datamodules.batches
    needs_flow: ClassVar[bool] = False  # reads the optical flow of videos

    @property
    @abstractmethod
    def num_uniforms(self) -> int:
        """Random numbers needed for one sample."""

    @property
    def rows(self) -> int:
        """Rows of a batch that one sample becomes."""
        return 1

    @property
    def fields(self) -> Sequence[str]:
        """Ground truth that samples must have in ``fields``."""
        return ()

    def check_channels(self, channels: int) -> None:
        """Checks that the view can change images of ``channels``.

        Raises:
            SettingError: an operator needs RGB; the message names it.
        """
        del channels  # cropping and resizing do not ask for them

    @abstractmethod
    def from_sample(self, sample: Sample, uniform: np.ndarray) -> dict[str, Tensor]:
        """Makes the rows of one sample: fields without batch axis, or with one of size ``rows`` if that is above 1.

        Args:
            sample: of a source.
            uniform: [num_uniforms] in [0, 1).

        Raises:
            BadSample: the image or video cannot be read, or its ground truth does not fit it.
        """

    def collate(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Stacks samples to a batch."""
        return stack(rows)


class ImageView(View):
    """A view of images, encoded or decoded."""

    @abstractmethod
    def from_encoded(self, image: EncodedImage, uniform: np.ndarray) -> dict[str, Tensor]:
        """Makes the row of one encoded image, uniform [num_uniforms]. Raises BadSample."""

    @abstractmethod
    def from_decoded(self, images: Tensor, uniform: np.ndarray) -> dict[str, Tensor]:
        """Makes the batch of images of one size, uint8 [B, C, H, W], uniform [B, num_uniforms]."""

    def from_sample(self, sample: Sample, uniform: np.ndarray) -> dict[str, Tensor]:
        image = sample["image"]
        if isinstance(image, EncodedImage):
            return self.from_encoded(image, uniform)
        assert isinstance(image, Tensor)  # the DataModule refuses videos
        return {name: value[0] for name, value in self.from_decoded(image[None], uniform[None]).items()}


def stack(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks the fields of samples along a new first axis."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
