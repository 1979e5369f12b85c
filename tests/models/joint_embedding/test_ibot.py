"""iBOT's step and its masks; what it shares with DINO is tested beside DINO."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from src.errors import SettingError
from src.models.joint_embedding.ibot import iBOT
from src.models.masked.masking import masked_patches
from tests.models.joint_embedding import toy
from tests.models.joint_embedding.test_dino import SMALL, build, distribution


def cross_entropy(target: torch.Tensor, center: torch.Tensor, temperature: float, predicted: torch.Tensor) -> float:
    p, s = distribution((target - center).tolist(), temperature), distribution(predicted.tolist(), 0.1)
    return -sum(a * math.log(b) for a, b in zip(p, s, strict=True))


def test_a_step_is_the_paper_written_as_loops(monkeypatch):
    method, batch = build(iBOT, patch_teacher_temperature=0.06, patch_weight=0.7), toy.batch(2, local_views=1)
    torch.nn.init.normal_(method.mask_token)
    reference = copy.deepcopy(method)
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    monkeypatch.setattr(method, "draw_masks", lambda images: mask)
    output = method.training_step(batch, 0)
    vit, slow = reference.student["encoder"].backbone, reference.teacher["encoder"]
    on_class, on_patches = 0.0, 0.0
    slow_patches = []
    for image in range(2):
        student, teacher = [], []
        for view in range(2):
            hide, x = mask[2 * image + view], batch["views"][image, view][None]
            patches = (vit.patch_embed.proj(x)).flatten(2).transpose(1, 2).clone()
            patches[0, hide] = reference.mask_token
            tokens = torch.cat([vit.cls_token, patches], dim=1) + vit.pos_embed
            tokens = vit.norm(vit.blocks(tokens))[0]
            student.append(reference.student["head"](tokens[0]))
            whole = slow(x)
            teacher.append(reference.teacher["head"](whole.embedding)[0])
            theirs = reference.teacher["head"](whole.patches)[0]
            slow_patches.append(theirs)
            each = [
                cross_entropy(theirs[n], reference.patch_center.value, 0.06, reference.student["head"](tokens[1 + n]))
                for n in range(4)
                if hide[n]
            ]
            on_patches += sum(each) / max(1, len(each)) / 4
        local = reference.student["encoder"](batch["local_views"][image]).embedding
        student.append(reference.student["head"](local)[0])
        for q in range(2):
            for v in range(3):
                if v != q:
                    on_class += cross_entropy(teacher[q], reference.center.value, 0.04, student[v]) / 8
    assert output["logs"]["class"].item() == pytest.approx(on_class, rel=1e-10)
    assert output["logs"]["patch"].item() == pytest.approx(on_patches, rel=1e-10)
    assert output["loss"].item() == pytest.approx(on_class + 0.7 * on_patches, rel=1e-10)
    # the patches' center follows all patches of the whole views, hidden or not
    method.on_before_optimizer_step(torch.optim.SGD(method.parameters()))
    expected = 0.9 * reference.patch_center.value + 0.1 * torch.stack(slow_patches).mean(dim=(0, 1))
    assert torch.allclose(method.patch_center.value, expected, atol=1e-12)


def test_the_teacher_never_sees_a_mask(monkeypatch):
    seen = []
    for share in (0.0, 0.75):
        method = build(iBOT, mask_probability=1.0, mask_share=(share, share))
        torch.nn.init.ones_(method.mask_token)
        seen.append(method.training_step(toy.batch(), 0))
        method.on_before_optimizer_step(torch.optim.SGD(method.parameters()))
        seen[-1]["center"] = method.patch_center.value
    assert torch.equal(seen[0]["targets"], seen[1]["targets"])
    assert torch.equal(seen[0]["center"], seen[1]["center"])
    assert seen[0]["logs"]["patch"] == 0
    assert not torch.equal(seen[0]["embedding"], seen[1]["embedding"])


def test_masks_are_the_steps_and_of_the_share_that_is_drawn():
    method, images = build(iBOT, vit={"img_size": 64}), torch.zeros(40, 3, 64, 64)
    torch.manual_seed(3)
    first = method.draw_masks(images)
    torch.manual_seed(3)
    assert torch.equal(method.draw_masks(images), first)
    assert not torch.equal(method.draw_masks(images), first)
    counts = first.sum(dim=1)
    assert 8 <= (counts == 0).sum() <= 32
    assert all(6 <= count < 33 for count in counts[counts > 0].tolist())  # int(0.1 * 64) to half


def test_masked_patches_do_not_reach_the_backbone_and_the_hook_is_removed():
    backbone = build(iBOT).student["encoder"].backbone
    x, y = (torch.randn(1, 3, 16, 16, dtype=torch.float64) for _ in range(2))
    y[..., :8] = x[..., :8]  # the left half, patches 0 and 2
    mask, token = torch.tensor([[False, True, False, True]]), torch.randn(1, 12, dtype=torch.float64)
    with masked_patches(backbone, mask, token):
        assert torch.equal(backbone.forward_features(x), backbone.forward_features(y))
    assert not torch.equal(backbone.forward_features(x), backbone.forward_features(y))


def test_pictures_show_views_and_masks_at_work():
    method = build(iBOT, mask_probability=1.0, mask_share=(0.5, 0.5))
    batch = toy.batch(3, local_views=2)
    with torch.no_grad():
        pictures = method.visualize(batch)
    assert torch.equal(pictures["views"], batch["views"])
    assert torch.equal(pictures["local_views"], batch["local_views"])
    grey = (pictures["masked"] == 0).all(dim=2)
    assert grey.float().mean() == 0.5
    assert torch.equal(pictures["masked"][~grey[:, :, None].expand_as(batch["views"])].sort().values,
                       batch["views"][~grey[:, :, None].expand_as(batch["views"])].sort().values)  # fmt: skip
    assert torch.equal(pictures["attention"][:, 0], batch["views"][:, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_share": (0.1, 1.0)}, r"model\.mask_share=\[0.1, 1.0\]"),
        ({"mask_share": (0.6, 0.5)}, r"model\.mask_share=\[0.6, 0.5\]"),
        ({"mask_probability": -0.1}, r"model\.mask_probability=-0.1"),
        ({"patch_teacher_temperature": 0}, r"model\.patch_teacher_temperature=0 must be above 0"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(SettingError, match=message):
        build(iBOT, **options)


def test_refuses_a_backbone_without_patches():
    with pytest.raises(SettingError, match=r"model\.backbone: iBOT masks the patches of a ViT .*, not of a ResNet"):
        iBOT(toy.resnet(), toy.optimizer(), **SMALL)
