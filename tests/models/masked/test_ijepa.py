from typing import Any

import pytest
import torch

from src.errors import SettingError
from src.models.masked.ijepa import IJEPA, normalized_smooth_l1
from src.models.masked.multi_block import ContextAndTargets, multi_block_masks
from src.optim import OptimizerRecipe
from tests.toys import small_vit


def build(**options: Any) -> IJEPA:
    torch.manual_seed(0)
    vit = {"img_size": 32, "patch_size": 4, "embed_dim": 12, "depth": 2} | options.pop("vit", {})
    vit = {"class_token": False, "global_pool": "avg", "fc_norm": False} | vit
    sizes = {"predictor_dim": 8, "predictor_depth": 1, "predictor_heads": 2}
    return IJEPA(small_vit(**vit), OptimizerRecipe(torch.optim.AdamW, lr=1e-3), **{**sizes, **options}).double().eval()


def images(count: int = 3) -> dict[str, torch.Tensor]:
    return {"image": torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}


def test_targets_are_blocks_of_the_drawn_size_and_are_cut_out_of_the_context():
    for seed in range(20):
        context, targets = multi_block_masks(seed / 20, 5, (14, 14))
        assert (context.shape[0], targets.shape[:2]) == (5, (5, 4))
        assert (context.diff(dim=1) > 0).all()
        rows, columns = targets // 14, targets % 14
        height, width = (int(x.amax() - x.amin()) + 1 for x in (rows[0, 0], columns[0, 0]))
        assert height * width == targets.shape[2]
        assert 25 <= height * width <= 42  # 0.15 to 0.2 of 196, rounded to whole rows and columns
        assert 0.6 < height / width < 1.7
        for b in range(5):
            assert not set(context[b].tolist()) & set(targets[b].flatten().tolist())
            for t in range(4):
                assert rows[b, t].amax() - rows[b, t].amin() + 1 == height
                assert columns[b, t].amax() - columns[b, t].amin() + 1 == width
        assert max(rows.max(), columns.max()) <= 12  # the authors' blocks never touch the last row or column
        assert context.shape[1] > 10


def test_masks_are_a_function_of_the_seed():
    first, again, other = (multi_block_masks(seed, 4, (14, 14)) for seed in (0.1, 0.1, 0.2))
    assert torch.equal(first.context, again.context)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.targets, other.targets[..., : first.targets.shape[2]])


def test_contexts_are_cut_to_the_smallest_of_the_batch_by_their_last_patches():
    whole = [multi_block_masks(0.3, count, (14, 14)).context for count in (1, 8)]
    assert whole[1].shape[1] <= whole[0].shape[1]
    assert torch.equal(whole[0][0, : whole[1].shape[1]], whole[1][0])


def test_a_context_of_too_few_patches_gives_up_target_blocks_until_it_is_large_enough():
    """Four blocks of 6 x 6 leave no 30 patches of a grid of 8 x 8; without any of them 7 x 7 are left."""
    sizes = {"target_scale": (0.6, 0.6), "target_ratio": (1.0, 1.0), "context_scale": (0.8, 0.8)}
    context, targets = multi_block_masks(0.5, 3, (8, 8), min_context=30, **sizes)
    assert targets.shape == (3, 4, 36)
    assert context.shape == (3, 49)


def test_the_context_encoder_sees_the_context_alone():
    method, batch = build(), images()
    masks = method.draw_masks(batch["image"])
    place = torch.zeros(3, 64).scatter(1, masks.context, 1.0).view(3, 1, 8, 8).bool()
    seen = place.repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(seen, batch["image"], torch.randn_like(batch["image"]))
    assert torch.equal(method.encode(other, masks.context), method.encode(batch["image"], masks.context))
    everything = torch.arange(64).expand(3, -1)
    plain = method.backbone.forward_features(batch["image"])
    assert torch.allclose(method.encode(batch["image"], everything), plain, atol=1e-12)


def test_each_target_block_is_predicted_on_its_own_and_in_the_order_of_its_positions():
    method = build()
    context, masks = torch.randn(3, 20, 12, dtype=torch.float64), method.draw_masks(images()["image"])
    masks = masks._replace(context=torch.arange(20).expand(3, -1))
    whole = method.predictor(context, masks)
    for t in range(4):
        alone = method.predictor(context, masks._replace(targets=masks.targets[:, t : t + 1]))
        torch.testing.assert_close(alone[:, 0], whole[:, t])
    turned = method.predictor(context, masks._replace(targets=masks.targets.flip(2)))
    torch.testing.assert_close(turned.flip(2), whole)
    shuffle = torch.randperm(20)
    order = masks._replace(context=masks.context[:, shuffle])
    torch.testing.assert_close(method.predictor(context[:, shuffle], order), whole)


def test_the_loss_of_a_step_against_loops():
    method, batch = build(), images()
    torch.nn.init.normal_(method.teacher.norm.bias)  # no copy of the student
    torch.manual_seed(3)
    masks = method.draw_masks(batch["image"])
    prediction = method.predictor(method.encode(batch["image"], masks.context), masks)
    features = method.teacher.forward_features(batch["image"])
    errors = []
    for b in range(3):
        for t in range(4):
            for m, position in enumerate(masks.targets[b, t].tolist()):
                h = features[b, position]
                h = (h - h.mean()) / (h.var(correction=0) + 1e-5).sqrt()
                for difference in (prediction[b, t, m] - h).abs().tolist():
                    errors.append(0.5 * difference**2 if difference < 1 else difference - 0.5)
    torch.manual_seed(3)
    output = method.training_step(batch, 0)
    assert output["loss"].item() == pytest.approx(sum(errors) / len(errors), rel=1e-10)
    assert torch.allclose(output["embedding"], features.mean(dim=1).float())


def test_the_scale_of_targets_does_not_matter():
    prediction, target = torch.randn(2, 3, 64), torch.randn(2, 3, 64) * 10
    torch.testing.assert_close(
        normalized_smooth_l1(prediction, target), normalized_smooth_l1(prediction, 5 * target + 7)
    )


def test_gradients_reach_student_and_predictor_and_not_the_teacher():
    method = build(vit={"class_token": True, "global_pool": "token"})
    method.training_step(images(), 0)["loss"].backward()
    without = {name for name, p in method.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert {name for name in without if not name.startswith("teacher.")} == {
        "backbone.pos_embed",
        "predictor.pos_embed",
    }
    assert {name for name, _ in method.named_parameters() if name.startswith("teacher.")} <= without


def test_the_teacher_begins_as_the_student():
    method = build()
    for one, two in zip(method.backbone.parameters(), method.teacher.parameters(), strict=True):
        assert torch.equal(one, two)
        assert not two.requires_grad


def test_a_visualization_shows_context_and_targets(monkeypatch):
    method, batch = build(), images(1)
    masks = ContextAndTargets(torch.tensor([[0, 9]]), torch.tensor([[[1, 2], [62, 63]]]))
    monkeypatch.setattr(method, "draw_masks", lambda image: masks)
    columns = method.visualize(batch)["blocks"][0]
    assert torch.equal(columns[0], batch["image"][0])
    for column, positions in zip(columns[1:], ([0, 9], [1, 2], [62, 63]), strict=True):
        patches = column.unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 0, 3, 4).reshape(64, -1)
        assert (patches.abs().sum(dim=1) > 0).nonzero().flatten().tolist() == positions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": 0}, r"model\.targets=0"),
        ({"target_scale": (0.2, 0.1)}, r"model\.target_scale=\[0\.2, 0\.1\]"),
        ({"target_ratio": (0.0, 1.0)}, r"model\.target_ratio=\[0\.0, 1\.0\]"),
        ({"context_scale": (0.5, 1.5)}, r"model\.context_scale=\[0\.5, 1\.5\]"),
        ({"vit": {"img_size": 4}}, r"image_size: .* 1x1 patches"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(SettingError, match=message):
        build(**options)
