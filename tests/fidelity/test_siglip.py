"""SigLIP against numbers of the authors' code.

Made with google-research/big_vision, models/proj/image_text/two_towers.py, models/vit.py and text_transformer.py, the
loss of trainers/proj/image_text/siglip.py, and optax.py (make) with scale_by_adam, commit 0127fb6: five steps of Adam
(rate 0.01, second beta 0.95), a weight decay of 0.01 of kernels that is not multiplied by the rate, and a cosine after
two steps of warm-up, on towers of two blocks of width 16. Weights are `by_rule`, numbered in the alphabetical order of
their names in Flax, 1 more for those with one axis; the logarithm of the logit scale starts at 2 and the bias at -3;
images and texts as in `towers`. Their layers and schedule compute in float32 and their norms have 1e-8 beside them;
here in float64 and without it.
"""

from functools import partial

import pytest
import timm
import torch
from torch import Tensor

from src.models.image_text.siglip import SigLIP
from src.models.text.text_tower import SigLIPTextTower
from src.optim import OptimizerRecipe, Rule, adamw
from src.schedules import WarmupCosine
from tests.fidelity.runs import run
from tests.fidelity.towers import PATCH, TEXT_TOWER, VIT, VOCABULARY, WIDTH, batch, numbered

LOSSES = [2.660161642326512, 2.81316710223566, 2.8169058144703127, 2.127124310683243, 2.6538586799225454]
# image tower, text tower, logit scale, bias; without the biases of keys
SQUARES = [1059.5317558612364, 677.1588665269095, 3.9091308405239285, 9.130012402482292]

HEADS = 2


def block_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a block of Flax, or of the attention-pooling head, which has one norm."""
    head = WIDTH // HEADS
    shapes: dict[str, tuple[int, ...]] = {}
    for norm in ("LayerNorm_0",) if "MAPHead" in prefix else ("LayerNorm_0", "LayerNorm_1"):
        shapes |= {f"{prefix}{norm}/scale": (WIDTH,), f"{prefix}{norm}/bias": (WIDTH,)}
    for part in ("query", "key", "value"):
        layer = f"{prefix}MultiHeadDotProductAttention_0/{part}"
        shapes |= {f"{layer}/kernel": (WIDTH, HEADS, head), f"{layer}/bias": (HEADS, head)}
    layer = f"{prefix}MultiHeadDotProductAttention_0/out"
    shapes |= {f"{layer}/kernel": (HEADS, head, WIDTH), f"{layer}/bias": (WIDTH,)}
    for number, (rows, columns) in enumerate(((WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))):
        layer = f"{prefix}MlpBlock_0/Dense_{number}"
        shapes |= {f"{layer}/kernel": (rows, columns), f"{layer}/bias": (columns,)}
    return shapes


def shapes() -> dict[str, tuple[int, ...]]:
    all_shapes: dict[str, tuple[int, ...]] = {
        "img/embedding/kernel": (PATCH, PATCH, 3, WIDTH),
        "img/embedding/bias": (WIDTH,),
        "img/pos_embedding": (1, 4, WIDTH),
        "img/MAPHead_0/probe": (1, 1, WIDTH),
        "txt/Embed_0/embedding": (VOCABULARY, WIDTH),
        "txt/pos_embedding": (1, 6, WIDTH),
        "txt/head/kernel": (WIDTH, WIDTH),
        "txt/head/bias": (WIDTH,),
        "t": (1,),
        "b": (1,),
    }
    for tower in ("img/Transformer/", "txt/Encoder_0/"):
        all_shapes |= {f"{tower}encoder_norm/scale": (WIDTH,), f"{tower}encoder_norm/bias": (WIDTH,)}
        all_shapes |= block_shapes(f"{tower}encoderblock_0/") | block_shapes(f"{tower}encoderblock_1/")
    return all_shapes | block_shapes("img/MAPHead_0/")


def in_our_names(w: dict[str, Tensor]) -> dict[str, Tensor]:
    """Flax multiplies from the left, and has an axis for heads."""

    def linear(layer: str) -> dict[str, Tensor]:
        kernel, bias = w[f"{layer}/kernel"], w[f"{layer}/bias"].flatten()
        return {"weight": kernel.reshape(-1, len(bias)).T, "bias": bias}

    def norm(layer: str) -> dict[str, Tensor]:
        return {"weight": w[f"{layer}/scale"], "bias": w[f"{layer}/bias"]}

    def stacked(prefix: str, *parts: str) -> dict[str, Tensor]:
        layers = [linear(f"{prefix}MultiHeadDotProductAttention_0/{part}") for part in parts]
        return {leaf: torch.cat([layer[leaf] for layer in layers]) for leaf in ("weight", "bias")}

    image, text = "image_encoder.backbone.", "text_encoder.transformer."
    own = {
        f"{image}patch_embed.proj.weight": w["img/embedding/kernel"].permute(3, 2, 0, 1),
        f"{image}patch_embed.proj.bias": w["img/embedding/bias"],
        f"{image}pos_embed": w["img/pos_embedding"],
        f"{image}attn_pool.latent": w["img/MAPHead_0/probe"],
        f"{text}embeddings.token_embedding.weight": w["txt/Embed_0/embedding"],
        f"{text}embeddings.position_embedding.weight": w["txt/pos_embedding"][0],
        "logit_scale": torch.full((1,), 2.0),
        "logit_bias": torch.full((1,), -3.0),
    }
    layers = {
        f"{image}norm": norm("img/Transformer/encoder_norm"),
        f"{text}final_layer_norm": norm("txt/Encoder_0/encoder_norm"),
        f"{text}head": linear("txt/head"),
    }
    pool, theirs = f"{image}attn_pool.", "img/MAPHead_0/"
    layers |= {f"{pool}q": stacked(theirs, "query"), f"{pool}kv": stacked(theirs, "key", "value")}
    layers |= {f"{pool}proj": stacked(theirs, "out"), f"{pool}norm": norm(f"{theirs}LayerNorm_0")}
    layers |= {f"{pool}mlp.fc{n + 1}": linear(f"{theirs}MlpBlock_0/Dense_{n}") for n in range(2)}
    for number in range(2):
        block, theirs = f"{image}blocks.{number}.", f"img/Transformer/encoderblock_{number}/"
        layers |= {f"{block}attn.qkv": stacked(theirs, "query", "key", "value")}
        layers |= {f"{block}attn.proj": stacked(theirs, "out")}
        layers |= {f"{block}norm{n + 1}": norm(f"{theirs}LayerNorm_{n}") for n in range(2)}
        layers |= {f"{block}mlp.fc{n + 1}": linear(f"{theirs}MlpBlock_0/Dense_{n}") for n in range(2)}
        block, theirs = f"{text}encoder.layers.{number}.", f"txt/Encoder_0/encoderblock_{number}/"
        for part, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
            layers[f"{block}self_attn.{part}_proj"] = stacked(theirs, name)
        layers |= {f"{block}layer_norm{n + 1}": norm(f"{theirs}LayerNorm_{n}") for n in range(2)}
        layers |= {f"{block}mlp.fc{n + 1}": linear(f"{theirs}MlpBlock_0/Dense_{n}") for n in range(2)}
    return own | {f"{name}.{leaf}": value for name, layer in layers.items() for leaf, value in layer.items()}


def squares(method: SigLIP) -> list[float]:
    tensors = {name: p.detach() for name, p in method.named_parameters() if not name.endswith("k_proj.bias")}
    for name, value in tensors.items():
        if name.endswith("qkv.bias"):
            tensors[name] = torch.cat([value[:WIDTH], value[2 * WIDTH :]])
        elif name.endswith("kv.bias"):
            tensors[name] = value[WIDTH:]
    prefixes = ("image_encoder.", "text_encoder.", "logit_scale", "logit_bias")
    return [sum(v.pow(2).sum().item() for name, v in tensors.items() if name.startswith(p)) for p in prefixes]


def test_five_steps_are_the_authors():
    rules = [Rule("pos_embed|latent|(token|position)_embedding", weight_decay=0.0)]
    recipe = OptimizerRecipe(partial(adamw, betas=(0.9, 0.95)), lr=0.01, weight_decay=0.01 / 0.01, rules=rules)
    vit = timm.create_model("vit_base_patch16_siglip_224", act_layer="gelu_tanh", **VIT)
    method = SigLIP(vit, SigLIPTextTower(embed_dim=WIDTH, **TEXT_TOWER), recipe).double()
    method.load_state_dict(in_our_names(numbered(shapes())))
    schedule = WarmupCosine(peak=0.01, warmup="2 steps")
    losses = run(method, [batch(step) for step in range(5)], {"optimizer": {"lr": schedule}}, epochs=1)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(method) == pytest.approx(SQUARES, rel=1e-12)
