"""``format=hf`` of a video encoder: `VideoMAEModel`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEImageProcessor, VideoMAEModel
from transformers.utils import logging as transformers_logging

from src.errors import UserError
from src.export.card import ExportInfo, encoder_info
from src.export.folder import check_equal, quiet
from src.export.hf_common import VIT_BLOCK, VIT_QKV, check_processor, load_folder, rename_weights
from src.export.trained_model import TrainedModel
from src.models.backbones.video_vit import TubeletEmbed, sinusoids

_ENCODER = {"patch_embed.projection": "embeddings.patch_embeddings.projection", "norm": "layernorm"}


@torch.no_grad()
def write_video_encoder(model: TrainedModel, folder: Path) -> ExportInfo:
    """Writes `VideoMAEModel` and its processor of clips.

    Raises:
        UserError: `VideoMAEModel` cannot express the encoder.
    """
    check_processor(model)
    transformers_logging.disable_progress_bar()
    with quiet("transformers"):
        as_videomae(model.backbone, model.architecture).save_pretrained(folder)
        VideoMAEImageProcessor(
            size={"shortest_edge": round(model.size[0] / model.crop_share)},
            crop_size={"height": model.size[0], "width": model.size[1]},
            resample=2,  # bilinear, as CenterVideoCrop
            image_mean=model.mean,
            image_std=model.std,
        ).save_pretrained(folder)
    x = model.example_input()
    tokens = model.backbone.forward_features(x)  # type: ignore[operator]
    check_equal(load_folder(folder)(x).last_hidden_state, tokens, "last_hidden_state")
    return encoder_info(
        model,
        "transformers",
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        'processor = AutoImageProcessor.from_pretrained("PATH_OF_THIS_FOLDER")\n'
        'model = AutoModel.from_pretrained("PATH_OF_THIS_FOLDER")\n'
        f'output = model(**processor(frames, return_tensors="pt"))  # {x.shape[1]} images\n'
        "output.last_hidden_state  # one vector a tubelet; their mean was evaluated\n",
    )


def as_videomae(vit: nn.Module, name: str) -> VideoMAEModel:
    """`VideoMAEModel` with the weights of a video ViT.

    Args:
        vit: the trained backbone.
        name: its timm name, for the message.

    Raises:
        UserError: `VideoMAEModel` cannot express it.
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
            "format=hf writes VideoMAEModel: a ViT with square tubelets, a final norm and no class token, which "
            f"{name} is not"
        )
    assert isinstance(vit, VisionTransformer)
    assert isinstance(embed, TubeletEmbed)
    width = vit.embed_dim
    if vit.pos_embed is None or not torch.equal(vit.pos_embed, sinusoids(width, embed.num_patches)):
        raise UserError("format=hf writes VideoMAEModel, whose positional embedding is sinusoidal; this run's is not")
    model = VideoMAEModel(
        VideoMAEConfig(
            image_size=embed.img_size[0],
            patch_size=embed.patch_size[0],
            num_frames=embed.frames,
            tubelet_size=embed.tubelet_frames,
            hidden_size=width,
            num_hidden_layers=len(vit.blocks),
            num_attention_heads=block.attn.num_heads,
            intermediate_size=block.mlp.fc1.out_features,
            hidden_act="gelu",
            layer_norm_eps=block.norm1.eps,
            qv_bias=block.attn.qkv.bias is not None,
            use_mean_pooling=False,  # with mean pooling the model has no final norm
        )
    )
    model.load_state_dict(videomae_weights(vit.state_dict()))
    return model.eval()


def videomae_weights(
    state: Mapping[str, Tensor], *, names: Mapping[str, str] = _ENCODER, layers: str = "encoder.layer"
) -> dict[str, Tensor]:
    """The weights of a video ViT under the names of `VideoMAEModel`. The fixed positional embedding is no weight there.
    The bias of keys is left out: it adds a constant to all logits of a query and changes no attention.

    Args:
        state: weights of the ViT.
        names: new names of tensors and modules outside of the blocks.
        layers: new name of the list of blocks.

    Raises:
        UserError: `VideoMAEModel` has no parameter for a weight.
    """
    weights = rename_weights(
        {name: value for name, value in state.items() if name != "pos_embed"},
        names=names,
        layers=layers,
        block=VIT_BLOCK,
        qkv=VIT_QKV,
        target="VideoMAEModel",
    )
    return {name: value for name, value in weights.items() if not name.endswith("attention.key.bias")}
