"""CLIP against numbers of open_clip, the code in which it is trained today; its authors published no training code.

Made with mlfoundations/open_clip, src/open_clip/model.py (CLIP with quick_gelu), loss.py (ClipLoss) and the optimizer
of src/open_clip_train/legacy_main.py with the limit of train.py, commit 89fb801: three steps in float64 of AdamW (rate
0.01, betas 0.9 and 0.98, eps 1e-6, weight decay 0.2) on the towers, images and texts of `towers`; the logit scale
starts at 4.7, above its limit.
"""

from functools import partial

import pytest
import timm

from src.models.image_text.clip import CLIP
from src.models.text.text_tower import CLIPTextTower
from src.optim import OptimizerRecipe, Rule, adamw
from tests.fidelity.runs import run
from tests.fidelity.towers import EMBED, TEXT_TOWER, VIT, batch, image_shapes, load, numbered, squares, text_shapes

LOSSES = [7.023057364721413, 2.3631145497668196, 2.4968356329642214]
SQUARES = [897.398456670959, 728.6509547450485, 5.631356701938197, 5.771270180010408, 21.058235871003415]


def test_three_steps_are_those_of_open_clip():
    # one axis in open_clip, which decays nothing with fewer than two
    rules = [Rule("cls_token", weight_decay=0.0)]
    recipe = OptimizerRecipe(partial(adamw, betas=(0.9, 0.98), eps=1e-6), lr=0.01, weight_decay=0.2, rules=rules)
    vit = timm.create_model("vit_base_patch16_clip_224", act_layer="quick_gelu", **VIT)
    method = CLIP(vit, CLIPTextTower(activation="quick_gelu", **TEXT_TOWER), recipe, embed_dim=EMBED)
    load(method, numbered(image_shapes() | text_shapes()), logit_scale=4.7)
    losses = run(method, [batch(step) for step in range(3)], {}, epochs=1)
    assert losses == pytest.approx(LOSSES, rel=1e-12)
    assert squares(method) == pytest.approx(SQUARES, rel=1e-12)
