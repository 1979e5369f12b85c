"""A run's two towers as models that transformers has, weight by weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, PreTrainedModel, SiglipConfig, SiglipModel
from transformers.activations import ACT2FN

from src.datamodules.text.tokenizer import Tokenizer
from src.errors import UserError
from src.models.backbones.image_encoder import cls_token, cls_token_or_mean
from src.models.image_text.base import ImageTextModule
from src.models.text.text_tower import SigmoidTextTower, TextTower

_ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "relu")

# what the parts of a block are called in transformers' ViTs
VIT_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
VIT_QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value")


def as_transformers(module: ImageTextModule, tokenizer: Tokenizer) -> PreTrainedModel:
    """`CLIPModel` or `SiglipModel`, whichever has this text tower, with the run's weights.

    Raises:
        UserError: neither can express the towers; the message says what stands in the way.
    """
    if isinstance(module.text_encoder, TextTower):
        return as_clip(module, tokenizer)
    if isinstance(module.text_encoder, SigmoidTextTower):
        return as_siglip(module, tokenizer)
    raise UserError(
        f"format=hf writes the text towers of CLIP and SigLIP, not a {type(module.text_encoder).__name__}: "
        "encoder=encoder exports the image tower alone"
    )


def as_clip(module: ImageTextModule, tokenizer: Tokenizer) -> CLIPModel:
    """`CLIPModel`: a ViT with a norm before its blocks, a causal text tower read at its end.

    Raises:
        UserError: see `as_transformers`.
    """
    what = "CLIPModel"
    vit = _vit(module, what)
    _need(vit.cls_token is not None and vit.num_prefix_tokens == 1 and not vit.no_embed_class, what, "one class token")
    _need(module.image_encoder.pool in (cls_token, cls_token_or_mean), what, "the class token as the image's feature")
    _need(
        isinstance(vit.norm_pre, nn.LayerNorm), what, "a norm before the blocks (timm's vit_*_clip_*, or pre_norm=true)"
    )
    _need(vit.patch_embed.proj.bias is None, what, "patches without bias (timm's vit_*_clip_*)")
    # of the tokens that stand for an end transformers reads the first, and of id 2 the largest id instead
    _need(
        tokenizer.end is not None and tokenizer.end != 2, what, "a tokenizer with a mark for the end that is not id 2"
    )
    transformer: Any = module.text_encoder.transformer
    inner = tokenizer.inner
    marks = {"bos_token_id": inner.bos_token_id, "eos_token_id": tokenizer.end, "pad_token_id": inner.pad_token_id}
    width = len(_projection(module.image_projection, vit.embed_dim, what))
    scale = _parameter(module, "logit_scale", what)
    model = CLIPModel(
        CLIPConfig(
            text_config=transformer.config.to_dict() | marks | {"projection_dim": width},
            vision_config=_vision_config(vit) | {"projection_dim": width},
            projection_dim=width,
            logit_scale_init_value=float(scale),
        )
    )
    weights = {f"text_model.{name}": value for name, value in transformer.state_dict().items()}
    weights |= {f"vision_model.{name}": value for name, value in vision_weights(vit).items()}
    weights["visual_projection.weight"] = _projection(module.image_projection, vit.embed_dim, what)
    weights["text_projection.weight"] = _projection(module.text_projection, module.text_encoder.dim, what)
    weights["logit_scale"] = scale
    return _filled(model, weights, what)


def as_siglip(module: ImageTextModule, tokenizer: Tokenizer) -> SiglipModel:
    """`SiglipModel`: a ViT whose feature is pooled by attention, a text tower that reads in both directions.

    Raises:
        UserError: see `as_transformers`.
    """
    what = "SiglipModel"
    vit = _vit(module, what)
    _need(vit.num_prefix_tokens == 0, what, "no class token")
    _need(vit.attn_pool is not None, what, "attention to pool by (global_pool=map)")
    _need(isinstance(vit.norm_pre, nn.Identity), what, "no norm before the blocks")
    plain = isinstance(module.image_projection, nn.Identity) and isinstance(module.text_projection, nn.Identity)
    _need(plain, what, "no projections besides the text tower's own")
    transformer: Any = module.text_encoder.transformer
    inner = tokenizer.inner
    marks = {"bos_token_id": inner.bos_token_id, "eos_token_id": tokenizer.end, "pad_token_id": inner.pad_token_id}
    model = SiglipModel(
        SiglipConfig(text_config=transformer.config.to_dict() | marks, vision_config=_vision_config(vit))
    )
    weights = {f"text_model.{name}": value for name, value in transformer.state_dict().items()}
    weights |= {f"vision_model.{name}": value for name, value in vision_weights(vit).items()}
    weights["logit_scale"] = _parameter(module, "logit_scale", what).reshape(1)
    weights["logit_bias"] = _parameter(module, "logit_bias", what).reshape(1)
    return _filled(model, weights, what)


def vision_weights(vit: VisionTransformer) -> dict[str, Tensor]:
    """A timm ViT's weights under the names that the image towers of `CLIPModel` and `SiglipModel` have for them.

    Raises:
        UserError: one of them has no place there.
    """
    state, weights = dict(vit.state_dict()), {}
    weights["embeddings.position_embedding.weight"] = state.pop("pos_embed")[0]
    if vit.cls_token is not None:
        weights["embeddings.class_embedding"] = state.pop("cls_token").flatten()
    if vit.attn_pool is not None:
        weights["head.probe"] = state.pop("attn_pool.latent")
        for leaf in ("weight", "bias"):  # torch's in_proj has the query's first
            parts = [state.pop(f"attn_pool.{part}.{leaf}") for part in ("q", "kv")]
            weights[f"head.attention.in_proj_{leaf}"] = torch.cat(parts)
    return weights | renamed(
        state,
        names={
            "patch_embed.proj": "embeddings.patch_embedding",
            "norm_pre": "pre_layrnorm",  # their spelling
            "norm": "post_layernorm",
            "attn_pool.proj": "head.attention.out_proj",
            "attn_pool.norm": "head.layernorm",
            "attn_pool.mlp.fc1": "head.mlp.fc1",
            "attn_pool.mlp.fc2": "head.mlp.fc2",
        },
        layers="encoder.layers",
        block={
            "norm1": "layer_norm1",
            "norm2": "layer_norm2",
            "attn.proj": "self_attn.out_proj",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        },
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        what="an image tower of transformers",
    )


def renamed(
    state: Mapping[str, Tensor],
    *,
    names: Mapping[str, str],
    layers: str,
    block: Mapping[str, str],
    qkv: tuple[str, str, str],
    what: str,
) -> dict[str, Tensor]:
    """The weights of a timm ViT under other names, the three parts of its attention's input apart, its classifier left
    out.

    Args:
        state: the ViT's, or what is left of it.
        names: of tensors and modules outside of the blocks.
        layers: what the list of blocks is called.
        block: names of modules within a block.
        qkv: of the three parts.
        what: has these names, for the message.

    Raises:
        UserError: a tensor has no name there.
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
            raise UserError(f"not exported: {what} has no place for '{name}'; format=timm has")
    return weights


def _vit(module: ImageTextModule, what: str) -> VisionTransformer:
    vit = module.image_encoder.backbone
    _need(isinstance(vit, VisionTransformer), what, f"a timm VisionTransformer, which a {type(vit).__name__} is not")
    assert isinstance(vit, VisionTransformer)
    _need(vit.pos_embed is not None, what, "learned positions")
    normed = isinstance(vit.norm, nn.LayerNorm) and isinstance(vit.fc_norm, nn.Identity)
    _need(normed, what, "its last norm before the pooling")
    return vit


def _vision_config(vit: VisionTransformer) -> dict[str, Any]:
    block: Any = vit.blocks[0]
    norms = [layer for layer in vit.modules() if isinstance(layer, nn.LayerNorm)]
    _need(len({layer.eps for layer in norms}) == 1, "transformers' image tower", "one eps in all norms")
    height, width = vit.patch_embed.img_size
    _need(height == width, "transformers' image tower", "square pictures")
    return {
        "hidden_size": vit.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": height,
        "patch_size": vit.patch_embed.patch_size[0],
        "hidden_act": _activation(block.mlp.act),
        "layer_norm_eps": block.norm1.eps,
    }


def _activation(layer: nn.Module) -> str:
    """What transformers calls it, found by what it computes."""
    x = torch.linspace(-4, 4, 33)
    for name in _ACTIVATIONS:
        if torch.allclose(ACT2FN[name](x), layer(x), rtol=0, atol=1e-6):
            return name
    raise UserError(f"not exported: transformers has no name for the activation {layer}: use format=timm")


def _projection(layer: nn.Module, width: int, what: str) -> Tensor:
    """Its matrix, the identity's where there is none."""
    if isinstance(layer, nn.Identity):
        return torch.eye(width)
    _need(isinstance(layer, nn.Linear) and layer.bias is None, what, "projections that are matrices without bias")
    return layer.weight  # type: ignore[return-value]


def _parameter(module: nn.Module, name: str, what: str) -> Tensor:
    value = getattr(module, name, None)
    _need(isinstance(value, Tensor) and value.numel() == 1, what, f"a learned {name}")
    assert isinstance(value, Tensor)
    return value.detach().squeeze()


def _filled(model: Any, weights: dict[str, Tensor], what: str) -> Any:
    try:
        model.load_state_dict(weights)
    except RuntimeError as problem:
        raise UserError(f"not exported: {what} does not fit: {' '.join(str(problem).split())[:400]}") from problem
    return model.eval()


def _need(holds: bool, what: str, needed: str) -> None:
    if not holds:
        raise UserError(f"not exported: {what} needs {needed}; format=timm writes the image tower alone")
