"""Tests of depth estimation: loss and errors by hand, the parts of DPT's head, training."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.errors import SettingError
from src.models.downstream.depth import DepthEstimator, depth_errors
from src.models.downstream.dpt import Fusion, Reassemble
from src.models.losses.depth import silog
from src.optim import OptimizerRecipe, Rule
from tests.models.downstream.toy import SIZE, resnet, vit

RECIPE = OptimizerRecipe(torch.optim.AdamW, lr=0.1)


def dpt(backbone: nn.Module | None = None, **options: Any) -> DepthEstimator:
    settings: dict[str, Any] = {"width": 8, "widths": (4, 6, 8, 10), "nearest": 0.5, "farthest": 8.0} | options
    return DepthEstimator(backbone or vit(), settings.pop("optimizer", RECIPE), **settings)


def batch(size: int = 8) -> dict[str, Tensor]:
    """Blocks of 8 x 8 pixels that are darker the farther they are; some pixels are unknown."""
    generator = torch.Generator().manual_seed(1)
    depth = 1 + 5 * torch.rand(size, SIZE // 8, SIZE // 8, generator=generator)
    depth = depth.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    valid = torch.rand(size, SIZE, SIZE, generator=generator) > 0.2
    return {
        "image": (3 - depth[:, None]).expand(-1, 3, -1, -1) / 2,
        "depth": depth * valid,
        "valid": valid,
        "replaced": torch.zeros(size, dtype=torch.bool),
    }


class TestLoss:
    def test_focus_weights_the_error_of_the_overall_scale(self) -> None:
        depth = torch.rand(2, 3, 3) + 1
        valid = torch.ones(2, 3, 3, dtype=torch.bool)
        # d = log 2 everywhere: mean d^2 = (mean d)^2
        output = silog(2 * depth, depth, valid, focus=0.85)
        assert output.item() == pytest.approx(math.log(2) * math.sqrt(0.15), rel=1e-5)
        assert silog(2 * depth, depth, valid, focus=1.0).item() < 1e-3
        assert silog(2 * depth, depth, valid, focus=0.0).item() == pytest.approx(math.log(2), rel=1e-5)

    def test_by_hand_over_known_pixels(self) -> None:
        prediction = torch.tensor([[[math.e, 1.0, 5.0]], [[1.0, 1.0, 1.0]]])
        depth = torch.tensor([[[1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0]]])
        valid = torch.tensor([[[True, True, False]], [[False, False, False]]])
        # d = 1, 0: mean d^2 = 1/2, (mean d)^2 = 1/4; the second image has no known pixel
        expected = math.sqrt(0.5 - 0.5 * 0.25) / 2
        prediction.requires_grad_()
        loss = silog(prediction, depth, valid, focus=0.5)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        loss.backward()
        assert prediction.grad is not None
        assert torch.isfinite(prediction.grad).all()
        assert prediction.grad[~valid].abs().max() == 0
        assert prediction.grad[0, 0, 0] > 0

    def test_the_loss_of_a_batch_is_the_mean_of_its_halves(self) -> None:
        """Several processes have the gradient of one."""
        data = batch(4)
        prediction = data["depth"] + 0.5
        halves = [
            silog(prediction[part], data["depth"][part], data["valid"][part]) for part in (slice(0, 2), slice(2, 4))
        ]
        torch.testing.assert_close(silog(prediction, data["depth"], data["valid"]), sum(halves) / 2)

    def test_the_loss_is_computed_in_float32(self) -> None:
        data = batch(2)
        prediction = (data["depth"] + 0.3).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            output = silog(prediction, data["depth"], data["valid"])
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, silog(prediction.float(), data["depth"], data["valid"]))


def test_errors_by_hand_over_known_pixels() -> None:
    predicted = torch.tensor([[[2.0, 3.0, 9.0]], [[4.0, 4.0, 4.0]]])
    depth = torch.tensor([[[1.0, 4.0, 0.0]], [[4.0, 5.0, 2.0]]])
    valid = torch.tensor([[[True, True, False]], [[True, True, True]]])
    output = depth_errors(predicted, depth, valid)
    torch.testing.assert_close(output["abs_rel"], torch.tensor([(1 + 1 / 4) / 2, (0 + 1 / 5 + 1) / 3]))
    torch.testing.assert_close(output["rmse"], torch.tensor([1.0, math.sqrt(5 / 3)]))
    # factors: 2 and 4/3; 1, 5/4 (which is not below 1.25) and 2
    torch.testing.assert_close(output["delta1"], torch.tensor([0.0, 1 / 3]))


class TestHead:
    def test_patches_of_16_pixels_are_reassembled_at_strides_4_to_32(self) -> None:
        module = dpt(vit(patch_size=16, img_size=64)).eval()
        maps = module.reassemble_maps(torch.randn(1, 3, 64, 96))
        assert [tuple(values.shape[1:]) for values in maps] == [(4, 16, 24), (6, 8, 12), (8, 4, 6), (10, 2, 3)]

    def test_the_class_token_is_concatenated_with_each_patch_token(self) -> None:
        torch.manual_seed(0)
        part = Reassemble(3, 5, 1.0, readout=True)
        patches, cls = torch.randn(2, 3, 4, 6), torch.randn(2, 3)
        output = part(patches, cls)
        linear, weight = part.read[0], part.project.weight[:, :, 0, 0]  # type: ignore[index]
        token = torch.cat([patches[1, :, 2, 5], cls[1]])
        by_hand = weight @ F.gelu(linear.weight @ token + linear.bias) + part.project.bias
        torch.testing.assert_close(output[1, :, 2, 5], by_hand)
        without = Reassemble(3, 5, 1.0, readout=False)
        torch.testing.assert_close(
            without(patches)[1, :, 2, 5],
            without.project.weight[:, :, 0, 0] @ patches[1, :, 2, 5] + without.project.bias,
        )

    def test_fusion_adds_refines_and_doubles_the_resolution(self) -> None:
        torch.manual_seed(0)
        fusion = Fusion(4, first=False)
        x, joining = torch.randn(1, 4, 3, 5), torch.randn(1, 4, 3, 5)

        def residual(unit: Any, value: Tensor) -> Tensor:
            first, second = unit.layers[1], unit.layers[3]
            inner = F.conv2d(F.relu(value), first.weight, first.bias, padding=1)
            return value + F.conv2d(F.relu(inner), second.weight, second.bias, padding=1)

        refined = residual(fusion.refine, x + residual(fusion.joining, joining))
        doubled = F.interpolate(refined, size=(6, 10), mode="bilinear", align_corners=True)
        torch.testing.assert_close(fusion(x, joining), fusion.out(doubled))
        assert Fusion(4, first=True).joining is None

    @pytest.mark.parametrize("backbone", [vit, resnet], ids=["vit", "resnet"])
    def test_predictions_have_the_size_of_the_image_and_lie_in_range(self, backbone: Any) -> None:
        module = dpt(backbone()).eval()
        with torch.no_grad():
            depth = module(torch.randn(2, 3, 32, 64))
        assert depth.shape == (2, 32, 64)
        assert depth.dtype == torch.float32
        assert depth.min() > 0.5
        assert depth.max() < 8.0

    def test_sizes_that_are_not_divisible_by_the_strides(self) -> None:
        module = dpt(resnet()).eval()
        with torch.no_grad():
            assert module(torch.randn(1, 3, 52, 76)).shape == (1, 52, 76)

    def test_a_backbone_without_class_token_needs_readout_false(self) -> None:
        def without() -> nn.Module:
            return vit(class_token=False, global_pool="avg", fc_norm=False)

        with pytest.raises(SettingError, match=r"the backbone has no class token; use model.readout=false"):
            dpt(without())
        assert dpt(without(), readout=False)(torch.randn(1, 3, SIZE, SIZE)).shape == (1, SIZE, SIZE)


class TestTraining:
    @pytest.mark.parametrize("frozen", [False, True])
    @pytest.mark.parametrize("backbone", [vit, resnet], ids=["vit", "resnet"])
    def test_trainable_parameters_have_gradients_a_frozen_encoder_has_none(self, backbone: Any, frozen: bool) -> None:
        module = dpt(backbone(), frozen=frozen).train()
        step = module.training_step(batch(2), 0)  # type: ignore[arg-type]
        step["loss"].backward()
        for name, parameter in module.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.requires_grad or frozen or name.startswith("features.backbone.norm")
            if frozen:
                assert parameter.requires_grad != name.startswith("features."), name
        assert module.features.backbone.training != frozen

    def test_rules_can_lower_the_learning_rate_of_the_encoder(self) -> None:
        recipe = OptimizerRecipe(torch.optim.AdamW, lr=0.1, rules=[Rule(r"^features\.", lr_multiplier=0.1)])
        groups = dpt(optimizer=recipe).configure_optimizers().param_groups
        rates = {name: group["lr"] for group in groups for name in group["names"]}
        assert rates["features.backbone.blocks.0.attn.qkv.weight"] == pytest.approx(0.01)
        assert rates["fuse.3.out.weight"] == 0.1

    @pytest.mark.parametrize("backbone", [vit, resnet], ids=["vit", "resnet"])
    def test_it_memorizes_eight_images(self, backbone: Any) -> None:
        module, data = dpt(backbone(), width=16).train(), batch(8)
        optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
        for _ in range(60):
            optimizer.zero_grad()
            module.training_step(data, 0)["loss"].backward()  # type: ignore[arg-type]
            optimizer.step()
        output = depth_errors(module(data["image"]), data["depth"], data["valid"])
        assert output["abs_rel"].mean() < 0.15
        assert output["delta1"].mean() > 0.85


def test_validation_averages_over_images() -> None:
    module, data = dpt().eval(), batch(3)
    module.log = lambda *_args, **_kwargs: None  # type: ignore[method-assign,assignment]
    data["replaced"] = torch.tensor([False, False, True])
    module.forward = lambda image: torch.full((len(image), 16, 16), 2.0)  # type: ignore[method-assign,assignment]
    module.validation_step(data, 0)  # type: ignore[arg-type]
    expected = depth_errors(torch.full((2, SIZE, SIZE), 2.0), data["depth"][:2], data["valid"][:2])
    for name, metric in module.metrics.items():
        torch.testing.assert_close(metric.compute(), expected[name].mean())  # type: ignore[operator]
    data["valid"][:] = False
    module.validation_step(data, 0)  # type: ignore[arg-type]  # nothing is known, and nothing is raised


def test_visualize_shows_image_prediction_and_ground_truth() -> None:
    module, data = dpt().eval(), batch(2)
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(normalize=lambda image: image / 255))  # type: ignore
    module.forward = lambda image: data["depth"]  # type: ignore[method-assign,assignment]
    shown = module.visualize(data)["depth"]  # type: ignore[arg-type]
    assert shown.shape == (2, 3, 3, SIZE, SIZE)
    known = data["valid"][:, None].expand(-1, 3, -1, -1)
    assert torch.equal(shown[:, 1][known], shown[:, 2][known])
    near = data["depth"][0].masked_fill(~data["valid"][0], 99.0).argmin()
    far = data["depth"][0].argmax()
    assert shown[0, 2].flatten(1)[:, near].mean() > shown[0, 2].flatten(1)[:, far].mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nearest": 0.0}, "0 < nearest < farthest"),
        ({"focus": 1.5}, "focus in"),
        ({"widths": (4, 4)}, "DPT needs four maps, got 4 and 2"),
        ({"blocks": [1, 3]}, "DPT needs four maps, got 2 and 4"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        dpt(**options)
