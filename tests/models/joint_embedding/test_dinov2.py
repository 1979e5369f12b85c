"""DINOv2's step, targets, masks and learning rates; heads and losses that DINO and iBOT have too are tested beside
them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from timm.layers import DropPath

from src import train
from src.callbacks.gradients import ClipEachPart
from src.errors import SettingError
from src.models.backbones.weights import Weights
from src.models.joint_embedding.dinov2 import DINOv2
from src.models.losses.koleo import koleo
from tests.distributed import in_two_processes
from tests.models.joint_embedding import toy

SIZES = {"prototypes": 9, "patch_prototypes": 7, "hidden_dim": 10, "bottleneck_dim": 6, "patch_bottleneck_dim": 5}
MASK = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]] * 2, dtype=torch.bool)


def build(vit: dict[str, Any] | None = None, **options: Any) -> DINOv2:
    torch.manual_seed(0)
    method = DINOv2(toy.vit(**(vit or {})), toy.optimizer(), **{**SIZES, **options}).double()
    torch.nn.init.normal_(method.mask_token)
    for parameter in method.teacher.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return method


def balance(rows: list[list[float]], temperature: float) -> list[list[float]]:
    """Three times: each prototype gets the same total, then each sample the total 1."""
    rows = [[math.exp(value / temperature) for value in row] for row in rows]
    for _ in range(3):
        totals = [sum(column) for column in zip(*rows, strict=True)]
        rows = [[value / total for value, total in zip(row, totals, strict=True)] for row in rows]
        rows = [[value / sum(row) for value in row] for row in rows]
    return rows


def cross_entropy(target: list[float], scores: torch.Tensor) -> float:
    values = [math.exp(value / 0.1) for value in scores.tolist()]
    return -sum(t * math.log(v / sum(values)) for t, v in zip(target, values, strict=True))


def test_a_step_is_the_paper_written_as_loops(monkeypatch):
    method, batch = build(patch_weight=0.7, koleo_weight=0.2), toy.batch(4, local_views=1)
    reference = copy.deepcopy(method)
    monkeypatch.setattr(method, "draw_masks", lambda images: MASK)
    output = method.training_step(batch, 0)
    vit, student, teacher = reference.student["encoder"].backbone, reference.student, reference.teacher
    targets, patch_targets, scores, patch_scores, tokens = [], [], [], [], []
    for image in range(4):
        scores.append([])
        for view in range(2):
            hide, x = MASK[2 * image + view], batch["views"][image, view][None]
            patches = vit.patch_embed.proj(x).flatten(2).transpose(1, 2).clone()
            patches[0, hide] = reference.mask_token
            seen = vit.norm(vit.blocks(torch.cat([vit.cls_token, patches], dim=1) + vit.pos_embed))[0]
            tokens.append(seen[0])
            scores[-1].append(student["class_head"](seen[0]))
            patch_scores += [(hide.sum(), student["patch_head"](seen[1 + n])) for n in range(4) if hide[n]]
            whole = teacher["encoder"](x)
            targets.append(teacher["class_head"](whole.embedding)[0].tolist())
            patch_targets += [row.tolist() for row in teacher["patch_head"](whole.patches)[0][hide]]
        scores[-1].append(student["class_head"](student["encoder"](batch["local_views"][image]).embedding)[0])
    targets, patch_targets = balance(targets, 0.07), balance(patch_targets, 0.07)
    on_class = sum(
        cross_entropy(targets[2 * image + q], scores[image][v]) / 16
        for image in range(4)
        for q in range(2)
        for v in range(3)
        if v != q
    )
    on_patches = sum(
        cross_entropy(target, own) / count.item() / 8
        for target, (count, own) in zip(patch_targets, patch_scores, strict=True)
    )
    spread = 0.0
    for view in range(2):
        rows = [token / token.norm() for token in tokens[view::2]]
        for i, row in enumerate(rows):
            spread -= math.log(min((row - other).norm().item() for j, other in enumerate(rows) if j != i)) / 4
    assert output["logs"]["class"].item() == pytest.approx(on_class, rel=1e-10)
    assert output["logs"]["patch"].item() == pytest.approx(on_patches, rel=1e-10)
    assert output["logs"]["koleo"].item() == pytest.approx(spread, rel=1e-5)  # the authors add 1e-8 to each distance
    assert output["loss"].item() == pytest.approx(on_class + 0.7 * on_patches + 0.2 * spread, rel=1e-5)
    # gradients reach all of the student and nothing of the teacher
    output["loss"].backward()
    assert {name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == {
        name for name, p in method.named_parameters() if not name.startswith("teacher.")
    }


def test_koleo_by_hand_and_in_groups():
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0], [0.6, 0.8]])
    # distances to the nearest: (1, 0) and (0, 1) from (0.6, 0.8), (-1, 0) from (0, 1)
    near, further, far = math.sqrt(0.4), math.sqrt(0.8), math.sqrt(2)
    whole = -(math.log(further) + math.log(near) + math.log(far) + math.log(near)) / 4
    assert koleo(x, 4).item() == pytest.approx(whole, abs=1e-6)
    pairs = -(2 * math.log(far) + 2 * math.log(math.hypot(1.6, 0.8))) / 4
    assert koleo(x, 2).item() == pytest.approx(pairs, abs=1e-6)
    with pytest.raises(SettingError, match=r"model\.koleo_images=3 images needs at least 2 of the 4"):
        koleo(x, 3)


def test_half_of_the_crops_are_masked_by_shares_spread_over_the_range():
    method, images = build(vit={"img_size": 80}), torch.zeros(40, 3, 80, 80)
    torch.manual_seed(3)
    first = method.draw_masks(images)
    torch.manual_seed(3)
    assert torch.equal(method.draw_masks(images), first)
    counts = first.sum(dim=1)
    assert (counts == 0).sum() == 20
    assert counts[:20].sum() != 0  # the masked crops are not the last ones
    for step, count in enumerate(counts[counts > 0].sort().values.tolist()):
        assert int(10 + 2 * step) <= count <= 10 + 2 * (step + 1)


def test_each_layer_has_its_learning_rate():
    method = build(layer_decay=0.5, patch_embed_lr=0.2)
    rates = {name: group["lr"] for group in method.configure_optimizers().param_groups for name in group["names"]}
    backbone = "student.encoder.backbone."
    expected = {
        "mask_token": 0.1 * 0.5 ** (depth := len(method.student["encoder"].backbone.blocks) + 1),
        f"{backbone}cls_token": 0.1 * 0.5**depth,
        f"{backbone}patch_embed.proj.weight": 0.1 * 0.5**depth * 0.2,
        f"{backbone}blocks.0.attn.qkv.weight": 0.1 * 0.5 ** (depth - 1),
        f"{backbone}norm.weight": 0.1,
        "student.class_head.last_layer.gain": 0.1,
    }
    assert {name: rates[name] for name in expected} == pytest.approx(expected)


def test_registers_are_no_patches_and_all_blocks_drop_alike():
    plain, registers = build(), build(vit={"reg_tokens": 3, "no_embed_class": True})
    for method in (plain, registers):
        assert method.student["encoder"](toy.batch()["views"][:, 0]).patches.shape[1] == 4
    method = build(drop_path=0.25)
    drops = [child.drop_prob for child in method.student.modules() if isinstance(child, DropPath)]
    assert drops == [0.25] * 2 * len(method.student["encoder"].backbone.blocks)
    assert {child.drop_prob for child in method.teacher.modules() if isinstance(child, DropPath)} == {0.0}


def test_the_next_phase_takes_heads_and_teacher_and_interpolates_positions():
    first, second = build(), build(vit={"img_size": 32})
    for parameter in second.parameters():
        torch.nn.init.zeros_(parameter)
    line = second.load_start(Weights(first.state_dict(), "run", prefix="student.encoder.backbone."))
    assert line.endswith("its heads and its teacher")
    ours, theirs = second.state_dict(), first.state_dict()
    assert {name for name in ours if ours[name].shape != theirs[name].shape} == {
        f"{network}.encoder.backbone.pos_embed" for network in ("student", "teacher")
    }
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.endswith("pos_embed"))
    other = build(prototypes=4)
    assert other.load_start(Weights(first.state_dict(), "run", prefix="student.encoder.backbone.")).endswith("anew")
    assert torch.equal(
        other.student["encoder"].backbone.cls_token, other.teacher["encoder"].backbone.cls_token
    )  # the teacher begins as a copy of the student


class Trainer:
    """Stands for the trainer, which `ClipEachPart` does not use."""


def test_each_part_is_clipped_on_its_own():
    method = build()
    method.training_step(toy.batch(4), 0)["loss"].backward()
    before = toy.gradients(method)
    before = {name: value.clone() for name, value in before.items()}
    parts = [r"^student\.encoder\.|^mask_token$", r"^student\.class_head\.", r"^student\.patch_head\."]
    clip = ClipEachPart(1e-3, parts)
    clip.on_fit_start(Trainer(), method)  # type: ignore[arg-type]
    clip.on_before_optimizer_step(Trainer(), method, None)  # type: ignore[arg-type]
    for prefixes in (("student.encoder.", "mask_token"), ("student.class_head.",), ("student.patch_head.",)):
        names = [name for name in before if name.startswith(prefixes)]
        norm = math.sqrt(sum(before[name].pow(2).sum().item() for name in names))
        for name in names:
            assert torch.allclose(toy.gradients(method)[name], before[name] * 1e-3 / (norm + 1e-6), rtol=1e-9, atol=0)
    with pytest.raises(SettingError, match=r"callbacks\.gradient_clip\.parts: 'mask_token' must match one"):
        ClipEachPart(1.0, parts[1:]).on_fit_start(Trainer(), method)  # type: ignore[arg-type]


def on_each(process: int) -> dict[str, torch.Tensor]:
    method = build(koleo_images=2)
    method.draw_masks = lambda images: MASK[4 * process : 4 * process + 4]  # type: ignore[method-assign]
    output = method.training_step(toy.part_of(toy.batch(4, local_views=1), process), 0)
    output["loss"].backward()
    return toy.gradients(method) | {"targets": output["targets"]}


def test_two_processes_are_one(monkeypatch):
    whole = build(koleo_images=2)
    monkeypatch.setattr(whole, "draw_masks", lambda images: MASK)
    output = whole.training_step(toy.batch(4, local_views=1), 0)
    output["loss"].backward()
    first, second = in_two_processes(on_each)
    assert torch.allclose(torch.cat([first["targets"], second["targets"]]), output["targets"], rtol=0, atol=1e-12)
    for name, gradient in toy.gradients(whole).items():
        assert torch.allclose((first[name] + second[name]) / 2, gradient, rtol=0, atol=1e-10), name


def test_the_recipe_is_the_authors():
    config = train.compose(["experiment=dinov2_vitl14", "scale=paper"])
    assert config.optimizer.lr == pytest.approx(2e-4 * math.sqrt(3072 / 1024))
    assert config.trainer.max_steps == 500 * 1250
    later = train.compose(["experiment=dinov2_vitl14_518", "scale=paper"])
    assert (later.image_size, later.backbone.img_size, later.trainer.max_steps) == (518, 518, 10000)
    assert later.optimizer.lr == pytest.approx(config.optimizer.lr / 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_share": (0.6, 0.5)}, r"model\.mask_share=\[0.6, 0.5\]"),
        ({"teacher_temperature": 0}, r"model\.teacher_temperature=0 must be above 0"),
        ({"layer_decay": 1.1}, r"model\.layer_decay=1.1 must lie in \(0, 1\]"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(SettingError, match=message):
        build(**options)


def test_refuses_a_backbone_without_patches():
    with pytest.raises(SettingError, match=r"model\.backbone: DINOv2 masks the patches of a ViT .*, not of a ResNet"):
        DINOv2(toy.resnet(), toy.optimizer(), **SIZES)
