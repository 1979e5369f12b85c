"""SigLIP: its towers, and its training step against the paper's pseudocode."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from src import configuration
from src.models.image_text.siglip import SigLIP
from src.models.text.text_tower import SigLIPTextTower
from src.optim import OptimizerRecipe, adamw
from src.train import compose
from tests.toys import MASK, TEXT, image_text_batch, small_vit


def siglip(**options) -> SigLIP:
    torch.manual_seed(0)
    vit = small_vit(global_pool="map", class_token=False)
    text = SigLIPTextTower(vocabulary=20, length=6, width=8, depth=2, heads=2, embed_dim=16)
    return SigLIP(vit, text, OptimizerRecipe(partial(adamw), lr=0.1, weight_decay=0.2), **options)


def test_the_training_step_equals_the_papers_pseudocode():
    method, given = siglip(), image_text_batch()
    output = method.training_step(given, 0)
    image = method.image_encoder.backbone.forward_head(method.image_encoder.backbone.forward_features(given["image"]))
    text = method.text_encoder.transformer(input_ids=TEXT).pooler_output
    image, text = (x / x.norm(dim=1, keepdim=True) for x in (image, text))
    logits = image @ text.T * 10 - 10
    labels = 2 * torch.eye(4) - 1
    expected = -torch.nn.functional.logsigmoid(labels * logits).sum() / 4
    torch.testing.assert_close(output["loss"], expected)
    gathered = siglip(ring=False).training_step(given, 0)["loss"]
    torch.testing.assert_close(gathered, expected)
    output["loss"].backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name


def test_logit_scale_and_bias_are_initialized_as_in_the_paper_and_not_decayed():
    method = siglip()
    assert method.logit_scale.item() == pytest.approx(math.log(10))
    assert method.logit_bias.item() == siglip(bias=-10).logit_bias.item() == -10  # an int is accepted
    groups = method.configure_optimizers().param_groups
    assert {g["weight_decay"] for g in groups for name in g["names"] if name.startswith("logit_")} == {0}


def test_every_token_attends_to_every_other():
    """The feature is at the last position, after the padding, so the first token matters as much as the last."""
    text = siglip().text_encoder.eval()
    features = text(TEXT, MASK).embedding
    for position in range(6):
        other = TEXT.clone()
        other[:, position] = 11
        assert (text(other, MASK).embedding - features).abs().amax(dim=1).min() > 1e-6


def test_towers_that_do_not_fit_raise():
    vit = small_vit()
    text = SigLIPTextTower(vocabulary=20, length=6, width=8, depth=1, heads=2, embed_dim=16)
    recipe = OptimizerRecipe(partial(adamw), lr=0.1)
    with pytest.raises(ValueError, match=r"set backbone.global_pool=map"):
        SigLIP(vit, text, recipe)
    pooled = small_vit(embed_dim=32, global_pool="map")
    with pytest.raises(ValueError, match=r"widths 32 and 16; set a common width"):
        SigLIP(pooled, text, recipe)


@pytest.mark.parametrize("scale", ["paper", "tiny"])
def test_the_recipe_composes(scale):
    config = compose(["experiment=siglip_vitb16", f"scale={scale}", "run.dir=/tmp/run"])
    if scale == "tiny":
        method = configuration.instantiate(config.model)
        assert isinstance(method, SigLIP)
        groups = method.configure_optimizers().param_groups
        decayed = {name for group in groups for name in group["names"] if group["weight_decay"]}
        # the authors' code decays the weights of linear and convolutional layers, no embeddings and no biases
        assert decayed == {
            f"{name}.weight" for name, module in method.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
        }
    else:
        # the authors' weight decay of 1e-4 is not multiplied by the learning rate; AdamW's is
        assert config.optimizer.weight_decay * config.optimizer.lr == pytest.approx(1e-4)
        assert (config.optimizer.lr, config.data.text_length) == (1e-3, 64)
