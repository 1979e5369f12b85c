"""CLIP-Refine against numbers of the authors' code.

Made with yshinya6/clip-refine, updater/contrastive.py (RandRegUpdater) with the settings of
config/01_post-pre-training/clip-refine.yaml but for the rate, commit 3879a2b, on the CLIP of open_clip (QuickGELU),
commit 89fb801: three steps in float64 of AdamW (rate 0.01, weight decay 0.1 of everything), weights, images and texts
as in `towers`. The random features of step s are `by_rule` of number 60 + s instead of a normal sample. A module of
theirs for another loss, which the repository lacks, is left out.
"""

from functools import partial

import pytest
import timm
import torch

from src.models.backbones.released_towers import with_own_names
from src.models.backbones.weights import Weights
from src.models.image_text.clip_refine import CLIPRefine
from src.models.text.text_tower import CLIPTextTower
from src.optim import OptimizerRecipe, Rule, adamw
from tests.fidelity.rules import by_rule
from tests.fidelity.runs import run
from tests.fidelity.towers import EMBED, TEXT_TOWER, VIT, batch, image_shapes, numbered, squares, text_shapes

LOSSES = [10.760772688892061, 2.849384919048221, 3.288160986208368]
SQUARES = [897.5232529823172, 727.7357564096458, 5.684931024822619, 5.061718893637698]


def test_three_steps_are_the_authors(monkeypatch):
    rules = [Rule("", weight_decay=0.1)]
    recipe = OptimizerRecipe(partial(adamw, betas=(0.9, 0.999)), lr=0.01, weight_decay=0.1, rules=rules)
    vit = timm.create_model("vit_base_patch16_clip_224", act_layer="quick_gelu", **VIT)
    text = CLIPTextTower(activation="quick_gelu", **TEXT_TOWER)
    method = CLIPRefine(vit, text, recipe, embed_dim=EMBED, cosine=False).double()
    method.load_start(Weights(with_own_names(numbered(image_shapes() | text_shapes())), "rule"))
    steps = iter(range(3))
    monkeypatch.setattr(torch, "randn_like", lambda x, **options: by_rule(tuple(x.shape), 60 + next(steps), 1.0))
    losses = run(method, [batch(step) for step in range(3)], {}, epochs=1)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(method)[:4] == pytest.approx(SQUARES, rel=1e-12)
