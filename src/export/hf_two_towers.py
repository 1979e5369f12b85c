"""``format=hf`` of an image-text method: `CLIPModel` or `SiglipModel` with both towers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedModel, SiglipConfig, SiglipModel
from transformers.utils import logging as transformers_logging

from src.datamodules.text.tokenizer import Tokenizer
from src.errors import UserError
from src.export.card import ExportInfo
from src.export.folder import check_equal, quiet
from src.export.hf_common import image_processor, load_folder, rename_weights
from src.export.trained_model import Towers, TrainedModel
from src.models.backbones.image_encoder import cls_token, cls_token_or_mean
from src.models.backbones.released_towers import BLOCK_IN_TRANSFORMERS, LAYERS_IN_TRANSFORMERS
from src.models.image_text.base import ImageTextModule
from src.models.layers.activations import activation_name
from src.models.text.text_tower import CLIPTextTower, SigLIPTextTower


@torch.no_grad()
def write_towers(model: TrainedModel, towers: Towers, folder: Path) -> ExportInfo:
    """Writes both towers, the tokenizer and the image processor.

    Raises:
        UserError: transformers has no model for these towers, or the written one computes other features.
    """
    module, tokenizer = towers.module, towers.tokenizer
    transformers_logging.disable_progress_bar()
    with quiet("transformers"):
        as_transformers(module, tokenizer).save_pretrained(folder)
        tokenizer.inner.model_max_length = tokenizer.length
        tokenizer.inner.save_pretrained(folder)
        image_processor(model).save_pretrained(folder)
        exported_tokenizer = AutoTokenizer.from_pretrained(folder)
    exported = load_folder(folder)
    texts = ["a", "a photo of a red square.", "IMG_0042 " + "many words " * tokenizer.length, "spelled <end> and all"]
    ids, mask = tokenizer(texts)
    options = {"padding": "max_length", "truncation": True, "split_special_tokens": True, "return_tensors": "pt"}
    exported_ids = exported_tokenizer(texts, **options)["input_ids"]
    if not torch.equal(exported_ids, ids):
        raise UserError("not exported: the written tokenizer returns other ids than the run's own")
    images = model.example_input()
    output = exported(input_ids=ids, pixel_values=images)
    image, text = module.encode_image(images), module.encode_text(ids, mask)
    check_equal(output.image_embeds, image, "image_embeds")
    check_equal(output.text_embeds, text, "text_embeds")
    scale: Any = module.logit_scale
    bias: Any = getattr(module, "logit_bias", 0.0)
    # the scale multiplies the difference between the embeddings
    check_equal(output.logits_per_image, scale.exp() * image @ text.T + bias, "logits_per_image", float(scale.exp()))
    name = type(exported).__name__
    return ExportInfo(
        "both towers",
        "Image and text towers",
        "transformers",
        "zero-shot-image-classification",
        f"from transformers import AutoImageProcessor, AutoTokenizer, {name}\n\n"
        'processor = AutoImageProcessor.from_pretrained("PATH_OF_THIS_FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")\n'
        f'model = {name}.from_pretrained("PATH_OF_THIS_FOLDER")\n'
        'options = dict(padding="max_length", truncation=True, split_special_tokens=True, return_tensors="pt")\n'
        'ids = tokenizer(texts, **options)["input_ids"]\n'
        'output = model(input_ids=ids, **processor(images, return_tensors="pt"))\n'
        "output.image_embeds, output.text_embeds  # unit vectors\n"
        "output.logits_per_image  # [images, texts]\n",
    )


def as_transformers(module: ImageTextModule, tokenizer: Tokenizer) -> PreTrainedModel:
    """`CLIPModel` or `SiglipModel`, depending on the text tower, with the run's weights.

    Raises:
        UserError: neither can express the towers; the message names the difference.
    """
    if isinstance(module.text_encoder, CLIPTextTower):
        return as_clip(module, tokenizer)
    if isinstance(module.text_encoder, SigLIPTextTower):
        return as_siglip(module, tokenizer)
    raise UserError(
        f"format=hf writes the text towers of CLIP and SigLIP, not a {type(module.text_encoder).__name__}: "
        "encoder=encoder exports the image tower alone"
    )


def as_clip(module: ImageTextModule, tokenizer: Tokenizer) -> CLIPModel:
    """`CLIPModel`: a ViT with a norm before its blocks, and a causal text tower read at the end token.

    Raises:
        UserError: see `as_transformers`.
    """
    target = "CLIPModel"
    vit = _image_tower(module, target)
    _need(
        vit.cls_token is not None and vit.num_prefix_tokens == 1 and not vit.no_embed_class, target, "one class token"
    )
    _need(module.image_encoder.pool in (cls_token, cls_token_or_mean), target, "the class token as the image's feature")
    _need(
        isinstance(vit.norm_pre, nn.LayerNorm),
        target,
        "a norm before the blocks (timm's vit_*_clip_*, or pre_norm=true)",
    )
    _need(vit.patch_embed.proj.bias is None, target, "a patch embedding without bias (timm's vit_*_clip_*)")
    # transformers reads a text at its first end token, but with id 2 at the token with the largest id
    _need(tokenizer.end is not None and tokenizer.end != 2, target, "a tokenizer with an end token other than id 2")
    transformer: Any = module.text_encoder.transformer
    special_tokens = _special_tokens(tokenizer)
    width = len(_projection(module.image_projection, vit.embed_dim, target))
    scale = _parameter(module, "logit_scale", target)
    model = CLIPModel(
        CLIPConfig(
            text_config=transformer.config.to_dict() | special_tokens | {"projection_dim": width},
            vision_config=_vision_config(vit) | {"projection_dim": width},
            projection_dim=width,
            logit_scale_init_value=float(scale),
        )
    )
    weights = {f"text_model.{name}": value for name, value in transformer.state_dict().items()}
    weights |= {f"vision_model.{name}": value for name, value in vision_weights(vit).items()}
    weights["visual_projection.weight"] = _projection(module.image_projection, vit.embed_dim, target)
    weights["text_projection.weight"] = _projection(module.text_projection, module.text_encoder.dim, target)
    weights["logit_scale"] = scale
    return _with_weights(model, weights, target)


def as_siglip(module: ImageTextModule, tokenizer: Tokenizer) -> SiglipModel:
    """`SiglipModel`: a ViT with attention pooling, and a bidirectional text tower.

    Raises:
        UserError: see `as_transformers`.
    """
    target = "SiglipModel"
    vit = _image_tower(module, target)
    _need(vit.num_prefix_tokens == 0, target, "no class token")
    _need(vit.attn_pool is not None, target, "attention pooling (backbone.global_pool=map)")
    _need(isinstance(vit.norm_pre, nn.Identity), target, "no norm before the blocks")
    plain = isinstance(module.image_projection, nn.Identity) and isinstance(module.text_projection, nn.Identity)
    _need(plain, target, "no projections other than the text tower's own")
    transformer: Any = module.text_encoder.transformer
    special_tokens = _special_tokens(tokenizer)
    model = SiglipModel(
        SiglipConfig(text_config=transformer.config.to_dict() | special_tokens, vision_config=_vision_config(vit))
    )
    weights = {f"text_model.{name}": value for name, value in transformer.state_dict().items()}
    weights |= {f"vision_model.{name}": value for name, value in vision_weights(vit).items()}
    weights["logit_scale"] = _parameter(module, "logit_scale", target).reshape(1)
    weights["logit_bias"] = _parameter(module, "logit_bias", target).reshape(1)
    return _with_weights(model, weights, target)


def vision_weights(vit: VisionTransformer) -> dict[str, Tensor]:
    """The weights of a timm ViT under the names of the image towers of `CLIPModel` and `SiglipModel`.

    Raises:
        UserError: the image towers have no parameter for one of them.
    """
    state, weights = dict(vit.state_dict()), {}
    weights["embeddings.position_embedding.weight"] = state.pop("pos_embed")[0]
    if vit.cls_token is not None:
        weights["embeddings.class_embedding"] = state.pop("cls_token").flatten()
    if vit.attn_pool is not None:
        weights["head.probe"] = state.pop("attn_pool.latent")
        for leaf in ("weight", "bias"):  # in_proj holds query, key and value in this order
            parts = [state.pop(f"attn_pool.{part}.{leaf}") for part in ("q", "kv")]
            weights[f"head.attention.in_proj_{leaf}"] = torch.cat(parts)
    return weights | rename_weights(
        state,
        names=LAYERS_IN_TRANSFORMERS,
        layers="encoder.layers",
        block=BLOCK_IN_TRANSFORMERS,
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        target="an image tower of transformers",
    )


def _image_tower(module: ImageTextModule, target: str) -> VisionTransformer:
    vit = module.image_encoder.backbone
    _need(isinstance(vit, VisionTransformer), target, f"a timm VisionTransformer, not a {type(vit).__name__}")
    assert isinstance(vit, VisionTransformer)
    _need(vit.pos_embed is not None, target, "a positional embedding")
    normed = isinstance(vit.norm, nn.LayerNorm) and isinstance(vit.fc_norm, nn.Identity)
    _need(normed, target, "the final norm before the pooling")
    return vit


def _vision_config(vit: VisionTransformer) -> dict[str, Any]:
    block: Any = vit.blocks[0]
    norms = [layer for layer in vit.modules() if isinstance(layer, nn.LayerNorm)]
    _need(len({layer.eps for layer in norms}) == 1, "transformers' image tower", "the same eps in all norms")
    height, width = vit.patch_embed.img_size
    _need(height == width, "transformers' image tower", "square images")
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


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int | None]:
    inner = tokenizer.inner
    return {"bos_token_id": inner.bos_token_id, "eos_token_id": tokenizer.end, "pad_token_id": inner.pad_token_id}


def _activation(layer: nn.Module) -> str:
    """Returns the name of an activation in transformers."""
    name = activation_name(layer)
    if name is None:
        raise UserError(f"not exported: transformers has no name for the activation {layer}: use format=timm")
    return name


def _projection(layer: nn.Module, width: int, target: str) -> Tensor:
    """The matrix of a projection; the identity matrix for `nn.Identity`."""
    if isinstance(layer, nn.Identity):
        return torch.eye(width)
    _need(isinstance(layer, nn.Linear) and layer.bias is None, target, "linear projections without bias")
    return layer.weight  # type: ignore[return-value]


def _parameter(module: nn.Module, name: str, target: str) -> Tensor:
    value = getattr(module, name, None)
    _need(isinstance(value, Tensor) and value.numel() == 1, target, f"a learned {name}")
    assert isinstance(value, Tensor)
    return value.detach().squeeze()


def _with_weights(model: Any, weights: dict[str, Tensor], target: str) -> Any:
    try:
        model.load_state_dict(weights)
    except RuntimeError as problem:
        reason = " ".join(str(problem).split())[:400]
        raise UserError(f"not exported: the weights do not fit {target}: {reason}") from problem
    return model.eval()


def _need(condition: bool, target: str, needed: str) -> None:
    if not condition:
        raise UserError(f"not exported: {target} needs {needed}; format=timm exports the image tower alone")
