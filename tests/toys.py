"""The smallest networks, methods and batches that tests of several files need."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from src.models.backbones.video_vit import TubeletEmbed, video_vit
from src.models.image_text.clip import CLIP
from src.models.text.text_tower import CLIPTextTower
from src.optim import OptimizerRecipe, adamw

# token ids: 2 starts a text, 1 ends it, 0 is padding; the first and the last text are equal
TEXT = torch.tensor([[2, 7, 8, 1, 0, 0], [2, 9, 1, 0, 0, 0], [2, 7, 8, 9, 5, 1], [2, 7, 8, 1, 0, 0]])
MASK = TEXT != 0

_SMALL_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}


def small_vit(name: str = "vit_tiny_patch16_224", **options: Any) -> VisionTransformer:
    """Returns a ViT of one block that reads images of 16 x 16 pixels as 2 x 2 patches."""
    return timm.create_model(name, **{**_SMALL_VIT, **options})


def small_video_vit(frames: int = 4, **options: Any) -> VisionTransformer:
    """Returns a ViT of one block that reads clips of 16 x 16 pixels in tubelets of two frames of 2 x 2 patches."""
    embed = {"embed_layer": partial(TubeletEmbed, frames=frames), "class_token": False, "global_pool": "avg"}
    return video_vit("vit_tiny_patch16_224", **{**_SMALL_VIT, **embed, **options})


def text_tower(**options: Any) -> CLIPTextTower:
    torch.manual_seed(0)
    return CLIPTextTower(**{"vocabulary": 20, "length": 6, "width": 16, "depth": 2, "heads": 2, **options})


def clip(**options: Any) -> CLIP:
    torch.manual_seed(0)
    recipe = OptimizerRecipe(partial(adamw, betas=(0.9, 0.98)), lr=0.1, weight_decay=0.2)
    return CLIP(small_vit(), text_tower(), recipe, **{"embed_dim": 8, **options})


def image_text_batch() -> dict[str, torch.Tensor]:
    image = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(4)
    return {"image": image, "text": TEXT, "text_mask": MASK, "label": rows, "index": rows, "replaced": rows < 0}
