"""Parts that the formats of transformers share: names of weights, the image processor, loading a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModel
from transformers.models.bit import BitImageProcessor
from transformers.utils import logging as transformers_logging

from src.errors import UserError
from src.export.folder import quiet
from src.export.trained_model import TrainedModel

# names of a block's modules in `ViTModel` and `VideoMAEModel`, by timm's
VIT_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
VIT_QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value")


def rename_weights(
    state: Mapping[str, Tensor],
    *,
    names: Mapping[str, str],
    layers: str,
    block: Mapping[str, str],
    qkv: tuple[str, str, str],
    target: str,
) -> dict[str, Tensor]:
    """Renames the weights of a timm ViT and splits its fused query-key-value layers. The classifier is left out.

    Args:
        state: weights of the ViT, or a part of them.
        names: new names of tensors and modules outside of the blocks.
        layers: new name of the list of blocks.
        block: new names of a block's modules.
        qkv: names of the query, key and value layers.
        target: the model with the new names, for the message.

    Raises:
        UserError: a tensor has no new name.
    """
    weights: dict[str, Tensor] = {}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        inside = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        if name in names:
            weights[names[name]] = value
        elif module in names:
            weights[f"{names[module]}.{leaf}"] = value
        elif inside and inside[2] in block:
            weights[f"{layers}.{inside[1]}.{block[inside[2]]}.{leaf}"] = value
        elif inside and inside[2] == "attn.qkv":
            for part, third in zip(qkv, value.chunk(3), strict=True):
                weights[f"{layers}.{inside[1]}.{part}.{leaf}"] = third
        elif not name.startswith("head."):
            raise UserError(f"not exported: {target} has no parameter for '{name}': use format=timm")
    return weights


def load_folder(folder: Path) -> Any:
    """The model in ``folder`` as ``AutoModel`` loads it, in evaluation mode.

    Raises:
        UserError: weights are missing or left over.
    """
    transformers_logging.disable_progress_bar()
    with quiet("transformers"):
        model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    wrong = {kind: sorted(loading[kind]) for kind in ("missing_keys", "unexpected_keys") if loading[kind]}
    if wrong:
        raise UserError(f"not exported: transformers does not load all weights: {wrong}")
    return model.eval()


def image_processor(model: TrainedModel) -> BitImageProcessor:
    """The run's evaluation preprocessing: resize (or squeeze), center crop, normalize.

    Raises:
        UserError: transformers has no such preprocessing.
    """
    check_processor(model)
    height, width = (round(side / model.crop_share) for side in model.size)
    return BitImageProcessor(
        size={"height": height, "width": width} if model.squeezed else {"shortest_edge": height},
        crop_size={"height": model.size[0], "width": model.size[1]},
        resample=3,  # bicubic
        image_mean=model.mean,
        image_std=model.std,
    )


def check_processor(model: TrainedModel) -> None:
    """
    Raises:
        UserError: the image processors of transformers cannot prepare the run's images.
    """
    if model.channels != 3:
        raise UserError(
            f"not exported: the image processors of transformers read RGB, and this run's images have {model.channels} "
            "channels: use format=timm"
        )
    if model.size[0] != model.size[1] and not model.squeezed:
        raise UserError(
            f"not exported: the image processors of transformers crop squares, not {model.size[0]}x{model.size[1]} "
            "pixels: use format=timm"
        )
