import copy
from functools import partial

import lightning as L
import pytest
import torch
from torch.nn import functional as F

from src.datamodules.batches.base import BatchError
from src.datamodules.datamodule import DataModule
from src.datamodules.views.image import CenterCrop, RandomResizedCrop
from src.models.backbones import image_encoder
from src.models.backbones.image_encoder import mean_patch
from src.models.downstream.linear import LinearProtocol
from src.optim import OptimizerRecipe, lars
from tests.evaluation.toy import SIZE, Squares
from tests.toys import small_vit


def backbone():
    torch.manual_seed(0)
    return small_vit(img_size=SIZE, embed_dim=24, depth=2, drop_path_rate=0.5, proj_drop_rate=0.5)


def protocol(optimizer: OptimizerRecipe | None = None, **kwargs) -> LinearProtocol:
    return LinearProtocol(backbone(), optimizer or OptimizerRecipe(lars, lr=1.0), **kwargs)


def data(labelled: bool = True, length: int = 36, batch_size: int = 12) -> DataModule:
    return DataModule(
        source=partial(Squares, length=length, labelled=labelled),
        train_view=RandomResizedCrop(SIZE, scale=(0.5, 1.0)),
        eval_view=CenterCrop(SIZE, share=1.0),
        batch_size=batch_size,
        eval_batch_size=10,
        num_workers=0,
    )


def trainer(epochs: int, **kwargs) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **kwargs,
    )


def test_training_changes_the_head_alone():
    module = protocol()
    before = copy.deepcopy(module.backbone.state_dict())
    runner = trainer(2)
    runner.fit(module, datamodule=data())
    assert runner.global_step == 6
    assert all(torch.equal(before[name], value) for name, value in module.backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in module.backbone.parameters())
    assert [name for group in runner.optimizers[0].param_groups for name in group["names"]] == [
        "head.weight",
        "head.bias",
    ]
    assert not any(child.training for child in module.backbone.modules())
    assert module.norm.num_batches_tracked == 6


def test_the_backbone_stays_in_evaluation_mode():
    module = protocol(num_classes=3)
    module.build(3)
    image = torch.randn(4, 3, SIZE, SIZE)
    module.train()
    assert module.norm.training
    assert torch.equal(module.embed(image), module.embed(image))  # dropout is off


@pytest.mark.parametrize(("pool", "position"), [(None, "class token"), (mean_patch, "patches")])
def test_logits_are_the_linear_layer_on_standardized_features(pool, position):
    module = protocol(**({"pool": pool} if pool else {}))
    module.build(3)
    module.train()
    image, label = torch.randn(8, 3, SIZE, SIZE), torch.arange(8) % 3
    with torch.no_grad():
        tokens = module.backbone.forward_features(image).double()
        features = tokens[:, 0] if position == "class token" else tokens[:, 1:].mean(dim=1)
    standardized = (features - features.mean(dim=0)) / (features.var(dim=0, correction=0) + 1e-6).sqrt()
    logits = standardized @ module.head.weight.double().T
    step = module.training_step({"image": image, "label": label}, 0)
    torch.testing.assert_close(step["loss"].double(), F.cross_entropy(logits, label), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(step["embedding"].double(), features, atol=1e-6, rtol=1e-5)
    assert not [name for name, _ in module.norm.named_parameters()]


def test_the_initial_head_has_small_weights_and_zero_bias():
    module = protocol()
    module.build(400)
    assert module.head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert module.head.bias.abs().max() == 0


def test_validation_counts_every_labeled_image_once():
    module = protocol()
    runner = trainer(1)
    runner.fit(module, datamodule=data())
    module.eval()
    images, labels = [], []
    for batch in (datamodule := data()).val_dataloader():
        images.append(datamodule.on_after_batch_transfer(batch, 0)["image"])
        labels.append(batch["label"])
    with torch.no_grad():
        logits = module(torch.cat(images))
    label = torch.cat(labels)
    assert len(label) == 36
    top1 = (logits.argmax(dim=1) == label).float().mean()
    assert runner.callback_metrics["eval/top1"].item() == pytest.approx(top1.item())
    assert runner.callback_metrics["eval/top5"].item() == 1.0  # of three classes
    assert runner.callback_metrics["eval/loss"].item() == pytest.approx(F.cross_entropy(logits, label).item(), rel=1e-5)


def test_it_learns_linearly_separable_classes():
    module = protocol(OptimizerRecipe(torch.optim.AdamW, lr=0.02), pool=mean_patch)
    runner = trainer(6)
    runner.fit(module, datamodule=data(length=90, batch_size=15))
    assert runner.callback_metrics["eval/top1"].item() > 0.8  # chance is a third


def test_the_classes_come_from_the_data_and_are_saved(tmp_path):
    module = protocol()
    runner = trainer(1)
    runner.fit(module, datamodule=data())
    runner.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["classes"] == ["red", "green", "blue"]
    assert content["encoders"] == {"encoder": "backbone."}
    restored = protocol()
    restored.on_load_checkpoint(content)
    restored.load_state_dict(content["state_dict"])
    assert torch.equal(restored.head.weight, module.head.weight)


def test_data_without_labels_or_with_more_classes_are_refused():
    with pytest.raises(BatchError, match="LinearProtocol learns from labels, and the data has no classes"):
        trainer(1).fit(protocol(), datamodule=data(labelled=False))
    with pytest.raises(BatchError, match="the classifier has 2 classes, the data 3"):
        trainer(1).fit(protocol(num_classes=2), datamodule=data())


def test_the_backbone_is_checked_once_not_at_every_step(monkeypatch):
    checked = []
    monkeypatch.setattr(image_encoder, "check_image_backbone", checked.append)
    module = protocol(num_classes=4)
    module.build(4)
    batch = {"image": torch.randn(2, 3, SIZE, SIZE), "label": torch.tensor([0, 1])}
    for step in range(2):
        module.training_step(batch, step)
    assert checked == [module.backbone]
    assert "encoder.backbone.cls_token" not in module.state_dict()
    twin = copy.deepcopy(module)
    assert twin.encoders()["encoder"].backbone is twin.backbone
