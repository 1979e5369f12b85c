"""Weights of image and text towers in the files that others release: OpenAI's and open_clip's CLIP, and `CLIPModel` and
`SiglipModel` of transformers. They are renamed to the names of this project's methods with two towers, from which any
method can take its encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_IMAGE = "image_encoder.backbone."
_TEXT = "text_encoder.transformer."
_OPENAI_ONLY = ("input_resolution", "context_length", "vocab_size")  # numbers that open_clip does not store

# names of a block's layers: OpenAI's -> timm's, and transformers'
_BLOCK_OF_OPENAI = {
    "ln_1": ("norm1", "layer_norm1"),
    "ln_2": ("norm2", "layer_norm2"),
    "attn.out_proj": ("attn.proj", "self_attn.out_proj"),
    "mlp.c_fc": ("mlp.fc1", "mlp.fc1"),
    "mlp.c_proj": ("mlp.fc2", "mlp.fc2"),
}
# timm's names of an image tower -> transformers'
LAYERS_IN_TRANSFORMERS = {
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm_pre": "pre_layrnorm",  # spelled so in transformers
    "norm": "post_layernorm",
    "attn_pool.proj": "head.attention.out_proj",
    "attn_pool.norm": "head.layernorm",
    "attn_pool.mlp.fc1": "head.mlp.fc1",
    "attn_pool.mlp.fc2": "head.mlp.fc2",
}
BLOCK_IN_TRANSFORMERS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_LAYERS_OF_TRANSFORMERS = {theirs: ours for ours, theirs in LAYERS_IN_TRANSFORMERS.items()}
_BLOCK_OF_TRANSFORMERS = {theirs: ours for ours, theirs in BLOCK_IN_TRANSFORMERS.items()}


def with_own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adds the tensors of released towers under this project's names: ``image_encoder.backbone.``,
    ``text_encoder.transformer.``, ``image_projection.weight``, ``text_projection.weight``, ``logit_scale`` and
    ``logit_bias``. Returns tensors of anything else as they are.

    Args:
        tensors: by name, whatever stands before the names, such as "state_dict.module.".
    """
    layouts = {"visual.class_embedding": _from_openai, "text_model.final_layer_norm.weight": _from_transformers}
    for mark, layout in layouts.items():
        marked = next((name for name in tensors if name == mark or name.endswith(f".{mark}")), None)
        if marked is not None:
            prefix = marked.removesuffix(mark)
            inner = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            return layout(inner)
    return dict(tensors)


def stated_activation(tensors: Mapping[str, Tensor], path: Path) -> str | None:
    """Returns the name of the activation of released towers, None if their file does not say.

    Args:
        tensors: of the file, with its names. OpenAI's files hold three numbers beside the weights.
        path: of the file, beside which transformers writes a ``config.json``.
    """
    if all(any(name.split(".")[-1] == number for name in tensors) for number in _OPENAI_ONLY):
        return "quick_gelu"
    if path.with_name("config.json").is_file() and any("text_model.final_layer_norm" in name for name in tensors):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
        return str(config.vision_config.hidden_act)
    return None


def _from_openai(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own: dict[str, Tensor] = {}
    for name, value in tensors.items():
        tower = 0 if name.startswith("visual.") else 1
        inside = re.fullmatch(r"(?:visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
        if inside:
            number, layer, leaf = inside.groups()
            block = f"{_IMAGE}blocks.{number}." if tower == 0 else f"{_TEXT}encoder.layers.{number}."
            if layer != "attn.in_proj":
                own[f"{block}{_BLOCK_OF_OPENAI[layer][tower]}.{leaf}"] = value
            elif tower == 0:
                own[f"{block}attn.qkv.{leaf}"] = value
            else:
                for part, third in zip("qkv", value.chunk(3), strict=True):
                    own[f"{block}self_attn.{part}_proj.{leaf}"] = third
    layers = {
        "visual.conv1": f"{_IMAGE}patch_embed.proj",
        "visual.ln_pre": f"{_IMAGE}norm_pre",
        "visual.ln_post": f"{_IMAGE}norm",
        "token_embedding": f"{_TEXT}embeddings.token_embedding",
        "ln_final": f"{_TEXT}final_layer_norm",
    }
    for layer, new in layers.items():
        leaves = [leaf for leaf in ("weight", "bias") if f"{layer}.{leaf}" in tensors]
        own |= {f"{new}.{leaf}": tensors[f"{layer}.{leaf}"] for leaf in leaves}
    own[f"{_IMAGE}cls_token"] = tensors["visual.class_embedding"][None, None]
    own[f"{_IMAGE}pos_embed"] = tensors["visual.positional_embedding"][None]
    if "positional_embedding" in tensors:
        own[f"{_TEXT}embeddings.position_embedding.weight"] = tensors["positional_embedding"]
    for name, new in (("visual.proj", "image_projection"), ("text_projection", "text_projection")):
        if name in tensors:  # features are multiplied by them from the right
            own[f"{new}.weight"] = tensors[name].T
    return own | _scalars(tensors)


def _from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    text, image = "text_model.", "vision_model."
    own = {f"{_TEXT}{name.removeprefix(text)}": value for name, value in tensors.items() if name.startswith(text)}
    vision = {name.removeprefix(image): value for name, value in tensors.items() if name.startswith(image)}
    for name, value in vision.items():
        layer, _, leaf = name.rpartition(".")
        inside = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", layer)
        if layer in _LAYERS_OF_TRANSFORMERS:
            own[f"{_IMAGE}{_LAYERS_OF_TRANSFORMERS[layer]}.{leaf}"] = value
        elif inside and inside[2] in _BLOCK_OF_TRANSFORMERS:
            own[f"{_IMAGE}blocks.{inside[1]}.{_BLOCK_OF_TRANSFORMERS[inside[2]]}.{leaf}"] = value
        elif inside and inside[2] == "self_attn.q_proj":
            parts = [vision[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            own[f"{_IMAGE}blocks.{inside[1]}.attn.qkv.{leaf}"] = torch.cat(parts)
    if "embeddings.class_embedding" in vision:
        own[f"{_IMAGE}cls_token"] = vision["embeddings.class_embedding"][None, None]
    if "embeddings.position_embedding.weight" in vision:
        own[f"{_IMAGE}pos_embed"] = vision["embeddings.position_embedding.weight"][None]
    if "head.probe" in vision:
        own[f"{_IMAGE}attn_pool.latent"] = vision["head.probe"]
        for leaf in ("weight", "bias"):
            query, *key_value = vision[f"head.attention.in_proj_{leaf}"].chunk(3)
            own |= {f"{_IMAGE}attn_pool.q.{leaf}": query, f"{_IMAGE}attn_pool.kv.{leaf}": torch.cat(key_value)}
    for name, new in (("visual_projection", "image_projection"), ("text_projection", "text_projection")):
        if f"{name}.weight" in tensors:
            own[f"{new}.weight"] = tensors[f"{name}.weight"]
    return own | _scalars(tensors)


def _scalars(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name].reshape(1) for name in ("logit_scale", "logit_bias") if name in tensors}
