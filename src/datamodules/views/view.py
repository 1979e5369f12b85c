"""What a sample becomes: the interface between a source's images and a method's batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class EncodedView(Protocol):
    """Turns what is still in its file's bytes into the tensors of a batch, image fields still uint8 (the DataModule
    normalizes on the device).

    All randomness comes in as ``uniform``, one row of ``draws`` numbers in [0, 1) a sample: a view is a pure function.
    """

    @property
    def batch_type(self) -> type:
        """The TypedDict of src.datamodules.batch this view makes."""
        ...

    @property
    def draws(self) -> int:
        """Random numbers needed for one sample."""
        ...

    def encoded(self, image: Any, uniform: np.ndarray) -> dict[str, Tensor]:
        """One image (`EncodedImage`) or video (`VideoReader`), uniform [draws]. Raises BadSample."""
        ...


class View(EncodedView, Protocol):
    """An `EncodedView` of images, which may also be decoded already."""

    def decoded(self, images: Tensor, uniform: np.ndarray) -> dict[str, Tensor]:
        """Images of one size at once: uint8 [B, 3, H, W], uniform [B, draws]."""
        ...


def stack(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of one image each as one batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
