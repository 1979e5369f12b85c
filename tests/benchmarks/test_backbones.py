"""A few of the models that the benchmark tries, at reduced depth, with the outcome of each use."""

from __future__ import annotations

from typing import Any

import pytest
from timm.models import _registry

from benchmarks import backbones
from benchmarks.backbones import MODELS, USES, attempt, report

YES = dict.fromkeys(USES, "works")
NOT_A_VIT = {"MAE": "refused: backbone.model_name: MAE needs a plain timm ViT"}
NO_PATCHES = {"MoCo v3": "refused: backbone.model_name: MoCo v3 with model.frozen_patches=true needs a plain timm ViT"}
TWO_CLASSIFIERS = {
    "fine-tuning": "refused: backbone.model_name: fine-tuning replaces the linear classifier of a timm model, and "
    "VisionTransformerDistilled has 2 of them"
}
ONE_SIZE = {"DINO": "refused: backbone.model_name: "}
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 16, "num_heads": 2}

CASES: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    ("test_resnet", {}, YES | NOT_A_VIT),
    ("test_convnext", {}, YES | NOT_A_VIT),
    ("test_efficientnet", {}, YES | NOT_A_VIT),
    ("test_mambaout", {}, YES | NOT_A_VIT),
    ("test_vit", {"img_size": 32, "depth": 1}, YES),
    ("vit_base_patch16_clip_224", SMALL, YES),
    ("vit_small_patch14_reg4_dinov2", SMALL, YES),
    ("test_vit_relpos", {"img_size": 32, "depth": 1}, YES | NOT_A_VIT | NO_PATCHES | ONE_SIZE),
    ("eva02_tiny_patch14_224", SMALL, YES | NOT_A_VIT | NO_PATCHES | ONE_SIZE),
    ("deit_tiny_distilled_patch16_224", SMALL, YES | NOT_A_VIT | NO_PATCHES | TWO_CLASSIFIERS),
    ("test_coatnet", {}, YES | NOT_A_VIT | ONE_SIZE),
    (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "depths": (1, 1), "embed_dim": 8, "num_heads": (1, 2), "window_size": 2},
        YES | NOT_A_VIT | NO_PATCHES | ONE_SIZE,
    ),
]


@pytest.fixture(autouse=True)
def _small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_SIZE", 64)


@pytest.mark.parametrize(("name", "options", "expected"), CASES, ids=[name for name, *_ in CASES])
def test_a_model_works_or_is_refused_when_the_method_is_built(
    name: str, options: dict[str, Any], expected: dict[str, str]
) -> None:
    for use, outcome in expected.items():
        found = attempt(use, name, **options)
        assert found.startswith(outcome), (use, found)


def test_every_family_of_timm_is_in_the_list_but_those_with_large_models_alone() -> None:
    families = {_registry._model_to_module[name] for name in MODELS}
    missing = set(_registry._module_to_models) - families
    assert missing == {"deepseek_vit", "gemma4_vit", "vgg"}


def test_the_page_names_what_neither_works_nor_is_refused() -> None:
    uses = dict.fromkeys(USES, "works") | {"DINO": "refused: one size of K", "MAE": "error: AttributeError: x"}
    entry = {"family": "f", "kind": "K", "size": [8, 8], "uses": uses}
    section = report({"models": {"m": entry}, "missing": ["vgg"], "timm": "1"})
    assert section.checks[0].met is False
    assert section.checks[0].measured == "4 work, 1 are refused, 1 neither"
    assert "- m with MAE: error: AttributeError: x" in section.body
    assert "- one size of …: K" in section.body
    assert "| m (f) | yes | – | yes | **error** | yes | yes |" in section.body
    assert backbones.report({"models": {}, "missing": [], "timm": "1"}).checks[0].met is True
