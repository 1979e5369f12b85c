from functools import partial

import lightning as L
import pytest
import timm
import torch
from torch.nn import functional as F

from src.datamodules.batches.base import BatchError
from src.datamodules.datamodule import DataModule
from src.datamodules.views.augment import RandAugmentCrop
from src.datamodules.views.image import CenterCrop
from src.models.downstream.finetune import FineTune, layer_rules, layer_rules_below
from src.optim import OptimizerRecipe, Rule
from tests.evaluation.toy import SIZE, Squares
from tests.toys import small_vit


def vit(**kwargs):
    torch.manual_seed(0)
    return small_vit(**{"embed_dim": 24, "depth": 3, "global_pool": "avg", **kwargs})


def recipe(**kwargs) -> OptimizerRecipe:
    return OptimizerRecipe(partial(torch.optim.AdamW, betas=(0.9, 0.999)), lr=0.1, weight_decay=0.05, **kwargs)


def finetune(classes: int = 4, backbone=None, optimizer=None, **kwargs) -> FineTune:
    module = FineTune(backbone or vit(), optimizer or recipe(), **kwargs)
    module.build(classes)
    return module


def batch(size: int = 6, classes: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(size, 3, 16, 16, generator=generator),
        "label": torch.arange(size) % classes,
        "index": torch.arange(size),
        "replaced": torch.zeros(size, dtype=torch.bool),
    }


def test_layer_decay_is_that_of_the_paper():
    optimizer = finetune(layer_decay=0.5).configure_optimizers()
    multiplier, decay = {}, {}
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.1 * group["lr_multiplier"])
        for name in group["names"]:
            multiplier[name], decay[name] = group["lr_multiplier"], group["weight_decay"]
    # three blocks: layers 0 (stem), 1, 2, 3 (blocks), 4 (fresh norm and classifier), 0.5 ** (4 - layer)
    by_hand = {
        "backbone.cls_token": 0.0625,
        "backbone.pos_embed": 0.0625,
        "backbone.patch_embed.proj.weight": 0.0625,
        "backbone.patch_embed.proj.bias": 0.0625,
        "backbone.blocks.0.attn.qkv.weight": 0.125,
        "backbone.blocks.1.norm1.bias": 0.25,
        "backbone.blocks.2.mlp.fc2.weight": 0.5,
        "backbone.fc_norm.weight": 1.0,
        "backbone.head.weight": 1.0,
        "backbone.head.bias": 1.0,
    }
    assert {name: multiplier[name] for name in by_hand} == by_hand
    assert multiplier.keys() == {f"backbone.{name}" for name, _ in finetune().backbone.named_parameters()}
    undecayed = {name for name, value in decay.items() if value == 0}
    one_axis = {f"backbone.{name}" for name, p in finetune().backbone.named_parameters() if p.ndim == 1}
    assert undecayed == one_axis | {"backbone.cls_token", "backbone.pos_embed"}


def test_layer_decay_equals_timms():
    from timm.optim import param_groups_layer_decay

    backbone = vit(num_classes=4)
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    timms = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(
            backbone, weight_decay=0.05, layer_decay=0.65, no_weight_decay_list=("cls_token", "pos_embed")
        )
        for parameter in group["params"]
    }
    ours = {}
    for group in recipe().build(backbone, layer_rules(backbone, 0.65)).param_groups:
        ours |= dict.fromkeys(group["names"], (group["lr_multiplier"], group["weight_decay"]))
    assert ours.keys() == timms.keys()
    for name in ours:
        assert ours[name] == pytest.approx(timms[name]), name


def test_layer_decay_of_a_convnet():
    backbone = timm.create_model("resnet18", num_classes=2)
    multipliers = {
        name: group["lr_multiplier"]
        for group in recipe().build(backbone, layer_rules(backbone, 0.5)).param_groups
        for name in group["names"]
    }
    path = ["conv1.weight", "layer1.0.conv1.weight", "layer2.0.conv1.weight", "layer4.1.conv2.weight", "fc.weight"]
    assert [multipliers[name] for name in path] == sorted({multipliers[name] for name in path})
    assert multipliers["fc.weight"] == 1.0


def test_rules_of_the_recipe_come_first():
    module = finetune(optimizer=recipe(rules=[Rule("patch_embed", frozen=True)]))
    names = [name for group in module.configure_optimizers().param_groups for name in group["names"]]
    assert not any("patch_embed" in name for name in names)


def test_the_initial_head_predicts_uniform_probabilities():
    module = finetune(classes=5)
    weight = module.backbone.head.weight
    assert 1e-5 < weight.std().item() < 4e-5
    assert module.backbone.head.bias.abs().max() == 0
    probabilities = module(batch()["image"]).softmax(dim=1)
    torch.testing.assert_close(probabilities, torch.full((6, 5), 0.2), atol=1e-3, rtol=0)


def test_a_new_norm_follows_the_mean_of_the_patch_tokens():
    module = finetune().eval()
    module.backbone.fc_norm.weight.data.uniform_(0.5, 2.0)
    image = batch()["image"]
    tokens = module.backbone.forward_features(image)
    expected = F.layer_norm(
        tokens[:, 1:].mean(dim=1), (24,), module.backbone.fc_norm.weight, module.backbone.fc_norm.bias, eps=1e-6
    )
    torch.testing.assert_close(module.embed(image), expected)
    torch.testing.assert_close(module.encoders()["encoder"](image).embedding, expected)
    assert isinstance(module.backbone.norm, torch.nn.Identity)
    torch.testing.assert_close(module(image), module.backbone(image))


def test_mixed_labels_are_weighted_smoothed_labels_of_both_images():
    module = finetune(mixup=0.8, cutmix=0.0, smoothing=0.1)
    images, labels = batch()["image"], batch()["label"]
    mixed, shares = module.mix(images, labels, batch_idx=3)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(6))
    # by hand: the ratio from the images; each smoothed label has 0.9 + 0.1 / 4 for its class and 0.1 / 4 for others
    share = ((mixed[0] - images[5]) / (images[0] - images[5])).median().item()
    smooth = torch.full((6, 4), 0.025)
    smooth[torch.arange(6), labels] = 0.925
    torch.testing.assert_close(shares, share * smooth + (1 - share) * smooth.flip(0), atol=1e-5, rtol=0)


def test_cutmix_pastes_a_box_of_the_other_image_and_weights_labels_by_area():
    module = finetune(mixup=0.0, cutmix=1.0, smoothing=0.0)
    images, labels = batch(6)["image"], torch.tensor([0, 0, 0, 1, 1, 1])
    for step in range(5):
        mixed, shares = module.mix(images, labels, batch_idx=step)
        pasted = (mixed[0] == images[5]).all(dim=0)
        assert torch.equal(mixed[0][:, ~pasted], images[0][:, ~pasted])
        assert shares[0, 1].item() == pytest.approx(pasted.float().mean().item(), abs=1e-6)


def test_mixing_depends_on_seed_and_step_and_keeps_batch_and_generators():
    module, data = finetune(seed=3), batch()
    before = data["image"].clone()
    first = module.mix(data["image"], data["label"], batch_idx=0)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    again = module.mix(data["image"], data["label"], batch_idx=0)
    torch.set_rng_state(state)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert torch.equal(data["image"], before)
    others = [
        module.mix(data["image"], data["label"], batch_idx=1),
        finetune(seed=4).mix(data["image"], data["label"], 0),
    ]
    assert all(not torch.equal(first[0], other[0]) for other in others)


def test_the_loss_is_the_cross_entropy_with_the_mixed_labels():
    module = finetune().train()
    module.backbone.head.weight.data.normal_()
    data = batch()
    mixed, shares = module.mix(data["image"], data["label"], batch_idx=2)
    by_hand = -(shares.double() * module(mixed).double().log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(module.training_step(data, 2)["loss"].double(), by_hand, atol=1e-5, rtol=1e-5)


def test_without_mixing_labels_are_smoothed():
    module = finetune(mixup=0.0, cutmix=0.0, smoothing=0.2)
    module.backbone.head.weight.data.normal_()
    data = batch(5)
    log_p = module(data["image"]).double().log_softmax(dim=1)
    target = torch.full((5, 4), 0.05, dtype=torch.float64)
    target[torch.arange(5), data["label"]] += 0.8
    by_hand = -(target * log_p).sum(dim=1).mean()
    torch.testing.assert_close(module.training_step(data, 0)["loss"].double(), by_hand, atol=1e-5, rtol=1e-5)


def test_odd_batches_and_missing_labels_are_refused():
    with pytest.raises(BatchError, match=r"even number of images .* got 5: change data.batch_size"):
        finetune().training_step(batch(5), 0)
    data = batch()
    data["label"][2:4] = -1
    with pytest.raises(BatchError, match="learns from labels; 2 of 6 samples of a batch have none"):
        finetune().training_step(data, 0)


@pytest.mark.parametrize("bad", [{"mixup": -1.0}, {"smoothing": 1.0}, {"layer_decay": 0.0}, {"layer_decay": 1.5}])
def test_wrong_values_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        FineTune(vit(), recipe(), **bad)


def test_it_classifies_validation_images():
    data = DataModule(
        source=partial(Squares, length=180),
        train_view=RandAugmentCrop(SIZE, scale=(0.5, 1.0), policy=None, erase=0.25),
        eval_view=CenterCrop(SIZE, share=1.0),
        batch_size=20,
        num_workers=0,
    )
    module = FineTune(
        vit(img_size=SIZE, patch_size=16),
        OptimizerRecipe(torch.optim.AdamW, lr=3e-3, weight_decay=0.05),
        layer_decay=0.9,
    )
    trainer = L.Trainer(
        max_epochs=10,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["eval/top1"].item() > 0.7  # chance is a third


def test_layer_decay_below_a_separate_head():
    """As in BEiT: layer 0 (tokens, patch embedding), one layer a block, and the head with factor 1."""
    names = {"pos_embed": 0.0625, "blocks.0.attn.qkv.weight": 0.125, "blocks.2.mlp.fc2.weight": 0.5}
    for pool in ("token", "avg"):  # with a final norm, or a frozen norm after the pooling
        backbone = vit(global_pool=pool)
        (backbone.norm if pool == "token" else backbone.fc_norm).requires_grad_(False)
        groups = recipe().build(backbone, layer_rules_below(backbone, 0.5)).param_groups
        multipliers = {name: group["lr_multiplier"] for group in groups for name in group["names"]}
        assert {name: multipliers[name] for name in names} == names
