import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from src import runs
from src.configuration import compose
from src.errors import UserError
from src.export import hf_encoder
from src.export.__main__ import main
from src.export.hf_common import check_processor
from src.export.trained_model import load_trained
from src.models.backbones.weights import load_into, read_weights
from src.models.downstream.finetune import FineTune
from src.models.masked.mae import MAE
from src.optim import OptimizerRecipe

BACKBONE = {"model_name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def small(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model(**BACKBONE, **{"img_size": 48, "num_classes": 0} | kwargs)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_run(folder: Path, module, words: list[str], backbone: dict, size: str = "48") -> runs.Run:
    """Writes the folder of a trained run without training it."""
    config = compose("train", [*words, f"image_size={size}", "data.train_samples=64", "data.source.cache_dir=null"])
    OmegaConf.set_struct(config, False)
    config.backbone = {"_target_": "timm.create_model", "img_size": "${image_size}", **backbone}
    config.run.experiment, config.run.name, config.run.dir = words[0].split("=")[1], folder.name, str(folder)
    run = runs.Run(folder)
    (folder / "checkpoints").mkdir(parents=True)
    runs.store(run, config)
    content = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    torch.save(content, run.last)
    run.metrics_file.write_text(
        json.dumps({"train": {"eval/knn_top1": 0.625, "speed/images": 3.0}, "evaluate": {"x": {"y": 0.5}}})
    )
    return run


@pytest.fixture
def mae(tmp_path):
    module = MAE(small(), OptimizerRecipe(torch.optim.AdamW, lr=1.0), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    for parameter in module.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    words = ["experiment=mae_tiny", "model.decoder_dim=16", "model.decoder_depth=1", "model.decoder_heads=2"]
    return make_run(
        tmp_path / "mae", module, words, {**BACKBONE, "num_classes": 0, "drop_path_rate": 0.1}
    ), module.backbone.eval()


@pytest.fixture
def finetuned(tmp_path):
    module = FineTune(small(global_pool="avg"), OptimizerRecipe(partial(torch.optim.AdamW), lr=1.0))
    module.build(3)
    module.classes = ["cat", "dog", "owl"]
    torch.nn.init.normal_(module.backbone.head.weight)
    words = ["experiment=finetune_vitb", "scale=tiny"]
    run = make_run(tmp_path / "ft", module, words, {**BACKBONE, "num_classes": 0, "global_pool": "avg"})
    return run, module.backbone.eval()


def images(size: int = 48) -> torch.Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(5)) * 2 - 1


@torch.no_grad()
def test_timm_loads_the_export_by_checkpoint_path_and_as_a_local_folder(mae, tmp_path):
    run, backbone = mae
    to = tmp_path / "out"
    assert main([f"run={run.dir}", "format=timm", f"to={to}"]) == 0
    kwargs = {key: value for key, value in BACKBONE.items() if key != "model_name"}
    plain = timm.create_model(BACKBONE["model_name"], **kwargs, img_size=48, num_classes=0)
    assert load_file(to / "model.safetensors").keys() == plain.state_dict().keys()
    by_path = timm.create_model(
        BACKBONE["model_name"], checkpoint_path=to / "model.safetensors", **kwargs, img_size=48, num_classes=0
    )
    by_folder = timm.create_model(f"local-dir:{to}", pretrained=True)
    for model in (by_path, by_folder):
        torch.testing.assert_close(
            model.eval().forward_features(images()), backbone.forward_features(images()), atol=1e-5, rtol=0
        )
    data = timm.data.resolve_model_data_config(by_folder)
    assert data["input_size"] == (3, 48, 48)
    assert data["mean"] == pytest.approx((0.485, 0.456, 0.406))
    assert (data["crop_pct"], data["interpolation"]) == (1.0, "bicubic")
    assert not {"tag", "license"} & json.loads((to / "config.json").read_text())["pretrained_cfg"].keys()


@torch.no_grad()
def test_transformers_loads_the_export_without_missing_or_unexpected_keys(mae, tmp_path):
    run, backbone = mae
    to = tmp_path / "out"
    assert main([f"run={run.dir}", "format=hf", f"to={to}"]) == 0
    model, loading = AutoModel.from_pretrained(to, output_loading_info=True)
    assert type(model).__name__ == "ViTModel"
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    output, tokens = model.eval()(images()), backbone.forward_features(images())
    torch.testing.assert_close(output.last_hidden_state, tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.pooler_output, tokens[:, 0], atol=1e-5, rtol=0)
    processor = AutoImageProcessor.from_pretrained(to)
    pixels = processor(torch.full((3, 90, 60), 128, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 48)
    expected = (128 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels[0, :, 20, 20], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_fine_tuned_classifier_exports_to_timm_with_head_and_class_names(finetuned):
    run, backbone = finetuned
    assert main([f"run={run.dir}"]) == 0
    model = timm.create_model(f"local-dir:{run.dir / 'export' / 'timm'}", pretrained=True).eval()
    torch.testing.assert_close(model(images()), backbone(images()), atol=1e-5, rtol=0)
    assert model.pretrained_cfg["label_names"] == ["cat", "dog", "owl"]


def test_encoders_that_vitmodel_cannot_express_are_refused_with_the_reason(finetuned):
    run, _ = finetuned
    with pytest.raises(UserError, match=r"a timm VisionTransformer with class token.*comes after the pooling"):
        main([f"run={run.dir}", "format=hf"])
    assert not (run.dir / "export" / "hf").exists()
    with pytest.raises(UserError, match="resnet18 is a ResNet: use format=timm"):
        hf_encoder.check_supported(timm.create_model("resnet18"), "resnet18")
    with pytest.raises(UserError, match="other prefix tokens"):
        hf_encoder.check_supported(small(reg_tokens=2), "vit")
    with pytest.raises(UserError, match=r"ViTModel has no parameter for 'blocks.0.ls1.gamma'"):
        hf_encoder.vit_weights(small(init_values=0.1))


def test_different_features_stop_the_export_and_leave_no_folder(mae, monkeypatch):
    run, _ = mae
    correct = hf_encoder.vit_weights

    def swapped(vit):
        weights = correct(vit)
        query, value = (f"encoder.layer.1.attention.attention.{part}.weight" for part in ("query", "value"))
        weights[query], weights[value] = weights[value], weights[query]
        return weights

    monkeypatch.setattr(hf_encoder, "vit_weights", swapped)
    with pytest.raises(UserError, match=r"not exported: features differ by .* \(last_hidden_state\), more than 1e-05"):
        main([f"run={run.dir}", "format=hf"])
    assert not list((run.dir / "export").glob("*"))


def test_the_card_holds_recipe_metrics_and_code_that_loads(mae):
    run, _ = mae
    main([f"run={run.dir}", "format=timm"])
    card = (run.dir / "export" / "timm" / "README.md").read_text()
    assert "paper: Masked Autoencoders" in card
    assert "| train | eval/knn_top1 | 0.625 |" in card
    assert "| evaluate | x y | 0.5 |" in card
    assert "speed/" not in card
    assert str(run.dir) not in card
    code = card.split("```python\n")[1].split("```")[0].replace("PATH_OF_THIS_FOLDER", str(run.dir / "export" / "timm"))
    code = code.replace('"model.safetensors"', repr(str(run.dir / "export" / "timm" / "model.safetensors")))
    scope = {"images": images()}
    exec(code, scope)  # the card's code runs
    assert scope["features"].shape == (3, 37, 32)


def test_an_earlier_export_is_replaced_and_other_folders_are_not(mae, tmp_path):
    run, _ = mae
    to = tmp_path / "out"
    main([f"run={run.dir}", f"to={to}"])
    main([f"run={run.dir}", "format=hf", f"to={to}"])
    assert (to / "preprocessor_config.json").exists()
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("…")
    with pytest.raises(UserError, match="not an earlier export"):
        main([f"run={run.dir}", f"to={other}"])
    assert (other / "chapter1.tex").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["format=tim"], "no format 'tim'; did you mean timm"),
        (["fromat=timm"], "not 'fromat'; did you mean format"),
        (["encoder=encoda"], "no encoder 'encoda'; did you mean encoder"),
        (["checkpoint=best"], "no checkpoint 'best'; there are: last"),
    ],
)
def test_errors_name_the_nearest_option(mae, words, message):
    with pytest.raises(UserError, match=message):
        main([f"run={mae[0].dir}", *words])


def test_a_checkpoint_that_does_not_fit_is_refused(mae):
    run, _ = mae
    content = torch.load(run.last, weights_only=True)
    content["state_dict"].pop("backbone.cls_token")
    torch.save(content, run.last)
    with pytest.raises(UserError, match=r"last.ckpt does not fit the run's configuration: .*backbone.cls_token"):
        main([f"run={run.dir}"])


def test_a_run_on_wide_images_of_four_channels_exports_to_timm(tmp_path):
    wide = small(global_pool="avg", img_size=(48, 96), in_chans=4)
    module = FineTune(wide, OptimizerRecipe(torch.optim.AdamW, lr=1.0))
    module.build(3)
    module.classes = ["cat", "dog", "owl"]
    words = ["experiment=finetune_vitb", "scale=tiny", "data.channels=4", "data.mean=[0.1,0.2,0.3,0.4]"]
    backbone = {**BACKBONE, "num_classes": 0, "global_pool": "avg", "in_chans": "${data.channels}"}
    run = make_run(tmp_path / "wide", module, [*words, "data.std=[0.5,0.6,0.7,0.8]"], backbone, size="[48,96]")
    main([f"run={run.dir}"])
    exported = timm.create_model(f"local-dir:{run.dir / 'export/timm'}", pretrained=True).eval()
    image = torch.randn(2, 4, 48, 96)
    torch.testing.assert_close(exported(image), module.eval()(image))
    assert tuple(exported.pretrained_cfg["input_size"]) == (4, 48, 96)
    assert exported.pretrained_cfg["mean"] == [0.1, 0.2, 0.3, 0.4]
    # and it is a start, whose positional embedding is known to be 6 x 12
    wider = timm.create_model(**BACKBONE, img_size=(96, 48), in_chans=4, num_classes=0, global_pool="avg")
    line = load_into(wider, read_weights(run.dir / "export/timm"))
    assert "positional embedding of 73 tokens interpolated to 73 (6x12 to 12x6)" in line


def test_wide_images_are_refused_for_transformers(tmp_path):
    module = MAE(small(img_size=(48, 96)), OptimizerRecipe(torch.optim.AdamW, lr=1.0), decoder_dim=16, decoder_depth=1,
                 decoder_heads=2)  # fmt: skip
    words = ["experiment=mae_tiny", "model.decoder_dim=16", "model.decoder_depth=1", "model.decoder_heads=2"]
    run = make_run(tmp_path / "wide", module, words, {**BACKBONE, "num_classes": 0}, size="[48,96]")
    with pytest.raises(UserError, match=r"not exported: the image processors of transformers crop squares, not 48x96"):
        main([f"run={run.dir}", "format=hf"])
    infrared = replace(load_trained(run, None, None), mean=[0.5] * 4)
    with pytest.raises(UserError, match="read RGB, and this run's images have 4 channels: use format=timm"):
        check_processor(infrared)
    main([f"run={run.dir}", "format=timm"])
    module.backbone.eval()
    exported = timm.create_model(f"local-dir:{run.dir / 'export/timm'}", pretrained=True).eval()
    image = torch.randn(2, 3, 48, 96)
    torch.testing.assert_close(exported.forward_features(image), module.backbone.forward_features(image))
