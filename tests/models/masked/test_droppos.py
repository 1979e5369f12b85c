import math
from typing import Any

import pytest
import torch
from torch import nn

from src.errors import SettingError
from src.models.masked.droppos import DropPos, position_cross_entropy, similarity_weights, smoothed_positions
from src.optim import OptimizerRecipe
from tests.toys import small_vit


def build(**options: Any) -> DropPos:
    torch.manual_seed(0)
    vit = small_vit(**{"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2} | options.pop("vit", {}))
    sizes = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2, "mask_ratio": 0.5, "position_mask_ratio": 0.5}
    return DropPos(vit, OptimizerRecipe(torch.optim.AdamW, lr=1e-3), **{**sizes, **options}).double().eval()


def images(count: int = 3) -> dict[str, torch.Tensor]:
    return {"image": torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}


def test_the_number_of_visible_patches_and_of_dropped_positions_is_the_papers():
    method = build(vit={"img_size": 224, "patch_size": 16}, mask_ratio=0.75, position_mask_ratio=0.75)
    keep, dropped = method.draw_masks(torch.zeros(4, 3, 1, 1))
    assert keep.shape == (4, 49)
    assert dropped.sum(dim=1).tolist() == [37] * 4
    assert len({tuple(sorted(row)) for row in keep.tolist()}) == 4


def test_smoothed_positions_by_hand():
    """Two patches beside each other: distance 1."""
    far = math.exp(-1 / 0.25)
    expected = torch.tensor([[1.0, far], [far, 1.0]], dtype=torch.float64) / (1 + far)
    torch.testing.assert_close(smoothed_positions((1, 2), 0.5), expected)
    assert torch.equal(smoothed_positions((2, 2), 0.0), torch.eye(4, dtype=torch.float64))
    table = smoothed_positions((2, 3), 1.0)
    near, corner = math.exp(-1), math.exp(-5)  # from the first patch to its neighbor, and to the opposite corner
    assert (table[0, 1] / table[1, 1]).item() == pytest.approx(near)
    assert (table[0, 5] / table[5, 5]).item() == pytest.approx(corner)
    torch.testing.assert_close(table.sum(dim=0), torch.ones(6, dtype=torch.float64))


def test_weights_are_softmaxed_similarities_of_the_visible_patches():
    class_token = torch.tensor([[[1.0, 0.0]]])
    patches = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]])  # cosines 1, 0, -1
    weights = similarity_weights(class_token, patches, 0.5, torch.tensor([[2, 0]]))
    high, low = math.exp(2), math.exp(-2)
    torch.testing.assert_close(weights, torch.tensor([[low, high]]) / (high + low))


def test_the_loss_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0]]])  # probabilities 1/4 3/4, 4/5 1/5
    targets = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    weights = torch.tensor([[0.5, 1.5]])
    first = -(0.2 * math.log(0.25) + 0.8 * math.log(0.75))
    second = -(0.9 * math.log(0.8) + 0.1 * math.log(0.2))
    loss = position_cross_entropy(logits, torch.tensor([[1, 0]]), weights, targets)
    assert loss.item() == pytest.approx((0.5 * first + 1.5 * second) / 2)


def test_a_step_counts_dropped_positions_alone():
    method, batch = build(attentive=False, sigma=0.0), images()
    torch.manual_seed(3)
    keep, dropped = method.draw_masks(batch["image"])
    logits = method.decoder(method.encode(batch["image"], keep, dropped)).log_softmax(dim=-1)
    chosen = [logits[b, v, keep[b, v]].item() for b, v in dropped.nonzero().tolist()]
    hits = [logits[b, v].argmax().item() == keep[b, v].item() for b, v in dropped.nonzero().tolist()]
    torch.manual_seed(3)
    output: Any = method.training_step(batch, 0)
    assert output["loss"].item() == pytest.approx(-sum(chosen) / len(chosen), rel=1e-12)
    assert output["logs"]["position_accuracy"].item() == pytest.approx(sum(hits) / len(hits))


def test_a_patch_whose_position_is_dropped_is_the_same_wherever_it_comes_from():
    """Two patches trade places; both have lost their position, so nothing but the order of tokens changes."""
    method, image = build(), images(1)["image"]
    keep, dropped = torch.tensor([[5, 6, 9, 0]]), torch.tensor([[True, True, False, False]])
    traded = image.clone()
    traded[..., 8:16, 8:16], traded[..., 8:16, 16:24] = image[..., 8:16, 16:24], image[..., 8:16, 8:16]
    order = [0, 2, 1, 3, 4]  # after the class token
    before, after = method.encode(image, keep, dropped), method.encode(traded, keep, dropped)
    torch.testing.assert_close(after[:, order], before)
    torch.testing.assert_close(method.decoder(after)[:, [1, 0, 2, 3]], method.decoder(before))
    known = torch.zeros_like(dropped)
    assert not torch.allclose(method.encode(traded, keep, known)[:, order], method.encode(image, keep, known))


def test_with_every_position_the_encoder_is_the_plain_backbone_and_masked_patches_are_not_seen():
    method, image = build(), images()["image"]
    everything = torch.arange(16).expand(3, -1)
    nothing_dropped = torch.zeros(3, 16, dtype=torch.bool)
    torch.testing.assert_close(
        method.encode(image, everything, nothing_dropped), method.backbone.forward_features(image)
    )
    other = image.clone()
    other[..., 8:] = 0  # leaves the first column of patches
    column = torch.tensor([[0, 4, 8, 12]] * 3)
    dropped = torch.tensor([[True, False, True, False]] * 3)
    assert torch.equal(method.encode(image, column, dropped), method.encode(other, column, dropped))


def test_gradients_reach_all_weights_and_none_comes_through_the_attentive_weights(monkeypatch):
    method, batch = build(), images()
    torch.manual_seed(3)
    method.training_step(batch, 0)["loss"].backward()
    without = {name for name, p in method.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == {"backbone.pos_embed"}
    gradient = method.position_mask_token.grad.clone()
    method.zero_grad()
    torch.manual_seed(3)
    weights = method.attentive_weights(batch["image"], method.draw_masks(batch["image"])[0])
    monkeypatch.setattr(method, "attentive_weights", lambda image, keep: weights.clone())
    torch.manual_seed(3)
    method.training_step(batch, 0)["loss"].backward()
    torch.testing.assert_close(method.position_mask_token.grad, gradient)


def test_visualizations_put_patches_where_the_decoder_says(monkeypatch):
    method, batch = build(), images(1)
    keep, dropped = torch.tensor([[5, 6, 9, 0]]), torch.tensor([[True, True, False, False]])
    monkeypatch.setattr(method, "draw_masks", lambda image: (keep, dropped))
    method.decoder = nn.Identity()
    logits = torch.zeros(1, 4, 16, dtype=torch.float64)
    logits[0, [0, 1, 2, 3], [3, 15, 1, 1]] = 1.0
    monkeypatch.setattr(method, "encode", lambda image, keep, dropped: logits)
    columns = method.visualize(batch)["positions"][0]
    shown = [
        {4 * r + c for r in range(4) for c in range(4) if column[:, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8].any()}
        for column in columns
    ]
    assert shown == [set(range(16)), {0, 5, 6, 9}, {0, 9}, {0, 3, 9, 15}]
    assert torch.equal(columns[3, :, :8, 24:], batch["image"][0, :, 8:16, 8:16])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 1.0}, r"model\.position_mask_ratio=0\.5 leaves 0 of 0 visible patches"),
        ({"position_mask_ratio": 0.99}, r"model\.position_mask_ratio=0\.99 leaves 0 of 8"),
        ({"position_mask_ratio": 0.0}, r"model\.position_mask_ratio=0\.0 leaves 8 of 8"),
        ({"temperature": 0.0}, r"model\.temperature=0\.0"),
        ({"vit": {"class_token": False, "global_pool": "avg"}}, r"backbone\.class_token: DropPos"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(SettingError, match=message):
        build(**options)
