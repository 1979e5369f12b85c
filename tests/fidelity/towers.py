"""Two small towers whose weights follow `by_rule`, for comparison with other people's code of image-text methods.

Weights are numbered by OpenAI's names of them in alphabetical order, which every code can follow.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from src.models.backbones.released_towers import with_own_names
from tests.fidelity.rules import by_rule

WIDTH, EMBED, PATCH, SIDE, LENGTH, VOCABULARY = 16, 8, 8, 16, 6, 20
VIT = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "num_classes": 0}
TEXT_TOWER = {"vocabulary": VOCABULARY, "length": LENGTH, "width": WIDTH, "depth": 2, "heads": 2}
# 18 starts a text and 19 ends it, as the largest id; 0 is padding; no two are equal
TEXT = torch.tensor([[18, 7, 8, 19, 0, 0], [18, 9, 19, 0, 0, 0], [18, 7, 8, 9, 5, 19], [18, 3, 19, 0, 0, 0]])


def numbered(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Returns tensors of the given names and shapes by the rule of `fill`, in the alphabetical order of the names."""
    return {
        name: by_rule(shapes[name], number) + (1.0 if len(shapes[name]) == 1 else 0.0)
        for number, name in enumerate(sorted(shapes), start=1)
    }


def block_shapes(prefix: str, width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    """The shapes of a block of OpenAI's transformer."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}{norm}.{leaf}": (width,) for norm in ("ln_1", "ln_2") for leaf in ("weight", "bias")
    }
    for name, rows, columns in (
        ("attn.in_proj_", 3 * width, width),
        ("attn.out_proj.", width, width),
        ("mlp.c_fc.", 4 * width, width),
        ("mlp.c_proj.", width, 4 * width),
    ):
        shapes |= {f"{prefix}{name}weight": (rows, columns), f"{prefix}{name}bias": (rows,)}
    return shapes


def text_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of CLIP's text tower with its projection."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (LENGTH, WIDTH),
        "text_projection": (WIDTH, EMBED),
        "token_embedding.weight": (VOCABULARY, WIDTH),
        "ln_final.weight": (WIDTH,),
        "ln_final.bias": (WIDTH,),
        "logit_scale": (),
    }
    return shapes | block_shapes("transformer.resblocks.0.") | block_shapes("transformer.resblocks.1.")


def image_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of CLIP's ViT with its projection."""
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (1 + (SIDE // PATCH) ** 2, WIDTH),
        "visual.proj": (WIDTH, EMBED),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
    }
    shapes |= {f"visual.{norm}.{leaf}": (WIDTH,) for norm in ("ln_pre", "ln_post") for leaf in ("weight", "bias")}
    for number in range(2):
        shapes |= block_shapes(f"visual.transformer.resblocks.{number}.")
    return shapes


def load(module: nn.Module, weights: Mapping[str, Tensor], logit_scale: float) -> None:
    """Loads weights under OpenAI's names into a method with two towers, all of them. A ViT of timm has its own names
    after "visual.", and its projection is called "image_projection"."""
    named = with_own_names(weights)
    if "visual.cls_token" in weights:
        marked = {
            "visual.class_embedding": weights["visual.cls_token"][0, 0],
            "visual.positional_embedding": torch.zeros(1),
        }
        named = {n: v for n, v in with_own_names({**weights, **marked}).items() if not n.startswith("image_encoder.")}
        named |= {
            n.replace("visual.", "image_encoder.backbone."): v for n, v in weights.items() if n.startswith("visual.")
        }
        named["image_projection.weight"] = weights["image_projection"].T
    module.double().load_state_dict(named, strict=True)
    module.logit_scale.data.fill_(logit_scale)  # type: ignore[union-attr,operator]


def batch(step: int) -> dict[str, Tensor]:
    """The image-text batch of a step: four pairs."""
    rows = torch.arange(len(TEXT))
    image = by_rule((len(TEXT), 3, SIDE, SIDE), 30 + step, 1.0)
    return {"image": image, "text": TEXT, "text_mask": TEXT != 0, "label": rows, "index": rows, "replaced": rows < 0}


def squares(module: nn.Module) -> list[float]:
    """Squared norms of the weights: image tower, text tower, both projections, logit scale. Biases of keys are left
    out: attention does not depend on them, so that Adam divides the rounding errors of their gradients by as much."""
    tensors = {name: p.detach() for name, p in module.named_parameters()}
    for name, value in list(tensors.items()):
        if name.endswith(("k_proj.bias", "k_norm.bias")):
            del tensors[name]
        elif name.endswith("qkv.bias") and name.replace("qkv.bias", "k_norm.weight") not in tensors:
            query, _, values = value.chunk(3)
            tensors[name] = torch.cat([query, values])

    def of(prefix: str) -> float:
        return sum(value.pow(2).sum().item() for name, value in tensors.items() if name.startswith(prefix))

    return [of(p) for p in ("image_encoder.", "text_encoder.", "image_projection.", "text_projection.", "logit_scale")]
