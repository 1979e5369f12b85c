"""Tests of detection: training, frozen parts and validation."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import timm
import torch
from torch import nn

from src.datamodules.batches.base import BatchError
from src.datamodules.datamodule import DataModule
from src.datamodules.dataset import SampleKey, ViewedDataset
from src.datamodules.scenes.source import ScenesSource
from src.datamodules.views.detection import DetectionView
from src.models.backbones.weights import load_backbone
from src.models.downstream.detection import Detection
from src.models.heads.mask_rcnn import MaskRCNNOnMaps
from src.models.heads.pyramid import ConvPyramid, SimplePyramid
from src.optim import OptimizerRecipe, adamw
from tests.toys import small_vit

HEADS = partial(
    MaskRCNNOnMaps,
    anchor_sizes=(8, 16, 24, 40, 64),
    width=32,
    hidden=64,
    candidates=(64, 32),
    proposals=(64, 32),
    regions=24,
    anchors=48,
)
SCENES = partial(ScenesSource, count=8, resolution=64, fields=("boxes", "box_labels", "instance_masks"))


def vit(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return small_vit(**{"img_size": 64, "embed_dim": 64, "depth": 2, **kwargs})


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=0, channels=[8, 8, 16, 16])


def detection(backbone: nn.Module | None = None, *, heads=HEADS, classes: int | None = 3, **kwargs) -> Detection:
    backbone = backbone or vit()
    if hasattr(backbone, "patch_embed"):
        pyramid = SimplePyramid(backbone, channels=32, window=4, global_blocks=1)
    else:
        pyramid = ConvPyramid(backbone, channels=32)
    module = Detection(pyramid, OptimizerRecipe(adamw, lr=2e-3, weight_decay=0.1), heads=heads, **kwargs)
    if classes is not None:
        module.build(classes)
    return module


def batch(*boxes: list[tuple[int, int, int, int]]) -> dict:
    """Noise images whose boxes have the classes 0, 1, ... and filled masks."""
    fields: dict = {"boxes": [], "box_labels": [], "masks": []}
    for image_boxes in boxes:
        masks = torch.zeros(len(image_boxes), 64, 64, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, image_boxes, strict=True):
            mask[y0:y1, x0:x1] = True
        fields["boxes"].append(torch.tensor(image_boxes, dtype=torch.float32).view(-1, 4))
        fields["box_labels"].append(torch.arange(len(image_boxes)))
        fields["masks"].append(masks)
    image = torch.randn(len(boxes), 3, 64, 64, generator=torch.Generator().manual_seed(1))
    rest = {"size": torch.full((len(boxes), 2), 64), "replaced": torch.zeros(len(boxes), dtype=torch.bool)}
    return {"image": image, **fields, **rest}


def scenes_batch(count: int = 8) -> dict:
    samples = ViewedDataset(SCENES("train"), DetectionView(masks=True), seed=0)[[SampleKey(0, n) for n in range(count)]]
    return {**samples, "image": (samples["image"].float() / 255 - 0.45) / 0.225}


def test_it_memorizes_boxes_and_masks_of_eight_images():
    data = scenes_batch()
    module = detection(classes=len(SCENES("train").classes))
    optimizer = module.configure_optimizers()
    for _ in range(55):
        optimizer.zero_grad()
        module.training_step(data, 0)["loss"].backward()
        nn.utils.clip_grad_norm_(module.parameters(), 5.0)
        optimizer.step()
    module.eval()
    with torch.no_grad():
        module.validation_step(data, 0)
        drawn = module.visualize(data)["detections"]
    scores = module.average_precision.scores()
    assert scores["box_ap50"] > 0.8
    assert scores["mask_ap50"] > 0.7
    assert drawn.shape == (8, 2, 3, 64, 64)
    assert ((drawn[:, 0] != data["image"]).flatten(1).any(dim=1)).all()  # the objects are drawn on the image


def test_empty_images_train_and_boxes_without_area_are_left_out():
    module = detection()
    data = batch([], [(4, 4, 20, 20), (10, 10, 10, 30)])
    out = module.training_step(data, 0)
    assert out["loss"].isfinite()
    torch.testing.assert_close(out["loss"], torch.stack(list(out["logs"].values())).sum())
    assert not any(value.requires_grad for value in out["logs"].values())
    assert [len(objects["boxes"]) for objects in module.objects(data)] == [0, 1]
    assert [objects["masks"].shape for objects in module.objects(data)] == [(0, 64, 64), (1, 64, 64)]
    assert module.training_step(batch([], []), 0)["loss"].isfinite()


@pytest.mark.parametrize("logs", [False, True])
def test_dropped_boxes_are_counted_at_the_steps_that_log(logs, monkeypatch):
    module, logged = detection(), {}
    module.log, module.log_dict = logged.__setitem__, logged.update
    monkeypatch.setattr(Detection, "trainer", SimpleNamespace(accumulate_grad_batches=1))
    for place in ("pretrain_module", "downstream.detection"):
        monkeypatch.setattr(f"src.models.{place}.logs_now", lambda _: logs)
    data = batch([(9, 9, 9, 9)], [(4, 4, 20, 20), (10, 10, 10, 30)])
    module.on_train_batch_end({"loss": torch.tensor(1.5)}, data, 0)
    assert logged == ({"loss/total": 1.5, "health/dropped_boxes": 2.0} if logs else {})


def test_crowds_are_neither_learned_nor_false_negatives():
    module, data = detection(), {**batch([(4, 4, 20, 20), (30, 30, 60, 60)]), "crowd": [torch.tensor([False, True])]}
    (objects,) = module.objects(data)
    assert objects["iscrowd"].tolist() == [False, True]
    single = module.without_crowds(objects)
    assert single.keys() == {"boxes", "labels", "masks"}
    assert single["labels"].tolist() == [0]
    module.eval()
    correct = {name: value[:1] for name, value in objects.items()}
    module.forward = lambda image, sizes: [{**correct, "scores": torch.tensor([0.9])}]
    module.validation_step(data, 0)
    assert module.average_precision.scores()["box_ap"] == 1.0  # class 1, a crowd, is not required


def test_replaced_samples_are_not_validated():
    module = detection().eval()
    data = batch([(4, 4, 20, 20)], [(8, 8, 40, 40)])
    data["replaced"][1] = True
    detections = [{**objects, "scores": torch.ones(len(objects["boxes"]))} for objects in module.objects(data)]
    module.forward = lambda image, sizes: detections
    module.validation_step(data, 0)
    assert len(module.average_precision.groundtruth_labels) == len(module.average_precision.detection_labels) == 1


@pytest.mark.parametrize("make", [vit, convnet])
def test_a_frozen_backbone_has_no_gradient_and_stays_in_evaluation_mode(make):
    module = detection(make(), frozen=True).train()
    before = {name: value.clone() for name, value in module.pyramid.backbone.state_dict().items()}
    module.training_step(batch([(4, 4, 20, 20)]), 0)["loss"].backward()
    assert all(parameter.grad is None for parameter in module.pyramid.backbone.parameters())
    assert not any(child.training for child in module.pyramid.backbone.modules())
    assert all(parameter.grad is not None for parameter in module.parameters() if parameter.requires_grad)
    assert all(torch.equal(value, before[name]) for name, value in module.pyramid.backbone.state_dict().items())
    names = [name for group in module.configure_optimizers().param_groups for name in group["names"]]
    assert names
    assert not any("backbone" in name for name in names)


def test_frozen_norms_keep_statistics_and_weights_and_the_rest_is_trained():
    module = detection(convnet(), frozen_norms=True).train()
    norm, convolution = module.pyramid.backbone.layer1[0].bn1, module.pyramid.backbone.conv1
    before = norm.running_mean.clone()
    module.training_step(batch([(4, 4, 20, 20)]), 0)["loss"].backward()
    assert torch.equal(norm.running_mean, before)
    assert norm.weight.grad is None
    assert convolution.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_layer_decay_is_that_of_vitdet(pool):
    optimizer = detection(vit(depth=3, global_pool=pool), layer_decay=0.5).configure_optimizers()
    multiplier = {name: group["lr_multiplier"] for group in optimizer.param_groups for name in group["names"]}
    start = "pyramid.vit.backbone"
    by_hand = {  # three blocks: 0.5 ** (4 - layer), layer 0 the patches, then the blocks
        f"{start}.pos_embed": 0.0625,
        f"{start}.patch_embed.proj.weight": 0.0625,
        f"{start}.blocks.0.attn.qkv.weight": 0.125,
        f"{start}.blocks.2.mlp.fc2.weight": 0.5,
        "pyramid.levels.0.0.weight": 1.0,
        "heads.rpn.head.cls_logits.weight": 1.0,
    }
    assert {name: multiplier[name] for name in by_hand} == by_hand
    (group,) = (group for group in optimizer.param_groups if f"{start}.pos_embed" in group["names"])
    assert group["weight_decay"] == 0.0


def test_data_without_masks_trains_boxes_alone():
    data = batch([(4, 4, 20, 20)])
    del data["masks"]
    with pytest.raises(BatchError, match=r"no masks: model\.heads\.masks=false"):
        detection().training_step(data, 0)
    module = detection(heads=partial(HEADS, masks=False))
    assert module.training_step(data, 0)["logs"].keys() == {"objectness", "proposals", "classes", "boxes"}
    module.eval()
    module.validation_step(data, 0)
    assert module.average_precision.scores().keys() == {"box_ap", "box_ap50", "box_ap75"}
    assert module.visualize(data)["detections"].shape == (1, 2, 3, 64, 64)


def test_a_run_logs_scores_and_its_checkpoint_restores_encoder_and_heads(tmp_path):
    data = DataModule(
        source=SCENES,
        train_view=DetectionView(masks=True),
        eval_view=DetectionView(masks=True),
        batch_size=4,
        eval_batch_size=4,
        num_workers=0,
    )
    module = detection(convnet(), classes=None)
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=1, limit_val_batches=1, accelerator="cpu", enable_checkpointing=False, **silent)
    trainer.fit(module, datamodule=data)
    assert module.num_classes == len(data.classes)
    assert {"eval/box_ap", "eval/mask_ap", "eval/box_ap50", "eval/mask_ap75"} <= trainer.callback_metrics.keys()
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    other = detection(convnet(), classes=None)
    other.on_load_checkpoint(content)
    other.load_state_dict(content["state_dict"])
    image = batch([])["image"]
    detections, restored = (network.eval()(image, [(64, 64)])[0] for network in (module, other))
    assert all(torch.equal(value, restored[name]) for name, value in detections.items())
    small = timm.create_model("resnet18", num_classes=0, channels=[8, 8, 16, 16])
    backbone = load_backbone(small, tmp_path / "last.ckpt")
    assert torch.equal(backbone.conv1.weight, module.pyramid.backbone.conv1.weight)


def test_a_wrong_layer_decay_is_refused():
    with pytest.raises(ValueError, match="layer_decay must lie in"):
        detection(layer_decay=0.0)
