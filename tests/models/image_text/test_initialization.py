"""First values of image and text towers, against the authors' formulas."""

import pytest
import timm
import torch
from torch import nn

from src.models.image_text.initialization import initialize_as_clip, initialize_as_laclip, initialize_as_siglip
from src.models.text.text_tower import CLIPTextTower, SigLIPTextTower

WIDTH = 192  # large enough that the standard deviation of a sample is near that of the distribution
SIZES = {"img_size": 64, "patch_size": 8, "embed_dim": WIDTH, "depth": 1, "num_heads": 2, "num_classes": 0}


def uniform(fan_in: int) -> float:
    """The standard deviation of PyTorch's default, U(-fan_in^-0.5, fan_in^-0.5)."""
    return (3 * fan_in) ** -0.5


def xavier(rows: int, columns: int) -> float:
    return (2 / (rows + columns)) ** 0.5


def stds(module: nn.Module) -> dict[str, float]:
    return {name: parameter.std().item() for name, parameter in module.named_parameters()}


def check(module: nn.Module, expected: dict[str, float]) -> None:
    """Compares the standard deviation of every parameter that is named; norms are ones and zeros."""
    found = stds(module)
    for name, value in expected.items():
        assert found.pop(name) == pytest.approx(value, rel=0.1), name
    left = {name: std for name, std in found.items() if "norm" not in name.rsplit(".", 2)[-2]}
    assert set(left.values()) <= {0.0}, left


def vit(name: str = "vit_base_patch16_clip_224", **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **SIZES, **options)


def test_clips_image_tower():
    """CLIP's VisionTransformer: scale = width ** -0.5 for positions and class token, PyTorch's layers for the rest. At
    768 these are the standard deviations 0.0361, 0.0255 of queries, keys and values, and 0.0104 of fc2."""
    block = "blocks.0."
    check(
        initialize_as_clip(vit()),
        {
            "pos_embed": WIDTH**-0.5,
            "cls_token": WIDTH**-0.5,
            "patch_embed.proj.weight": uniform(3 * 8 * 8),
            f"{block}attn.qkv.weight": xavier(3 * WIDTH, WIDTH),
            f"{block}attn.proj.weight": uniform(WIDTH),
            f"{block}mlp.fc1.weight": uniform(WIDTH),
            f"{block}mlp.fc1.bias": uniform(WIDTH),
            f"{block}mlp.fc2.weight": uniform(4 * WIDTH),
            f"{block}mlp.fc2.bias": uniform(4 * WIDTH),
        },
    )
    assert (round(768**-0.5, 4), round(xavier(3 * 768, 768), 4), round(uniform(4 * 768), 4)) == (0.0361, 0.0255, 0.0104)


def test_laclips_image_tower():
    block, truncated = "blocks.0.", 0.02
    check(
        initialize_as_laclip(vit("vit_base_patch16_224", qk_norm=True)),
        {
            "pos_embed": truncated,
            "cls_token": truncated,
            "patch_embed.proj.weight": uniform(3 * 8 * 8),
            "patch_embed.proj.bias": uniform(3 * 8 * 8),
            **{
                f"{block}{name}.{leaf}": uniform(fan_in)
                for name, fan_in in {
                    "attn.qkv": WIDTH,
                    "attn.proj": WIDTH,
                    "mlp.fc1": WIDTH,
                    "mlp.fc2": 4 * WIDTH,
                }.items()
                for leaf in ("weight", "bias")
            },
        },
    )


def test_siglips_towers():
    """Flax draws each of queries, keys and values [width, width] by itself; its biases of the MLP have std 1e-6."""
    square, mlp = xavier(WIDTH, WIDTH), xavier(WIDTH, 4 * WIDTH)
    block = {
        "attn.qkv.weight": square,
        "attn.proj.weight": square,
        "mlp.fc1.weight": mlp,
        "mlp.fc1.bias": 1e-6,
        "mlp.fc2.weight": mlp,
        "mlp.fc2.bias": 1e-6,
    }
    pool = {
        "q.weight": square,
        "kv.weight": square,
        "proj.weight": square,
        **{name: value for name, value in block.items() if name.startswith("mlp")},
        "latent": (2 / (1 + WIDTH)) ** 0.5,  # a matrix [1, width]
    }
    check(
        initialize_as_siglip(vit("vit_base_patch16_siglip_224")),
        {
            "pos_embed": WIDTH**-0.5,
            "patch_embed.proj.weight": (3 * 8 * 8) ** -0.5,
            **{f"blocks.0.{name}": value for name, value in block.items()},
            **{f"attn_pool.{name}": value for name, value in pool.items()},
        },
    )
    layer = "encoder.layers.0."
    attention = {f"{layer}self_attn.{part}_proj.weight": square for part in ("q", "k", "v", "out")}
    torch.manual_seed(0)
    text = SigLIPTextTower(vocabulary=500, length=32, width=WIDTH, depth=1, heads=2, embed_dim=WIDTH).transformer
    check(
        text,
        {
            "embeddings.token_embedding.weight": WIDTH**-0.5,
            "embeddings.position_embedding.weight": WIDTH**-0.5,
            **attention,
            **{f"{layer}{name}": value for name, value in block.items() if name.startswith("mlp")},
            "head.weight": WIDTH**-0.5,
        },
    )


def test_clips_text_tower():
    width, depth = WIDTH, 2
    torch.manual_seed(0)
    text = CLIPTextTower(vocabulary=500, length=32, width=width, depth=depth, heads=2).transformer
    residual = width**-0.5 * (2 * depth) ** -0.5
    expected = {"embeddings.token_embedding.weight": 0.02, "embeddings.position_embedding.weight": 0.01}
    for number in range(depth):
        layer = f"encoder.layers.{number}."
        expected |= {f"{layer}self_attn.{part}_proj.weight": width**-0.5 for part in "qkv"}
        expected |= {f"{layer}self_attn.out_proj.weight": residual, f"{layer}mlp.fc1.weight": (2 * width) ** -0.5}
        expected |= {f"{layer}mlp.fc2.weight": residual}
        expected |= {f"{layer}mlp.fc1.bias": uniform(width), f"{layer}mlp.fc2.bias": uniform(4 * width)}
    check(text, expected)


def test_another_backbone_stays_as_it_is():
    backbone = timm.create_model("test_resnet", num_classes=0)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    for initialize in (initialize_as_clip, initialize_as_laclip, initialize_as_siglip):
        assert initialize(backbone) is backbone
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
