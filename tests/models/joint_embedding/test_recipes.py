"""The recipes of the family as they are composed."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from src import configuration, train
from src.datamodules.batches.image import ImageBatch, MultiViewBatch
from src.errors import UserError
from src.models.backbones.image_encoder import cls_token, mean_patch
from src.models.losses.contrastive import dcl, dclw, nt_xent
from src.schedules import Horizon


def composed(*words: str) -> Any:
    return train.compose(words)


@pytest.mark.parametrize(
    ("views", "counts", "solarize"),
    [
        ("simclr", (2, 0), 0.0),
        ("moco", (2, 0), 0.0),
        ("byol", (2, 0), 0.2),
        ("swav", (2, 6), 0.0),
        ("dino", (2, 8), 0.2),
    ],
)
def test_the_papers_views_are_there_by_name(views, counts, solarize):
    config = composed("experiment=simclr_r50", "scale=paper", f"views@data.train_view={views}")
    view = configuration.instantiate(config.data.train_view)
    assert view.batch_type is MultiViewBatch
    kinds = [*view.views.values()], [*(view.local_views or {}).values()]
    assert tuple(sum(kind.count for kind in group) for group in kinds) == counts
    assert {kind.crop.size for kind in kinds[0]} == {224}
    assert {kind.crop.size for kind in kinds[1]} <= {96}
    assert max(kind.color.solarize for group in kinds for kind in group) == solarize


@pytest.mark.parametrize(
    ("experiment", "loss", "batch", "rate"),
    [("simclr_r50", nt_xent, 4096, 4.8), ("dcl_r50", dcl, 256, 1.2), ("dclw_r50", dclw, 256, 1.2)],
)
def test_the_decoupled_losses_are_simclr_with_another_loss(experiment, loss, batch, rate):
    config = composed(f"experiment={experiment}", "scale=paper")
    assert configuration.instantiate(config.model.loss) is loss
    assert config.data.batch_size == batch
    assert config.optimizer.lr == pytest.approx(rate)
    assert config.trainer.sync_batchnorm


@pytest.mark.parametrize(
    "experiment",
    [
        "simclr_r50",
        "byol_r50",
        "moco_v2_r50",
        "mochi_r50",
        "moco_v3_r50",
        "barlow_twins_r50",
        "vicreg_r50",
        "swav_r50",
        "swav_r50_2crops",
        "swav_r50_b256",
        "nnclr_r50",
        "densecl_r50",
        "pixpro_r50",
        "supcon_r50",
        "look_r50",
        "supervised_r50",
        "supervised_vits",
    ],
)
@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_at_the_tiny_scale_every_method_takes_either_backbone(experiment, backbone):
    config = composed(f"experiment={experiment}", "scale=tiny", f"backbone={backbone}")
    module = configuration.instantiate(config.model)
    encoder = next(iter(module.encoders().values()))
    assert encoder.dim == {"vit": 64, "resnet": 128}[backbone]
    assert encoder(torch.zeros(1, 3, 32, 32)).embedding.shape == (1, encoder.dim)
    if config.data.train_view.get("local_views"):
        assert encoder(torch.zeros(2, 3, 16, 16)).embedding.shape == (2, encoder.dim)
    assert config.data.train_view._target_.startswith("src.datamodules.views.multi.")
    kind = configuration.instantiate(config.data.train_view).batch_type
    assert kind is (ImageBatch if experiment.startswith("supervised") else MultiViewBatch)


@pytest.mark.parametrize(
    ("experiment", "backbone", "rate", "decays"),
    [
        ("moco_v2_r50", "resnet18", 0.03, {1e-4}),
        ("mochi_r50", "resnet18", 0.03, {1e-4}),
        ("moco_v3_vits", "vit_tiny_patch16_224", 2.4e-3, {0.1}),
        ("moco_v3_r50", "resnet18", 4.8, {1e-6, 0.0}),  # LARS spares biases and norms, the others decay everything
    ],
)
def test_the_optimizers_of_moco_are_the_papers(experiment, backbone, rate, decays):
    words = [f"experiment={experiment}", "scale=paper", f"backbone.model_name={backbone}", "model.hidden_dim=64"]
    module = configuration.instantiate(composed(*words).model)
    groups = module.configure_optimizers().param_groups
    assert [group["lr"] for group in groups] == [pytest.approx(rate)] * len(groups)
    assert {group["weight_decay"] for group in groups} == decays
    assert {group["momentum"] for group in groups if "betas" not in group} <= {0.9}
    learning = [name for group in groups for name in group["names"]]
    assert any(name.endswith(".bias") for name in learning)
    assert not any(name.startswith("teacher.") or "patch_embed" in name or "pos_embed" in name for name in learning)


def test_moco_v3_has_the_papers_heads_and_pool_for_each_kind_of_backbone():
    for experiment, layers, norms, pool, temperature in (
        ("moco_v3_vitb", 3, 2, cls_token, 0.2),
        ("moco_v3_r50", 2, 1, mean_patch, 1.0),
    ):
        config = composed(f"experiment={experiment}", "scale=paper").model
        assert (config.projector_layers, 1 + config.predictor_norm, config.temperature) == (layers, norms, temperature)
        assert (configuration.instantiate(config.pool) if "pool" in config else mean_patch) is pool
    assert composed("experiment=moco_v3_vits", "scale=paper").backbone.num_heads == 12


def test_barlow_twins_takes_the_steps_of_the_authors_32_gpus():
    """There gradients are 1/32 of ours: a bias' step 0.0048 * g / 32, a matrix' direction g / 32 + 1e-6 * w."""
    config = composed("experiment=barlow_twins_r50", "scale=paper", "model.hidden_dim=8", "model.projection_dim=8")
    optimizer = configuration.instantiate(config.model).configure_optimizers()
    rates = {group["params"][0].ndim == 1: group["lr"] for group in optimizer.param_groups}
    assert rates == {False: pytest.approx(0.2 * 8), True: pytest.approx(0.0048 * 8 / 32)}  # a batch of 2048
    for group in optimizer.param_groups:
        single = {p.ndim == 1 for p in group["params"]}
        assert len(single) == 1
        assert group["weight_decay"] == (0 if single == {True} else pytest.approx(32e-6))
    for experiment in ("barlow_twins_r50", "vicreg_r50"):
        config = composed(f"experiment={experiment}", "scale=paper")
        schedule = configuration.instantiate(config.schedules.optimizer.lr)
        assert schedule.value(1000, Horizon(1000, 1, 2048)) == pytest.approx(0.0016)


@pytest.mark.parametrize(
    ("experiment", "interpolation"),
    [
        ("moco_v2_r50", "bilinear"),
        ("mochi_r50", "bilinear"),
        ("densecl_r50", "bilinear"),
        ("pixpro_r50", "bilinear"),
        ("supcon_r50", "bilinear"),
        ("simsiam_r50", "bilinear"),
        ("moco_v3_r50", "bilinear"),
        ("moco_v3_vitb", "bilinear"),
        ("swav_r50", "bilinear"),
        ("swav_r50_2crops", "bilinear"),
        ("swav_r50_b256", "bilinear"),
        ("supervised_r50", "bilinear"),
        ("simclr_r50", "bicubic"),
        ("byol_r50", "bicubic"),
        ("barlow_twins_r50", "bicubic"),
        ("vicreg_r50", "bicubic"),
        ("dino_vitb", "bicubic"),
        ("ibot_vitb", "bicubic"),
        ("dinov2_vitl14", "bicubic"),
    ],
)
def test_crops_are_interpolated_as_the_authors_do(experiment, interpolation):
    for scale in ("paper", "tiny"):
        view = configuration.instantiate(composed(f"experiment={experiment}", f"scale={scale}").data.train_view)
        kinds = [*view.views.values(), *(view.local_views or {}).values()] if hasattr(view, "views") else [view]
        assert {kind.crop.interpolation for kind in kinds} == {interpolation}


@pytest.mark.parametrize(
    ("experiment", "zero"),
    [
        *[(name, False) for name in ("moco_v2_r50", "mochi_r50", "swav_r50", "swav_r50_b256", "dino_r50")],
        *[(name, False) for name in ("densecl_r50", "pixpro_r50", "supcon_r50")],
        *[(name, True) for name in ("simclr_r50", "byol_r50", "moco_v3_r50", "barlow_twins_r50", "vicreg_r50")],
        ("simsiam_r50", True),
        ("supervised_r50", False),
    ],
)
def test_residual_branches_start_at_zero_where_the_authors_do_so(experiment, zero):
    assert composed(f"experiment={experiment}", "scale=paper").backbone.zero_init_last is zero


def test_moco_s_and_simsiam_s_rates_change_once_an_epoch():
    """The authors' rate / 2 * (1 + cos(pi * epoch / epochs))."""
    for experiment, peak, epochs in (("moco_v2_r50", 0.03, 200), ("mochi_r50", 0.03, 200), ("simsiam_r50", 0.1, 100)):
        rate = configuration.instantiate(composed(f"experiment={experiment}", "scale=paper").schedules.optimizer.lr)
        run = Horizon(total_steps=epochs * 50, steps_per_epoch=50, batch_size=256)
        for epoch in (0, 1, epochs - 1):
            expected = peak / 2 * (1 + math.cos(math.pi * epoch / epochs))
            assert [rate.value(50 * epoch + step, run) for step in (0, 49)] == pytest.approx([expected] * 2)


@pytest.mark.parametrize(
    ("experiment", "scales", "warm", "rate", "clip", "frozen", "local"),
    [
        ("dino_vits", ([0.4, 1.0], [0.05, 0.4]), 30, (2e-3, 1e-6), 3.0, "1 epoch", 8),
        ("dino_vitb", ([0.25, 1.0], [0.05, 0.25]), 50, (3e-3, 2e-6), 0.3, "3 epochs", 10),
        ("ibot_vits", ([0.25, 1.0], [0.05, 0.25]), 30, (2e-3, 1e-6), 3.0, "1 epoch", 10),
        ("ibot_vitb", ([0.32, 1.0], [0.05, 0.32]), 50, (3e-3, 2e-6), 0.3, "3 epochs", 10),
    ],
)
def test_dino_s_and_ibot_s_recipes_are_the_authors(experiment, scales, warm, rate, clip, frozen, local):
    config = composed(f"experiment={experiment}", "scale=paper")
    epochs = config.trainer.max_epochs
    assert epochs == {"dino_vits": 300, "ibot_vits": 800}.get(experiment, 400)
    run = Horizon(total_steps=epochs * 1250, steps_per_epoch=1250, batch_size=1024, max_warmup=0.2)
    lr = configuration.instantiate(config.schedules.optimizer.lr)
    # the authors' numpy.linspace has the peak in the last step of the warm-up already
    assert [lr.value(step, run) for step in (0, 12499, 12500, run.total_steps)] == pytest.approx(
        [0.0, rate[0], rate[0], rate[1]]
    )
    names = ["teacher_temperature"] + (["patch_teacher_temperature"] if "ibot" in experiment else [])
    for name in names:
        temperature = configuration.instantiate(config.schedules[name])
        for epoch, value in ((0, 0.04), (1, 0.04 + 0.03 / (warm - 1)), (warm - 1, 0.07), (warm, 0.07)):
            values = [temperature.value(1250 * epoch + step, run) for step in (0, 1249)]
            assert values == pytest.approx([value] * 2, rel=1e-12)
    assert (config.callbacks.gradient_clip.max_norm, config.callbacks.freeze.duration) == (clip, frozen)
    view = config.data.train_view
    assert [view.views[name].crop.scale for name in view.views] == [scales[0]] * 2
    assert (view.local_views.local.crop.scale, view.local_views.local.count) == (scales[1], local)
    assert config.model.train_gain is experiment.endswith("vits")


def test_dino_s_resnet_has_the_authors_batch():
    config = composed("experiment=dino_r50", "scale=paper")
    assert (config.data.batch_size, config.optimizer.lr, config.trainer.max_epochs) == (512, pytest.approx(0.06), 100)


def test_swav_s_recipes_are_the_authors():
    whole = composed("experiment=swav_r50", "scale=paper")
    module = configuration.instantiate(whole.model)
    groups = module.configure_optimizers().param_groups
    assert {(group["lr"], group["weight_decay"], group["always_adapt"]) for group in groups} == {(4.8, 1e-6, True)}
    rate = configuration.instantiate(whole.schedules.optimizer.lr)
    run = Horizon(total_steps=800 * 312, steps_per_epoch=312, batch_size=4096)
    ends = [rate.value(step, run) for step in (0, 3120, run.total_steps)]
    assert ends == [pytest.approx(0.3), pytest.approx(4.8), pytest.approx(0.0048)]
    assert run.steps(whole.callbacks.freeze.duration) == 313
    frozen = [name for name, _ in module.named_parameters() if re.search(whole.callbacks.freeze.pattern, name)]
    assert frozen == ["prototypes.weight"]

    small = composed("experiment=swav_r50_b256", "scale=paper")
    run = Horizon(total_steps=400 * 5004, steps_per_epoch=5004, batch_size=256)
    rate = configuration.instantiate(small.schedules.optimizer.lr)
    assert [rate.value(step, run) for step in (0, run.total_steps)] == [pytest.approx(0.6), pytest.approx(0.0006)]
    queue = configuration.instantiate(small.schedules.use_queue)
    assert [bool(queue.value(step, run)) for step in (0, 15 * 5004 - 1, 15 * 5004)] == [False, False, True]
    assert (small.model.queue_size, small.data.batch_size) == (3840, 256)

    views = composed("experiment=swav_r50_2crops", "scale=paper").data.train_view
    assert "local_views" not in views
    assert views.views.both.crop.scale == [0.08, 1.0]


def test_a_momentum_outside_of_0_and_1_ends_the_command_with_its_key(tmp_path: Path):
    words = [
        "experiment=byol_r50",
        "scale=tiny",
        "backbone=vit",
        "model.teacher_momentum=1.5",
        f"paths.runs={tmp_path}",
    ]
    small = ["data.source.count={train: 8, val: 4, test: 4}", "data.source.cache_dir=null", "data.batch_size=4"]
    with pytest.raises(UserError, match=r"model\.teacher_momentum.*must lie in \[0, 1\]; got 1.5"):
        train.main([*words, *small, "data.num_workers=0", "data.train_samples=null", "data.eval_samples=null"])


def test_views_that_do_not_suit_the_method_end_the_command_with_their_key(tmp_path: Path):
    words = ["experiment=simclr_r50", "scale=tiny", "views@data.train_view=swav", f"paths.runs={tmp_path}"]
    small = ["data.source.count={train: 8, val: 4, test: 4}", "data.source.cache_dir=null", "data.batch_size=4"]
    quiet = ["callbacks.visualizations=null", "data.train_view.local_views.small.crop.size=32", "data.num_workers=0"]
    with pytest.raises(
        UserError, match=r"data\.train_view: .* 2 in train_view\.views and 4 in train_view\.local_views"
    ):
        train.main([*words, *small, *quiet, "data.train_samples=null", "data.eval_samples=null"])


def test_ibot_is_dino_with_its_own_views_and_masks():
    config = composed("experiment=ibot_vits", "scale=paper")
    views = config.data.train_view
    assert (views.local_views.local.count, views.local_views.local.crop.scale) == (10, [0.05, 0.25])
    assert [kind.crop.scale for kind in views.views.values()] == [[0.25, 1.0]] * 2
    assert [kind.color.blur for kind in views.views.values()] == [1.0, 0.1]  # DINO's colors
    assert config.optimizer.lr == pytest.approx(2e-3)
    assert config.schedules.optimizer.weight_decay.end == 0.4
    assert config.callbacks.gradient_clip.max_norm == 3.0
    assert config.schedules.patch_teacher_temperature.end == 0.07


@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_dino_takes_local_views_with_either_backbone(backbone):
    config = composed("experiment=dino_r50", "scale=tiny", f"backbone={backbone}")
    module = configuration.instantiate(config.model)
    batch = {"views": torch.zeros(2, 2, 3, 32, 32), "local_views": torch.zeros(2, 4, 3, 16, 16)}
    assert module.training_step(batch, 0)["embedding"].shape == (2, {"vit": 64, "resnet": 128}[backbone])
    assert config.optimizer.algorithm == {"_target_": "src.optim.adamw", "_partial_": True}
    paper = composed("experiment=dino_r50", "scale=paper")
    optimizer = configuration.instantiate(paper.optimizer).build(torch.nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.9
    assert paper.schedules.optimizer.weight_decay.end == 1e-4
