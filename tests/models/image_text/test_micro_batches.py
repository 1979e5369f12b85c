"""Micro-batches: the gradient of the whole batch with the activations of a part."""

from functools import partial

import pytest
import timm
import torch
from torch import nn

from src.models.image_text import micro_batches
from src.models.image_text.clip import CLIP
from src.models.image_text.siglip import SigLIP
from src.models.text.text_tower import CLIPTextTower, SigLIPTextTower, TransformersTextTower
from src.optim import OptimizerRecipe, adamw
from tests.distributed import in_two_processes
from tests.toys import small_vit

PAIRS = 8
METHODS = ("clip", "siglip", "siglip gathered")


def method(kind: str, **options) -> nn.Module:
    torch.manual_seed(0)
    recipe = OptimizerRecipe(partial(adamw), lr=0.1)
    if kind == "clip":
        vit = small_vit()
        text = CLIPTextTower(vocabulary=20, length=6, width=16, depth=1, heads=2)
        return CLIP(vit, text, recipe, embed_dim=8, **options).double()
    vit = small_vit(global_pool="map", class_token=False)
    sigmoid = SigLIPTextTower(vocabulary=20, length=6, width=8, depth=1, heads=2, embed_dim=16)
    return SigLIP(vit, sigmoid, recipe, ring=kind == "siglip", **options).double()


def pairs(rows: slice) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(PAIRS, 3, 16, 16, generator=generator, dtype=torch.float64)
    text = torch.randint(3, 20, (PAIRS, 6), generator=generator)
    return {"image": image[rows], "text": text[rows], "text_mask": torch.ones_like(text[rows], dtype=torch.bool)}


def gradients(module: nn.Module, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss = module.training_step(pairs(rows), 0)["loss"]
    loss.backward()
    return {"loss": loss.detach(), **{name: value.grad for name, value in module.named_parameters()}}


@pytest.mark.parametrize("kind", METHODS)
def test_the_gradient_equals_that_of_the_whole_batch(kind):
    whole = gradients(method(kind))
    for size in (1, 3, 4):  # the last part may be smaller
        for name, value in gradients(method(kind, micro_batch=size)).items():
            assert torch.allclose(value, whole[name], rtol=0, atol=1e-8), (size, name)
    assert all(value.abs().max() > 1e-6 for name, value in whole.items() if not name.endswith("k_proj.bias"))


def on_each(process: int) -> dict[str, torch.Tensor]:
    half = PAIRS // 2
    rows = slice(process * half, (process + 1) * half)
    return {f"{kind} {n}": g for kind in METHODS for n, g in gradients(method(kind, micro_batch=2), rows).items()}


def test_over_two_processes_the_gradient_equals_that_of_the_whole_batch():
    first, second = in_two_processes(on_each)
    for kind in METHODS:
        for name, value in gradients(method(kind)).items():
            mean = (first[f"{kind} {name}"] + second[f"{kind} {name}"]) / 2  # as DDP takes it
            assert torch.allclose(mean, value, rtol=0, atol=1e-8), (kind, name)


def test_dropout_is_the_same_when_a_part_is_recomputed(monkeypatch):
    def with_dropout() -> nn.Module:
        module = method("clip", micro_batch=2)
        bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        torch.manual_seed(2)
        module.text_encoder = TransformersTextTower({"model_type": "bert", **bert}, vocabulary=20, length=6).double()
        torch.manual_seed(3)
        return module

    again = gradients(with_dropout())
    monkeypatch.setattr(micro_batches, "checkpoint", lambda tower, *part, use_reentrant: tower(*part))
    once = gradients(with_dropout())
    for name, value in once.items():
        assert torch.allclose(again[name], value, rtol=0, atol=1e-12), name
    module = with_dropout()
    first = module.training_step(pairs(slice(None)), 0)["loss"]
    assert first != module.training_step(pairs(slice(None)), 0)["loss"]  # there is dropout


def test_only_the_inputs_of_a_part_are_saved():
    def saved_numbers(size: int | None) -> int:
        sizes: list[int] = []
        module, image = method("clip", micro_batch=size), pairs(slice(None))["image"]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            module.image_features(image)
        return sum(sizes) - image.numel()

    assert saved_numbers(2) == 0
    assert saved_numbers(None) > 10_000


def test_a_tower_with_batch_norm_raises():
    resnet = timm.create_model("resnet18", num_classes=0)
    text = CLIPTextTower(vocabulary=20, length=6, width=16, depth=1, heads=2)
    recipe = OptimizerRecipe(partial(adamw), lr=0.1)
    with pytest.raises(ValueError, match=r"model.micro_batch=2: image_encoder.backbone.bn1 is a batch norm"):
        CLIP(resnet, text, recipe, micro_batch=2)
    with pytest.raises(ValueError, match=r"model.micro_batch=0 must be at least 1"):
        method("clip", micro_batch=0)
    frozen = CLIP(resnet, text, recipe, micro_batch=2, freeze_image=True)  # in evaluation mode rows are independent
    whole = CLIP(resnet, text, recipe, freeze_image=True)
    image = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(frozen.image_features(image), whole.image_features(image))
