"""``format=hf`` of an image encoder: `ViTModel`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import ViTConfig

from src.errors import UserError
from src.export.card import ExportInfo, encoder_info
from src.export.folder import WEIGHTS, check_equal
from src.export.hf_common import VIT_BLOCK, VIT_QKV, image_processor, load_folder, rename_weights
from src.export.trained_model import TrainedModel


@torch.no_grad()
def write_encoder(model: TrainedModel, folder: Path) -> ExportInfo:
    """Writes `ViTModel` and its image processor.

    Raises:
        UserError: `ViTModel` cannot express the encoder.
    """
    vit = check_supported(model.backbone, model.architecture)
    block: Any = vit.blocks[0]
    ViTConfig(
        architectures=["ViTModel"],
        hidden_size=vit.embed_dim,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        hidden_act="gelu",
        layer_norm_eps=block.norm1.eps,
        image_size=_side(vit.patch_embed.img_size),
        patch_size=_side(vit.patch_embed.patch_size),
        num_channels=model.channels,
        qkv_bias=block.attn.qkv.bias is not None,
        pooler_output_size=vit.embed_dim,
        pooler_act="linear",
    ).save_pretrained(folder)
    save_file(vit_weights(vit), folder / WEIGHTS, metadata={"format": "pt"})
    image_processor(model).save_pretrained(folder)
    x = model.example_input()
    output, tokens = load_folder(folder)(x), vit.forward_features(x)
    check_equal(output.last_hidden_state, tokens, "last_hidden_state")
    check_equal(output.pooler_output, tokens[:, 0], "pooler_output")
    return encoder_info(
        model,
        "transformers",
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        'processor = AutoImageProcessor.from_pretrained("PATH_OF_THIS_FOLDER")\n'
        'model = AutoModel.from_pretrained("PATH_OF_THIS_FOLDER")\n'
        'output = model(**processor(image, return_tensors="pt"))\n'
        "output.last_hidden_state[:, 1:]  # one vector a patch; their mean was evaluated\n"
        "output.pooler_output  # the class token: the pooler is the identity\n",
    )


def vit_weights(vit: VisionTransformer) -> dict[str, Tensor]:
    """The weights of a timm ViT under the names of `ViTModel`, with an identity pooler.

    Raises:
        UserError: `ViTModel` has no parameter for one of them.
    """
    weights = rename_weights(
        vit.state_dict(),
        names={
            "cls_token": "embeddings.cls_token",
            "pos_embed": "embeddings.position_embeddings",
            "patch_embed.proj": "embeddings.patch_embeddings.projection",
            "norm": "layernorm",
        },
        layers="encoder.layer",
        block=VIT_BLOCK,
        qkv=VIT_QKV,
        target="ViTModel",
    )
    weights["pooler.dense.weight"] = torch.eye(vit.embed_dim)
    weights["pooler.dense.bias"] = torch.zeros(vit.embed_dim)
    return {name: value.detach().clone().contiguous() for name, value in weights.items()}


def check_supported(backbone: nn.Module, name: str) -> VisionTransformer:
    """``backbone``, if `ViTModel` can express it.

    Args:
        backbone: any model.
        name: of its architecture, for the message.

    Raises:
        UserError: `ViTModel` cannot.
    """
    supported = (
        "a timm VisionTransformer with class token, absolute positional embedding and a final norm before the pooling"
    )
    if not isinstance(backbone, VisionTransformer):
        raise UserError(f"format=hf writes {supported}; {name} is a {type(backbone).__name__}: use format=timm")
    if backbone.pos_embed is None or not isinstance(backbone.norm_pre, nn.Identity):
        raise UserError(f"format=hf writes {supported}; {name} has another embedding: use format=timm")
    if not isinstance(backbone.fc_norm, nn.Identity) or isinstance(backbone.norm, nn.Identity):
        raise UserError(f"format=hf writes {supported}; the norm of {name} comes after the pooling: use format=timm")
    if backbone.cls_token is None or backbone.num_prefix_tokens != 1 or backbone.no_embed_class:
        raise UserError(f"format=hf writes {supported}; {name} has other prefix tokens: use format=timm")
    return backbone


def _side(size: tuple[int, int]) -> int | list[int]:
    """A size as transformers writes it: one number for a square."""
    return size[0] if size[0] == size[1] else list(size)
