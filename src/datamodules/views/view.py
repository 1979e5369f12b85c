"""What a sample becomes: the interface between a source's pictures and a method's batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from src.datamodules.decoding import EncodedImage


class View(Protocol):
    """Turns pictures into the tensors of a batch, image fields still uint8 (the DataModule normalises on the device).

    All randomness comes in as ``uniform``, one row of ``draws`` numbers in [0, 1) a picture: a view is a pure function.
    """

    batch_type: type  # the TypedDict of src.datamodules.batch this view makes
    draws: int  # random numbers needed for one picture

    def encoded(self, image: EncodedImage, uniform: np.ndarray) -> dict[str, Tensor]:
        """One still undecoded picture, uniform [draws]. Raises BadSample."""
        ...

    def decoded(self, images: Tensor, uniform: np.ndarray) -> dict[str, Tensor]:
        """Pictures of one size at once: uint8 [B, 3, H, W], uniform [B, draws]."""
        ...


def stack(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of one picture each as one batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
