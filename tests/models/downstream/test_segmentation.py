"""Tests of segmentation heads: parts by hand, gradients, training and validation."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.datamodules.batches.base import IGNORED, BatchError
from src.errors import SettingError
from src.models.downstream.colormaps import color_classes
from src.models.downstream.segmentation import (
    FCNHead,
    LinearHead,
    PyramidPooling,
    Segmenter,
    UPerNetHead,
    pixel_loss,
    sliding_window,
)
from src.optim import OptimizerRecipe
from tests.models.downstream.toy import SIZE, resnet, vit

RECIPE = OptimizerRecipe(torch.optim.AdamW, lr=0.1, weight_decay=0.05)
UPERNET = {"head": partial(UPerNetHead, width=8), "auxiliary": partial(FCNHead, width=8)}


def linear(backbone: nn.Module | None = None, *, classes: int = 4, **options: Any) -> Segmenter:
    settings = {"head": LinearHead, "maps": 1, "norm": True, "frozen": True, "crop": SIZE} | options
    module = Segmenter(backbone or vit(), RECIPE, **settings)
    module.build(classes)
    return module


def upernet(backbone: nn.Module | None = None, *, classes: int = 4, **options: Any) -> Segmenter:
    module = Segmenter(backbone or vit(), RECIPE, **{**UPERNET, "crop": SIZE} | options)
    module.build(classes)
    return module


def batch(size: int = 8, classes: int = 4) -> dict[str, Tensor]:
    """Blocks of 8 x 8 pixels whose color is their class."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.randint(0, classes, (size, SIZE // 8, SIZE // 8), generator=generator)
    mask = mask.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    palette = torch.randn(classes, 3, generator=generator)
    return {
        "image": palette[mask].movedim(-1, 1) + 0.1 * torch.randn(size, 3, SIZE, SIZE, generator=generator),
        "mask": mask,
        "replaced": torch.zeros(size, dtype=torch.bool),
    }


class TestParts:
    def test_the_loss_is_the_mean_over_all_pixels_with_zero_for_ignored_ones(self) -> None:
        logits = torch.tensor([[[[0.0, 0.0]], [[0.0, math.log(3.0)]]]])  # two classes, an image of 1 x 2
        both = torch.tensor([[[0, 1]]])
        assert pixel_loss(logits, both).item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)
        assert pixel_loss(logits, torch.tensor([[[0, IGNORED]]])).item() == pytest.approx(math.log(2) / 2)
        nothing = logits.clone().requires_grad_()
        pixel_loss(nothing, torch.full((1, 1, 2), IGNORED)).backward()
        assert nothing.grad is not None
        assert nothing.grad.abs().max() == 0

    def test_the_loss_of_a_batch_is_the_mean_of_its_halves(self) -> None:
        """Several processes have the gradient of one."""
        torch.manual_seed(0)
        logits, mask = torch.randn(4, 3, 4, 4), torch.randint(0, 3, (4, 8, 8))
        mask[0], mask[1, :3] = IGNORED, IGNORED
        halves = [pixel_loss(logits[part], mask[part]) for part in (slice(0, 2), slice(2, 4))]
        torch.testing.assert_close(pixel_loss(logits, mask), sum(halves) / 2)

    def test_pyramid_pooling_concatenates_averages_with_the_map(self) -> None:
        pooling = PyramidPooling(1, 1, (1, 2)).eval()
        for part in pooling.parts:
            nn.init.ones_(part[1][0].weight)  # type: ignore[index,arg-type]
        layer_inputs: list[Tensor] = []
        pooling.fuse.register_forward_pre_hook(lambda _module, inputs: layer_inputs.append(inputs[0]))
        x = torch.arange(16.0).view(1, 1, 4, 4)
        pooling(x)
        itself, whole, quarters = layer_inputs[0][0]
        assert torch.equal(itself, x[0, 0])
        factor = 1 / math.sqrt(1 + 1e-5)  # of a batch norm with initial statistics
        torch.testing.assert_close(whole, torch.full((4, 4), 7.5 * factor))
        # averages of rows 0-1 and 2-3, columns 0-1 and 2-3; the corners are not interpolated
        for (row, column), mean in {(0, 0): 2.5, (0, 3): 4.5, (3, 0): 10.5, (3, 3): 12.5}.items():
            assert quarters[row, column].item() == pytest.approx(mean * factor)

    def test_maps_of_a_vit_are_resized_to_a_pyramid_and_those_of_a_convnet_are_not(self) -> None:
        maps = [torch.randn(2, 6, 4, 4) for _ in range(4)]
        head = UPerNetHead((6,) * 4, (16,) * 4, 3, width=5)
        assert [rescale(values).shape[-1] for rescale, values in zip(head.rescale, maps, strict=True)] == [16, 8, 4, 2]
        assert head(maps).shape == (2, 3, 16, 16)
        staged = UPerNetHead((2, 4, 6, 8), (4, 8, 16, 32), 3, width=5)
        assert all(isinstance(layer, nn.Identity) for layer in staged.rescale)
        sizes = ((2, 16), (4, 8), (6, 4), (8, 2))
        assert staged([torch.randn(2, width, side, side) for width, side in sizes]).shape == (2, 3, 16, 16)

    def test_all_maps_reach_the_finest_level(self) -> None:
        head = UPerNetHead((2, 2, 2, 2), (4, 8, 16, 32), 3, width=4).eval()
        maps = [torch.randn(1, 2, 8 >> level, 8 >> level, requires_grad=True) for level in range(4)]
        layer_inputs: list[Tensor] = []
        head.smooth[0].register_forward_pre_hook(lambda _module, inputs: layer_inputs.append(inputs[0]))
        head(maps)
        layer_inputs[0].sum().backward()
        assert all(values.grad is not None and values.grad.abs().sum() > 0 for values in maps)

    def test_a_single_training_image_is_refused(self) -> None:
        with pytest.raises(SettingError, match=r"data.batch_size: .* at least 2 images, got 1"):
            upernet().train().training_step(batch(1), 0)  # type: ignore[arg-type]


class TestWindows:
    def test_windows_cover_the_image_and_overlaps_are_averaged(self) -> None:
        image = torch.arange(6.0).view(1, 1, 1, 6).expand(1, 3, 4, 6)
        starts: list[float] = []

        def mean(window: Tensor) -> Tensor:
            assert window.shape[-2:] == (4, 4)
            starts.append(window[0, 0, 0, 0].item())
            return window[:, :1].mean(dim=(2, 3), keepdim=True).expand(-1, -1, 4, 4)

        output = sliding_window(mean, image, crop=(4, 4), stride=(3, 3))
        assert starts == [0.0, 2.0]  # the second window is moved back from 3
        assert output[0, 0, 0].tolist() == [1.5, 1.5, 2.5, 2.5, 3.5, 3.5]

    @pytest.mark.parametrize(("height", "width"), [(9, 11), (4, 13), (3, 10), (10, 4)])
    def test_a_pixelwise_network_gives_the_same_with_windows(self, height: int, width: int) -> None:
        image = torch.randn(2, 3, height, width)
        output = sliding_window(lambda window: window * 2 + 1, image, crop=(4, 4), stride=(3, 3))
        torch.testing.assert_close(output, image * 2 + 1)

    def test_windows_may_be_wider_than_high(self) -> None:
        shapes = []

        def network(window: Tensor) -> Tensor:
            shapes.append(tuple(window.shape[-2:]))
            return window * 2 + 1

        image = torch.randn(1, 3, 5, 13)
        torch.testing.assert_close(sliding_window(network, image, crop=(4, 8), stride=(3, 5)), image * 2 + 1)
        assert shapes == [(4, 8)] * 4  # rows from 0 and 1, columns from 0 and 5

    def test_an_image_larger_than_the_crop_is_predicted_with_windows(self) -> None:
        module = linear(stride=0.5).eval()
        assert module.stride == (16, 16)
        small, large = torch.randn(1, 3, SIZE, SIZE), torch.randn(1, 3, SIZE, SIZE + 16)
        torch.testing.assert_close(module.predict(small), module(small))
        output = module.predict(large)
        left, right = module(large[..., :SIZE]), module(large[..., 16:])
        torch.testing.assert_close(output[..., :16], left[..., :16])
        torch.testing.assert_close(output[..., 16:SIZE], (left[..., 16:] + right[..., :16]) / 2)
        torch.testing.assert_close(output[..., SIZE:], right[..., 16:])


class TestTraining:
    def test_the_auxiliary_loss_is_weighted(self) -> None:
        module, data = upernet().eval(), batch(2)
        step = module.training_step(data, 0)  # type: ignore[arg-type]
        logs = step["logs"]
        maps = module.features(data["image"])
        torch.testing.assert_close(logs["main"], pixel_loss(module.head(maps), data["mask"]))
        torch.testing.assert_close(logs["auxiliary"], pixel_loss(module.auxiliary(maps), data["mask"]))  # type: ignore
        torch.testing.assert_close(step["loss"], logs["main"] + 0.4 * logs["auxiliary"])  # type: ignore[operator]

    @pytest.mark.parametrize("make", [linear, upernet])
    @pytest.mark.parametrize("backbone", [vit, resnet])
    def test_trainable_parameters_have_gradients_and_a_frozen_encoder_has_none(self, make: Any, backbone: Any) -> None:
        module = make(backbone()).train()
        module.training_step(batch(2), 0)["loss"].backward()
        frozen = module.features.frozen
        for name, parameter in module.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            if frozen:
                assert parameter.requires_grad != name.startswith("features."), name
        assert module.features.backbone.training != frozen

    def test_a_frozen_encoder_is_unchanged_by_training(self) -> None:
        module = linear(resnet()).train()
        before = {name: value.clone() for name, value in module.features.state_dict().items()}
        optimizer = module.configure_optimizers()
        for _ in range(2):
            module.training_step(batch(4), 0)["loss"].backward()  # type: ignore[arg-type]
            optimizer.step()
        assert all(torch.equal(value, before[name]) for name, value in module.features.state_dict().items())

    def test_layer_decay_from_the_head_to_the_patch_embedding(self) -> None:
        optimizer = upernet(layer_decay=0.5).configure_optimizers()
        rates = {name: group["lr_multiplier"] for group in optimizer.param_groups for name in group["names"]}
        assert rates["head.classifier.weight"] == rates["auxiliary.layers.0.0.weight"] == 1.0
        assert rates["features.backbone.blocks.3.attn.qkv.weight"] == 0.5
        assert rates["features.backbone.blocks.0.attn.qkv.weight"] == 0.0625
        assert rates["features.backbone.pos_embed"] == 0.03125
        decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["names"]}
        assert decay["features.backbone.pos_embed"] == decay["features.backbone.cls_token"] == 0

    def test_as_in_mmsegmentation_tokens_are_decayed_at_their_layers_rate_and_scales_of_blocks_are_new(self) -> None:
        module = upernet(vit(init_values=1.0), layer_decay=0.5, decay_tokens=True, new_layer_scale=True)
        groups = module.configure_optimizers().param_groups
        of_name = {name: (group["lr_multiplier"], group["weight_decay"]) for group in groups for name in group["names"]}
        for token in ("pos_embed", "cls_token"):
            assert of_name[f"features.backbone.{token}"] == (0.03125, 0.05)
        assert of_name["features.backbone.blocks.3.ls1.gamma"] == (0.5, 0.0)
        assert of_name["features.backbone.blocks.3.norm1.bias"] == (0.5, 0.0)
        # the weights of an encoder without such scales
        backbone = module.features.backbone
        assert set(vit().state_dict()) == {
            n for n in backbone.state_dict() if not n.startswith(tuple(module.new_parameters))
        }
        assert backbone.blocks[0].ls2.gamma.tolist() == [1.0] * 24
        with pytest.raises(
            SettingError, match=r"new_layer_scale: the backbone has no LayerScale; set backbone\.init_values"
        ):
            upernet(vit(), new_layer_scale=True)

    @pytest.mark.parametrize(
        ("make", "backbone", "steps"),
        [(linear, vit, 60), (upernet, vit, 50), (upernet, resnet, 50)],
        ids=["linear", "upernet on a ViT", "upernet on a ConvNet"],
    )
    def test_it_memorizes_eight_images(self, make: Any, backbone: Any, steps: int) -> None:
        module, data = make(backbone()).train(), batch(8)
        for part in module.modules():
            if isinstance(part, nn.Dropout2d):
                part.p = 0.0
        learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=0.05 if module.features.frozen else 1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            module.training_step(data, 0)["loss"].backward()
            optimizer.step()
        accuracy = (module(data["image"]).argmax(dim=1) == data["mask"]).float().mean()
        assert accuracy > 0.9


class TestValidation:
    def scores(self, module: Segmenter, predictions: list[list[int]], truths: list[list[int]]) -> dict[str, float]:
        module.log = lambda *_args, **_kwargs: None  # type: ignore[method-assign,assignment]
        for predicted, truth in zip(predictions, truths, strict=True):
            logits = F.one_hot(torch.tensor(predicted), module.num_classes or 0).float().T[None, :, None]
            module.predict = lambda _image, logits=logits: logits  # type: ignore[method-assign,misc]
            mask = torch.tensor(truth)[None, None]
            module.validation_step(
                {"image": torch.zeros(1, 3, 1, 4), "mask": mask, "replaced": torch.zeros(1, dtype=torch.bool)},  # type: ignore
                0,
            )
        return {name: metric.compute().item() for name, metric in module.metrics.items()}  # type: ignore[operator]

    def test_the_mean_intersection_over_union_of_a_split_by_hand(self) -> None:
        """Two images. Class 0: 1 of 2, class 1: 2 of 4, class 2: 2 of 3. Class 3 does not occur and is left out."""
        output = self.scores(linear(), [[0, 1, 1, 0], [1, 2, 2, 2]], [[0, 0, 1, IGNORED], [1, 1, 2, 2]])
        assert output["miou"] == pytest.approx((1 / 2 + 2 / 4 + 2 / 3) / 3)
        assert output["pixel_accuracy"] == pytest.approx(5 / 7)

    def test_a_predicted_class_that_does_not_occur_has_an_iou_of_zero(self) -> None:
        output = self.scores(linear(), [[0, 0, 1, 3]], [[0, 0, 1, 1]])
        assert output["miou"] == pytest.approx((1 + 1 / 2 + 0) / 3)

    def test_replaced_samples_are_not_validated(self) -> None:
        module, data = linear(), batch(2)
        module.log = lambda *_args, **_kwargs: None  # type: ignore[method-assign,assignment]
        data["replaced"] = torch.tensor([True, True])
        module.validation_step(data, 0)  # type: ignore[arg-type]
        assert module.metrics["miou"].update_count == 0  # type: ignore[union-attr]

    def test_predictions_are_resized_to_the_ground_truth(self) -> None:
        module = linear().eval()
        module.log = lambda *_args, **_kwargs: None  # type: ignore[method-assign,assignment]
        data = batch(1)
        data["mask"] = torch.zeros(1, 50, 70, dtype=torch.int64)
        module.validation_step(data, 0)  # type: ignore[arg-type]
        assert module.metrics["miou"].confmat.sum() == 50 * 70  # type: ignore[union-attr,operator]


def test_classes_come_from_the_masks_of_the_data() -> None:
    module = Segmenter(vit(), RECIPE, head=LinearHead, maps=1)
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(mask_classes=["sky", "sea"]))  # type: ignore[assignment]
    module.configure_model()
    assert (module.num_classes, module.classes, module.head.classifier.out_channels) == (2, ["sky", "sea"], 2)
    with pytest.raises(BatchError, match="the classifier has 2 classes, the data or checkpoint 3"):
        module.build(3)


def test_visualize_shows_image_prediction_and_ground_truth() -> None:
    module, data = linear().eval(), batch(2)
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(normalize=lambda image: image / 255))  # type: ignore
    with torch.no_grad():
        shown = module.visualize(data)["segmentation"]  # type: ignore[arg-type]
    assert shown.shape == (2, 3, 3, SIZE, SIZE)
    assert torch.equal(shown[:, 0], data["image"])
    assert torch.equal(shown[:, 2], color_classes(data["mask"]) / 255)
    palette = color_classes(torch.arange(256).view(1, 1, 256))[0, :, 0].T
    assert len(palette.unique(dim=0)) > 200
    assert palette[IGNORED].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_decay": 0.0}, "model.layer_decay and model.stride must lie in"),
        ({"stride": 1.5}, "model.layer_decay and model.stride must lie in"),
        ({"maps": 3, **UPERNET}, "model.blocks: UPerNet needs four maps of a ViT, got 3"),
        ({"classes": 256}, "model.num_classes must be 2 to 255, got 256"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        linear(**options)
