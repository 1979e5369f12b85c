import math
from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer

from src.errors import SettingError
from src.models.losses.reconstruction import masked_l1
from src.models.masked.masking import pixel_mask, square_masks
from src.models.masked.simmim import SimMIM
from src.optim import OptimizerRecipe
from tests.toys import small_vit

CPU = torch.device("cpu")


def beit(**options: Any) -> torch.nn.Module:
    relative = {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0}
    return timm.create_model("beit_base_patch16_224", **{**relative, **sizes, "use_fc_norm": False, **options})


def swin(**options: Any) -> SwinTransformer:
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **{**sizes, **options})


def build(backbone: torch.nn.Module, **options: Any) -> SimMIM:
    torch.manual_seed(0)
    return SimMIM(backbone, OptimizerRecipe(torch.optim.AdamW, lr=1e-3), **{"mask_size": 16, **options}).double().eval()


def images(count: int = 3) -> dict[str, torch.Tensor]:
    return {"image": torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}


def test_masks_are_whole_squares_and_their_number_is_rounded_up():
    torch.manual_seed(0)
    masks = square_masks(6, (8, 12), (2, 4), 0.6, CPU)
    squares = masks.view(6, 4, 2, 3, 4).transpose(2, 3)
    assert torch.equal(squares.all(dim=(3, 4)), squares.any(dim=(3, 4)))
    assert masks.sum(dim=1).tolist() == [math.ceil(0.6 * 12) * 8] * 6
    assert len({tuple(mask) for mask in masks.tolist()}) == 6


def test_the_mask_of_pixels_is_that_of_their_patches():
    mask = torch.tensor([[True, False, False, True, False, True]])
    pixels = pixel_mask(mask, (2, 3), (4, 9))
    for row in range(4):
        for column in range(9):
            assert pixels[0, 0, row, column] == mask[0, (row // 2) * 3 + column // 3]


@pytest.mark.parametrize("network", [beit, swin])
def test_the_loss_of_a_step_is_the_mean_over_masked_pixels(network):
    method, batch = build(network()), images()
    torch.manual_seed(3)
    mask = method.draw_masks(batch["image"])
    prediction = method.reconstruct(batch["image"], mask)[1].detach()
    torch.manual_seed(3)
    loss = method.training_step(batch, 0)["loss"].item()
    side, errors = 32 // method.grid[0], []
    for b, n in mask.nonzero().tolist():
        row, column = divmod(n, method.grid[1])
        place = (b, slice(None), slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side))
        errors.append((prediction[place] - batch["image"][place]).abs().mean().item())
    assert loss == pytest.approx(sum(errors) / len(errors), rel=1e-6)


@pytest.mark.parametrize("network", [beit, swin])
def test_the_prediction_depends_on_visible_pixels_only(network):
    method, batch = build(network()), images()
    mask = method.draw_masks(batch["image"])
    hidden = pixel_mask(mask, method.grid, (32, 32))
    other = torch.where(hidden, torch.randn_like(batch["image"]), batch["image"])
    torch.testing.assert_close(method.reconstruct(other, mask)[1], method.reconstruct(batch["image"], mask)[1])
    shown = torch.where(hidden, batch["image"], torch.randn_like(batch["image"]))
    assert not torch.allclose(method.reconstruct(shown, mask)[1], method.reconstruct(batch["image"], mask)[1])


def test_each_position_of_the_feature_map_predicts_the_pixels_below_it():
    method = build(beit())
    features, prediction = method.reconstruct(images()["image"], torch.zeros(3, 16, dtype=torch.bool))
    convolution: Any = method.decoder[0]
    for b, row, column in ((0, 0, 0), (1, 2, 3), (2, 3, 1)):
        values = convolution.weight[:, :, 0, 0] @ features.patches[b, 4 * row + column] + convolution.bias
        block = prediction[b, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        torch.testing.assert_close(values.view(3, 8, 8), block)


def test_without_a_masked_pixel_the_loss_is_zero():
    image = torch.randn(1, 3, 4, 4)
    assert masked_l1(image + 1, image, torch.zeros(1, 1, 4, 4)) == 0
    assert masked_l1(image + 2, image, torch.ones(1, 1, 4, 4)).item() == pytest.approx(2.0)


@pytest.mark.parametrize("network", [beit, swin])
def test_gradients_reach_every_weight(network):
    method = build(network())
    method.training_step(images(), 0)["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


def test_a_vit_is_initialized_as_the_authors_code_does():
    method = build(beit(embed_dim=192, num_heads=3))
    blocks: Any = method.encoder.backbone.blocks
    limit = 0.02
    assert 0.99 * limit < blocks[1].attn.qkv.weight.abs().max() <= limit
    assert 0.99 * limit < blocks[0].mlp.fc2.weight.abs().max() * math.sqrt(2) <= limit * 1.0001
    assert 0.99 * limit < blocks[1].attn.proj.weight.abs().max() * 2 <= limit * 1.0001
    assert method.mask_token.abs().max() <= limit
    assert blocks[0].mlp.fc1.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (beit(), {"mask_ratio": 1.0}, r"model\.mask_ratio=1\.0 must lie"),
        (beit(), {"mask_size": 12}, r"model\.mask_size=12 must be a multiple of the patch size 8x8"),
        (swin(), {"mask_size": 20}, r"model\.mask_size=20 does not divide an image of 32x32"),
        (small_vit(img_size=32, embed_dim=12), {"mask_size": 0}, r"model\.mask_size=0"),
        (timm.create_model("resnet10t", num_classes=0), {}, r"backbone\.model_name: SimMIM .* not of a ResNet"),
    ],
)
def test_bad_values_are_refused(network, options, message):
    with pytest.raises(SettingError, match=message):
        build(network, **options)


def test_a_ratio_that_masks_every_square_is_refused():
    with pytest.raises(SettingError, match=r"model\.mask_ratio=0\.8 masks all 4 squares"):
        square_masks(1, (4, 4), (2, 2), 0.8, CPU)


def test_visualizations_show_visible_patches_and_predicted_pixels():
    method, batch = build(beit()), images()
    torch.manual_seed(4)
    original, masked, filled = method.visualize(batch)["reconstruction"].unbind(dim=1)
    torch.manual_seed(4)
    mask = method.draw_masks(batch["image"])
    hidden = pixel_mask(mask, method.grid, (32, 32)).expand(-1, 3, -1, -1)
    assert torch.equal(original, batch["image"])
    assert masked[hidden].abs().max() == 0
    assert torch.equal(filled[~hidden], batch["image"][~hidden])
    assert torch.equal(filled[hidden], method.reconstruct(batch["image"], mask)[1][hidden])
