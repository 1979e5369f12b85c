"""A run's encoder of clips as a model that transformers has, weight by weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEModel

from src.errors import UserError
from src.export.two_towers import VIT_BLOCK, VIT_QKV, renamed
from src.models.backbones.video_vit import TubeletEmbed, sinusoids

_ENCODER = {"patch_embed.projection": "embeddings.patch_embeddings.projection", "norm": "layernorm"}


def as_videomae(vit: nn.Module, name: str) -> VideoMAEModel:
    """`VideoMAEModel` with the weights of a ViT that reads clips.

    Args:
        name: what timm calls it, for the message.

    Raises:
        UserError: it cannot express the ViT.
    """
    embed = getattr(vit, "patch_embed", None)
    block: Any = vit.blocks[0] if isinstance(vit, VisionTransformer) else None
    plain = (
        isinstance(vit, VisionTransformer)
        and isinstance(embed, TubeletEmbed)
        and vit.num_prefix_tokens == 0
        and isinstance(vit.norm, nn.LayerNorm)
        and isinstance(vit.fc_norm, nn.Identity)
        and isinstance(block.mlp.act, nn.GELU)
        and embed.img_size[0] == embed.img_size[1]
        and embed.patch_size[0] == embed.patch_size[1]
    )
    if not plain:
        raise UserError(
            f"format=hf writes VideoMAEModel: a ViT of square cubes without class token and with a final norm; {name} "
            "is none"
        )
    assert isinstance(vit, VisionTransformer)
    assert isinstance(embed, TubeletEmbed)
    width = vit.embed_dim
    if vit.pos_embed is None or not torch.equal(vit.pos_embed, sinusoids(width, embed.num_patches)):
        raise UserError("format=hf writes VideoMAEModel, whose positions are fixed sines; this run's are others")
    model = VideoMAEModel(
        VideoMAEConfig(
            image_size=embed.img_size[0],
            patch_size=embed.patch_size[0],
            num_frames=embed.frames,
            tubelet_size=embed.cube_frames,
            hidden_size=width,
            num_hidden_layers=len(vit.blocks),
            num_attention_heads=block.attn.num_heads,
            intermediate_size=block.mlp.fc1.out_features,
            hidden_act="gelu",
            layer_norm_eps=block.norm1.eps,
            qv_bias=block.attn.qkv.bias is not None,
            use_mean_pooling=False,  # else there is no norm at the end
        )
    )
    model.load_state_dict(videomae_weights(vit.state_dict()))
    return model.eval()


def videomae_weights(
    state: Mapping[str, Tensor], *, names: Mapping[str, str] = _ENCODER, layers: str = "encoder.layer"
) -> dict[str, Tensor]:
    """Those of a ViT that reads clips under the names `VideoMAEModel` has. Fixed positions are no weights there, nor is
    a bias of keys: it adds the same to all of a query's products, and no attention differs by it.

    Args:
        names: of tensors and modules outside of the blocks.
        layers: what the list of blocks is called.
    """
    weights = renamed(
        {name: value for name, value in state.items() if name != "pos_embed"},
        names=names,
        layers=layers,
        block=VIT_BLOCK,
        qkv=VIT_QKV,
        what="VideoMAEModel",
    )
    return {name: value for name, value in weights.items() if not name.endswith("attention.key.bias")}
