"""Runs whose weights are stored in half precision (``trainer.precision=bf16-true``)."""

from __future__ import annotations

import copy
import re

import lightning as L
import pytest
import torch
from torch import nn

from src import configuration
from src.configuration import CONFIGS
from src.errors import SettingError
from src.models.functional import in_full_precision
from src.models.heads.dino import DINOHead

# an experiment for each recipe; the others have the method of one of these
EXPERIMENTS = {
    "action": "action_vitb",
    "align": "align_b7",
    "bag_of_words": "bag_of_words_vitb32",
    "barlow_twins": "barlow_twins_r50",
    "byol": "byol_r50",
    "clip": "clip_vitb16",
    "clip_refine": "clip_refine_vitb32",
    "clip_rocket": "clip_rocket_r50",
    "coca": "coca_vitb32",
    "cua": "cua_vitb32",
    "densecl": "densecl_r50",
    "dino": "dino_vits",
    "dinov2": "dinov2_vitl14",
    "dpt": "depth_dpt_vitb",
    "dreamlip": "dreamlip_vitb16",
    "droppos": "droppos_vitb",
    "filip": "filip_vitb32",
    "finetune": "finetune_vitb",
    "gmml": "gmml_vits",
    "ibot": "ibot_vits",
    "ijepa": "ijepa_vitb",
    "linear": "linear_vitb",
    "linear_action": "action_linear_vitb",
    "look": "look_r50",
    "mae": "mae_tiny",
    "mixedae": "mixedae_vitb",
    "mochi": "mochi_r50",
    "moco_v2": "moco_v2_r50",
    "moco_v3": "moco_v3_vits",
    "nnclr": "nnclr_r50",
    "normals": "normals_dpt_vitb",
    "pixpro": "pixpro_r50",
    "segmentation_linear": "segmentation_linear_vitb",
    "siglip": "siglip_vitb16",
    "simclr": "simclr_r50",
    "simmim": "simmim_vitb",
    "simsiam": "simsiam_r50",
    "slip": "slip_vitb16",
    "sit": "sit_vits",
    "sts": "sts_r2plus1d",
    "supervised": "supervised_r50",
    "supcon": "supcon_r50",
    "swav": "swav_r50",
    "vicreg": "vicreg_r50",
    "videomae": "videomae_vitb",
    "xclip": "xclip_vitb16",
}
SAME_METHOD = {"laclip", "lit", "segmentation_upernet", "vitdet"}
REFUSED = {"mask_rcnn": "detection_r50"}
SMALL = (
    "scale=tiny",
    "image_size=32",
    "local_image_size=16",
    "data.source.count={train: 16, val: 4, test: 4}",
    "data.source.cache_dir=null",
    "data.train_samples=null",
    "data.eval_samples=null",
    "data.batch_size=4",
    "data.num_workers=0",
)


def test_every_recipe_is_tried_or_has_the_method_of_one_that_is():
    shipped = {
        path.stem
        for path in CONFIGS.glob("recipe/*.yaml")
        if not path.stem.startswith("_") and re.search(r"^  _target_: src\.models", path.read_text(), re.MULTILINE)
    }
    assert EXPERIMENTS.keys() | SAME_METHOD | REFUSED.keys() >= {"dino", "ibot", "swav"}
    assert shipped - SAME_METHOD - REFUSED.keys() <= EXPERIMENTS.keys()


class FirstLoss(L.Callback):
    loss = torch.tensor(torch.nan)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.loss = outputs["loss"].detach()


def step(experiment: str, *overrides: str) -> tuple[L.LightningModule, torch.Tensor]:
    """Takes a step; returns the method and the loss."""
    torch.set_num_threads(1)
    config = configuration.compose("train", [f"experiment={experiment}", *SMALL, *overrides])
    data = configuration.instantiate(config.data)
    data.prepare_data()
    torch.manual_seed(0)
    method = configuration.instantiate(config.model)
    first = FirstLoss()
    trainer = L.Trainer(
        accelerator="cpu",
        precision="bf16-true",
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        callbacks=[first],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(method, datamodule=data)
    return method, first.loss


@pytest.mark.parametrize("experiment", EXPERIMENTS.values())
def test_a_step_with_half_precision_weights_moves_them_to_finite_values(experiment, tmp_path):
    prototypes = ["model.prototypes=4"] if experiment == "swav_r50" else []
    method, loss = step(experiment, f"run.dir={tmp_path}", *prototypes)
    assert torch.isfinite(loss)
    learning = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert {p.dtype for p in learning.values()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in learning.values())
    gradients = {name: p.grad for name, p in learning.items() if p.grad is not None}
    assert any(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_detection_refuses_boxes_in_half_precision():
    with pytest.raises(SettingError, match=r"trainer\.precision=bf16-true rounds .*; use bf16-mixed"):
        step("detection_r50")


@pytest.mark.parametrize(
    "module", [nn.Linear(6, 4), nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False), DINOHead(6, 5, hidden_dim=8)]
)
def test_a_module_in_full_precision_is_the_one_with_its_weights_cast(module):
    """Value, gradients and a batch norm's statistics, and the module itself where nothing is stored in half."""
    torch.manual_seed(0)
    half = copy.deepcopy(module).bfloat16().train()
    wide = copy.deepcopy(half).float()
    x = torch.randn(5, 6).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = in_full_precision(half, x)
    expected = wide(x.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    if expected.requires_grad:
        found.square().sum().backward()
        expected.square().sum().backward()
        for one, two in zip(half.parameters(), wide.parameters(), strict=True):
            assert (one.grad is None) == (two.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(one.grad, two.grad.bfloat16(), rtol=1e-2, atol=1e-6)
    for one, two in zip(half.buffers(), wide.buffers(), strict=True):
        assert torch.equal(one, two.to(one.dtype))
    assert torch.equal(in_full_precision(wide, x), wide(x.float()))
