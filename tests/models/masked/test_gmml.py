from typing import Any

import pytest
import torch

from src.errors import SettingError
from src.models.heads.pixels import PixelHead
from src.models.masked.gmml import GMML
from src.optim import OptimizerRecipe
from tests.toys import small_vit


def build(**options: Any) -> GMML:
    torch.manual_seed(0)
    vit = small_vit(**{"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 3} | options.pop("vit", {}))
    return GMML(vit, OptimizerRecipe(torch.optim.AdamW, lr=1e-3), **{"blocks": (1, 3), **options}).double().eval()


def batch(count: int = 3) -> Any:
    generator = torch.Generator().manual_seed(1)
    return {"views": torch.randn(count, 2, 3, 16, 16, generator=generator, dtype=torch.float64)}


def test_features_are_the_normed_mean_of_the_chosen_blocks():
    method, image = build(), batch()["views"][:, 0]
    vit: Any = method.backbone
    tokens = torch.cat([vit.cls_token.expand(3, -1, -1), vit.patch_embed(image)], dim=1) + vit.pos_embed
    outputs = []
    for block in vit.blocks:
        tokens = block(tokens)
        outputs.append(tokens)
    expected = vit.norm((outputs[0] + outputs[2]) / 2)[:, 1:]
    torch.testing.assert_close(method.encode(image), expected)


def test_the_head_reconstructs_each_patch_from_its_token():
    head = PixelHead(6, (2, 3), channels=4)
    tokens = torch.randn(1, 6, 6)
    image = head(tokens, (2, 3))
    assert image.shape == (1, 4, 4, 9)
    hidden = head.mlp(tokens)[0, 4]  # second row, second column
    values = torch.einsum("d,dchw->chw", hidden, head.to_pixels.weight) + head.to_pixels.bias[:, None, None]
    torch.testing.assert_close(image[0, :, 2:4, 3:6], values)


@pytest.mark.parametrize("corrupted_only", [True, False])
def test_the_loss_of_a_step_is_the_mean_over_the_counted_pixels(corrupted_only):
    method, data = build(corrupted_only=corrupted_only), batch()
    torch.manual_seed(3)
    corrupted, masks = method.corruption(data["views"])
    errors = []
    for b in range(3):
        for v in range(2):
            prediction = method.head(method.encode(corrupted[b, v][None]), (4, 4))[0]
            error = (prediction - data["views"][b, v]).abs()
            errors += error[masks[b, v].expand_as(error)].tolist() if corrupted_only else error.flatten().tolist()
    torch.manual_seed(3)
    output: Any = method.training_step(data, 0)
    assert output["loss"].item() == pytest.approx(sum(errors) / len(errors), rel=1e-10)
    assert output["logs"]["corrupted"].item() == pytest.approx(masks.double().mean().item())


def test_gradients_reach_every_weight():
    method = build()
    method.training_step(batch(), 0)["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


def test_visualizations_show_the_view_corrupted_and_reconstructed():
    method, data = build(), batch()
    torch.manual_seed(4)
    original, corrupted, filled = method.visualize(data)["reconstruction"].unbind(dim=1)
    torch.manual_seed(4)
    expected = method.corruption(data["views"])[0][:, 0]
    assert torch.equal(original, data["views"][:, 0])
    assert torch.equal(corrupted, expected)
    assert torch.equal(filled, method.head(method.encode(expected), (4, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": (1, 4)}, r"model\.blocks=\[1, 4\] must be numbers from 1 to 3"),
        ({"blocks": ()}, r"model\.blocks=\[\]"),
        ({"fill": "grey"}, r"model\.fill must be noise or zeros, got 'grey'"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(SettingError, match=message):
        build(**options)
