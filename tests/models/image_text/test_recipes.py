"""What the recipes of image-text methods decide, whatever the data: the evaluation crop, decay, the first weights."""

import pytest
import torch
from omegaconf import OmegaConf

from src import configuration
from src.datamodules.views.image import CenterCrop
from src.datamodules.views.squeezed import SqueezedCenterCrop, SqueezedCrop, SqueezedRandAugmentCrop
from src.train import compose

WHOLE, SQUEEZED = CenterCrop(224, share=1.0), SqueezedCenterCrop(224, share=1.0)


def composed(experiment: str, *words: str):
    return compose(
        [f"experiment={experiment}", "data=imagenet", "paths.data=/none", "scale=paper", "run.dir=/tmp/run", *words]
    )


@pytest.mark.parametrize(
    ("experiment", "view"),
    [
        ("clip_vitb32", WHOLE),
        ("clip_refine_vitb32", WHOLE),
        ("laclip_vitb16", WHOLE),
        ("coca_vitb32", WHOLE),
        ("filip_vitb32", WHOLE),
        ("bag_of_words_vitb32", WHOLE),
        ("siglip_vitb16", SQUEEZED),
        ("lit_vitb16", SQUEEZED),
        ("align_b7", SqueezedCenterCrop(289, share=0.8353)),
        ("mae_vitb", CenterCrop(224, share=0.875)),
    ],
)
def test_the_recipe_decides_the_evaluation_crop(experiment, view):
    """On data whose own crop is 0.875 of the shorter side. ALIGN crops 289 out of 346 pixels."""
    assert configuration.instantiate(composed(experiment).data.eval_view) == view
    assert round(289 / 346, 4) == 0.8353


def test_training_views_squeeze_where_the_authors_do():
    align = configuration.instantiate(composed("align_b7").data.train_view)
    assert isinstance(align, SqueezedCrop)
    assert (align.size, tuple(align.scale), tuple(align.ratio), align.flip) == (289, (0.6977, 0.6977), (1.0, 1.0), 0.5)
    assert round((289 / 346) ** 2, 4) == 0.6977
    assert configuration.instantiate(composed("siglip_vitb16").data.train_view) == SQUEEZED
    lit = configuration.instantiate(composed("lit_vitb16").data.train_view)
    assert isinstance(lit, SqueezedRandAugmentCrop)
    assert (lit.policy, lit.flip, lit.erase, tuple(lit.scale)) == ("rand-m10-n2-p1.0", 0.5, 0.0, (1.0, 1.0))
    tiny = configuration.instantiate(compose(["experiment=lit_vitb16", "scale=tiny"]).data.train_view)
    assert (tiny.policy, tiny.flip) == (None, 0.0)


@pytest.mark.parametrize("experiment", ["siglip_vitb16", "lit_vitb16"])
def test_weights_lose_a_ten_thousandth_at_the_peak_whatever_the_rate(experiment):
    """big_vision multiplies the decay by the schedule and not by the rate: rate times decay stays 1e-4."""
    for rate in (1e-3, 4e-3):
        optimizer = composed(experiment, f"optimizer.lr={rate}").optimizer
        assert optimizer.lr * optimizer.weight_decay == pytest.approx(1e-4)
    assert composed(experiment).trainer.gradient_clip_val == 1.0


def test_one_key_sets_the_activation_of_both_towers():
    for experiment in ("clip_vitb32", "clip_refine_vitb32", "filip_vitb32", "xclip_vitb32"):
        config = compose([f"experiment={experiment}", "scale=tiny", "activation=quick_gelu", "run.dir=/tmp/run"])
        assert (config.backbone.act_layer, config.model.text.activation) == ("quick_gelu", "quick_gelu")


def test_image_towers_start_as_the_authors_do():
    """CLIP's positions have the standard deviation width^-0.5, LaCLIP's and timm's 0.02."""
    for experiment, expected in (("clip_vitb32", 64**-0.5), ("siglip_vitb16", 64**-0.5), ("laclip_vitb16", 0.02)):
        torch.manual_seed(0)
        config = compose([f"experiment={experiment}", "scale=tiny", "run.dir=/tmp/run"])
        model = OmegaConf.to_container(config.model.backbone, resolve=True)
        backbone = configuration.instantiate(OmegaConf.create(model))
        assert backbone.pos_embed.std().item() == pytest.approx(expected, rel=0.05), experiment
