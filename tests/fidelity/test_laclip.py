"""LaCLIP against numbers of the authors' code.

Made with LijieFan/LaCLIP, models.py, losses.py, utils.cosine_scheduler and the loop of train.py, commit 7ddd516: three
epochs of two steps in float64 on one process, AdamW with betas 0.9 and 0.98 and weight decay 0.5, rate 1e-6 to 0.02 in
the first epoch and to 1e-5 at the end; the ViT with norms of queries and keys; weights, images and texts of `towers`,
the logit scale starts at 4.7. Their LayerNorm computes in float32 whatever its input; here it is PyTorch's.
"""

import math
from functools import partial

import pytest
import timm
import torch

from src.models.backbones.image_encoder import cls_token
from src.models.image_text.clip import CLIP
from src.models.text.text_tower import CLIPTextTower
from src.optim import OptimizerRecipe, adamw
from src.schedules import WarmupCosine
from tests.fidelity.runs import run
from tests.fidelity.towers import EMBED, TEXT_TOWER, VIT, WIDTH, batch, load, numbered, squares, text_shapes

LOSSES = [
    3.494393639151495,
    3.245912256278432,
    6.366862380975744,
    1.8536459272288806,
    1.6919803863080376,
    1.4540923009583966,
]
SQUARES = [944.2364027573068, 736.3460035535605, 5.702606445310644, 6.181179686314581, 20.63025742057483]


def test_three_epochs_are_the_authors():
    recipe = OptimizerRecipe(partial(adamw, betas=(0.9, 0.98)), lr=0.02, weight_decay=0.5)
    vit = timm.create_model(
        "vit_base_patch16_224", qk_norm=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), **VIT
    )
    text = CLIPTextTower(activation="quick_gelu", **TEXT_TOWER)
    method = CLIP(vit, text, recipe, embed_dim=EMBED, pool=cls_token, max_logit_scale=math.exp(4.6052))
    shapes = {f"visual.{name}": tuple(value.shape) for name, value in vit.state_dict().items()}
    weights = numbered(shapes | text_shapes() | {"image_projection": (WIDTH, EMBED)})
    load(method, weights, logit_scale=4.7)
    schedule = WarmupCosine(peak=0.02, warmup="1 epochs", start=1e-6, end=1e-5, inclusive=True)
    losses = run(method, [batch(step) for step in range(6)], {"optimizer": {"lr": schedule}}, epochs=3)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(method) == pytest.approx(SQUARES, rel=1e-12)
