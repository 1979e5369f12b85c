"""Tests the export of two towers to transformers."""

from pathlib import Path

import pytest
import timm
import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, SiglipModel

from src import configuration
from src.configuration import compose
from src.datamodules.text.tokenizer import load_or_train
from src.errors import UserError
from src.export import hf_two_towers
from src.export.__main__ import main
from src.models.image_text.clip import CLIP
from src.models.image_text.siglip import SigLIP
from src.models.text.text_tower import CLIPTextTower, SigLIPTextTower
from src.optim import OptimizerRecipe
from tests.export.test_export import images, make_run

SIZE = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
TEXTS = ["a photo of a red star", "a blue ring", "two striped things, the largest a heart, and more than fits in here"]
LENGTH, VOCABULARY = 16, 300
RECIPE = OptimizerRecipe(torch.optim.AdamW, lr=1.0)


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def clip(name: str = "vit_base_patch32_clip_224", activation: str = "gelu", **options) -> CLIP:
    text = CLIPTextTower(vocabulary=VOCABULARY, length=LENGTH, width=16, depth=2, heads=2, activation=activation)
    vit = timm.create_model(name, img_size=48, **{**SIZE, **options.pop("backbone", {})})
    return randomized(CLIP(vit, text, RECIPE, embed_dim=8, **options))


def siglip(**backbone) -> SigLIP:
    text = SigLIPTextTower(vocabulary=VOCABULARY, length=LENGTH, width=16, depth=2, heads=2, embed_dim=16)
    vit = timm.create_model("vit_base_patch16_siglip_224", img_size=48, **SIZE, **backbone)
    return randomized(SigLIP(vit, text, RECIPE))


def run_of(folder: Path, module, experiment: str, backbone: dict):
    words = [f"experiment={experiment}", f"data.vocabulary={VOCABULARY}", f"data.text_length={LENGTH}"]
    words += ["model.text.width=16", "model.text.depth=2", "model.text.heads=2"]
    words += ["model.embed_dim=8"] if isinstance(module, CLIP) else ["model.text.embed_dim=16"]
    load_or_train(folder / "tokenizer.json", lambda: TEXTS, vocabulary=VOCABULARY, length=LENGTH)
    return make_run(folder, module, words, backbone)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "name"), [(CLIPModel, "vit_base_patch32_clip_224"), (SiglipModel, "vit_base_patch16_siglip_224")]
)
def test_transformers_loads_both_towers_with_the_same_outputs(kind, name, tmp_path):
    is_clip = kind is CLIPModel
    module = clip() if is_clip else siglip()
    backbone = {"model_name": name, **SIZE}
    run = run_of(tmp_path / "run", module, "clip_vitb32" if is_clip else "siglip_vitb16", backbone)
    assert main([f"run={run.dir}", "format=hf"]) == 0
    folder = run.dir / "export" / "hf"
    model, loading = kind.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    assert ids["input_ids"].shape == (3, LENGTH)
    output = model.eval()(input_ids=ids["input_ids"], pixel_values=images())
    image, text = module.encode_image(images()), module.encode_text(ids["input_ids"], ids["attention_mask"].bool())
    torch.testing.assert_close(output.image_embeds, image, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.text_embeds, text, atol=1e-5, rtol=0)
    logits = module.logit_scale.exp() * image @ text.T + (0 if is_clip else module.logit_bias)
    torch.testing.assert_close(output.logits_per_image, logits, atol=1e-4, rtol=0)
    check_crop(AutoImageProcessor.from_pretrained(folder), squeezed=not is_clip)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: zero-shot-image-classification" in card
    code = card.split("```python\n")[1].split("```")[0].replace("PATH_OF_THIS_FOLDER", str(folder))
    scope = {"images": [torch.zeros(3, 60, 60, dtype=torch.uint8)], "texts": TEXTS}
    exec(code, scope)  # the card's code runs
    assert scope["output"].logits_per_image.shape == (1, 3)


def check_crop(processor, *, squeezed: bool) -> None:
    """Of three stripes, black, grey and white, CLIP's crop of the whole shorter side is the grey one, and SigLIP's
    squeezed image has all three."""
    stripes = torch.tensor([0, 128, 255], dtype=torch.uint8).repeat_interleave(48).expand(3, 48, 144)
    pixels = processor(stripes, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 48)
    mean, std = (torch.tensor(values)[:, None] for values in (processor.image_mean, processor.image_std))
    seen = ((pixels[0, :, 20] * std + mean) * 255).round()[:, [4, 12, 24, 36, 44]]
    expected = [0, 0, 128, 255, 255] if squeezed else [128] * 5
    torch.testing.assert_close(seen, torch.tensor(expected, dtype=torch.float).expand(3, 5), atol=2, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("experiment", ["clip_vitb32", "siglip_vitb16"])
def test_runs_at_the_tiny_scale_can_be_exported(experiment, tmp_path):
    words = [f"experiment={experiment}", "scale=tiny", "image_size=16", f"data.vocabulary={VOCABULARY}"]
    config = compose("train", [*words, f"data.text_length={LENGTH}", f"run.dir={tmp_path}"])
    module = configuration.instantiate(config.model).eval()
    model = hf_two_towers.as_transformers(module, tokenizer(tmp_path)).eval()
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ids, mask = tokenizer(tmp_path)(TEXTS)
    output = model(input_ids=ids, pixel_values=pixels.repeat(2, 1, 1, 1)[:3])
    torch.testing.assert_close(output.image_embeds[:2], module.encode_image(pixels), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.text_embeds, module.encode_text(ids, mask), atol=1e-5, rtol=0)


@torch.no_grad()
def test_timm_squeezes_images_as_the_run_does(tmp_path):
    run = run_of(tmp_path / "run", siglip(), "siglip_vitb16", {"model_name": "vit_base_patch16_siglip_224", **SIZE})
    assert main([f"run={run.dir}", "format=timm"]) == 0
    model = timm.create_model(f"local-dir:{run.dir / 'export' / 'timm'}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert (data["crop_pct"], data["crop_mode"]) == (1.0, "squash")


@torch.no_grad()
def test_the_image_tower_exports_to_timm(tmp_path):
    run = run_of(tmp_path / "run", clip(), "clip_vitb32", {"model_name": "vit_base_patch32_clip_224", **SIZE})
    assert main([f"run={run.dir}", "format=timm"]) == 0
    model = timm.create_model(f"local-dir:{run.dir / 'export' / 'timm'}", pretrained=True).eval()
    exported, own = (vit.forward_features(images()) for vit in (model, clip().image_encoder.backbone))
    torch.testing.assert_close(exported, own, atol=1e-5, rtol=0)


def tokenizer(tmp_path: Path):
    return load_or_train(tmp_path / "tokenizer.json", lambda: TEXTS, vocabulary=VOCABULARY, length=LENGTH)


@torch.no_grad()
def test_activation_and_eps_equal_those_of_the_towers(tmp_path):
    quick = clip("vit_base_patch32_clip_quickgelu_224", activation="quick_gelu")
    model = hf_two_towers.as_transformers(quick, tokenizer(tmp_path))
    assert (model.config.vision_config.hidden_act, model.config.text_config.hidden_act) == ("quick_gelu",) * 2
    assert model.config.vision_config.layer_norm_eps == 1e-5
    assert model.config.text_config.eos_token_id == 1
    feature = model.vision_model(pixel_values=images()).pooler_output
    torch.testing.assert_close(feature, quick.image_encoder(images()).embedding, atol=1e-5, rtol=0)


def test_towers_that_transformers_cannot_express_are_refused_with_the_reason(tmp_path):
    inner = tokenizer(tmp_path)
    plain = "vit_tiny_patch16_224"
    for module, message in (
        (clip(plain), "CLIPModel needs a norm before the blocks"),
        (clip(plain, backbone={"pre_norm": True, "reg_tokens": 2}), "CLIPModel needs one class token"),
        (clip(backbone={"init_values": 0.1}), r"no parameter for 'blocks.0.ls1.gamma'"),
        (clip(backbone={"qk_norm": True}), r"no parameter for 'blocks.0.attn.q_norm.weight'"),
        (clip(pool=lambda prefix, patches: patches.mean(dim=1)), "the class token as the image's feature"),
        (siglip(class_token=True), "SiglipModel needs no class token"),
    ):
        with pytest.raises(UserError, match=message):
            hf_two_towers.as_transformers(module, inner)
    module = clip()
    module.image_encoder.backbone = timm.create_model("resnet18")
    with pytest.raises(UserError, match="a timm VisionTransformer, not a ResNet"):
        hf_two_towers.as_transformers(module, inner)
    inner.inner.eos_token = "<start>"
    with pytest.raises(UserError, match="an end token other than id 2"):
        hf_two_towers.as_transformers(clip(), inner)


def test_different_features_stop_the_export(tmp_path, monkeypatch):
    run = run_of(tmp_path / "run", clip(), "clip_vitb32", {"model_name": "vit_base_patch32_clip_224", **SIZE})
    correct = hf_two_towers.vision_weights

    def swapped(vit):
        weights = correct(vit)
        query, value = (f"encoder.layers.1.self_attn.{part}_proj.weight" for part in "qv")
        return weights | {query: weights[value], value: weights[query]}

    monkeypatch.setattr(hf_two_towers, "vision_weights", swapped)
    with pytest.raises(UserError, match=r"not exported: features differ by .* \(image_embeds\)"):
        main([f"run={run.dir}", "format=hf"])
    assert not (run.dir / "export" / "hf").exists()
