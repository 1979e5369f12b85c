"""Text towers: pretrained weights, and frozen towers."""

import json
from functools import partial

import pytest
import timm
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from src import configuration
from src.errors import SettingError, UserError
from src.models.backbones.image_encoder import cls_token_or_mean, mean_patch
from src.models.backbones.weights import load_backbone
from src.models.image_text.clip import CLIP
from src.models.text.text_tower import CLIPTextTower, TransformersTextTower, last_token, mean_token
from src.models.text.text_weights import load_text_weights
from src.optim import OptimizerRecipe, adamw
from src.train import compose
from src.trained import without_source
from tests.toys import MASK, TEXT, clip, image_text_batch, small_vit, text_tower

BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def bert(length: int = 6, **options) -> TransformersTextTower:
    torch.manual_seed(0)
    return TransformersTextTower({"model_type": "bert", **BERT, **options}, vocabulary=20, length=length)


def folder_of(model, path):
    torch.manual_seed(7)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_a_folder_written_by_transformers_is_loaded(kind, tmp_path):
    """Tensor names may have a prefix; tensors that the tower does not have are ignored."""
    saved = folder_of(kind(BertConfig(vocab_size=20, max_position_embeddings=512, **BERT)), tmp_path)
    loaded = load_text_weights(bert(), tmp_path).eval()
    theirs = getattr(saved, "bert", saved)(input_ids=TEXT, attention_mask=MASK.long()).last_hidden_state
    found = loaded(TEXT, MASK)
    torch.testing.assert_close(found.tokens, theirs)
    torch.testing.assert_close(found.embedding, theirs[:, 0])
    assert not any("pooler" in name for name, _ in loaded.named_parameters())


@torch.no_grad()
def test_t5s_encoder_and_clips_text_tower_are_loaded(tmp_path):
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    saved = folder_of(T5EncoderModel(T5Config(vocab_size=20, **t5)), tmp_path / "t5")
    text = TransformersTextTower({"model_type": "t5", **t5}, vocabulary=20, length=6, pool=mean_token)
    found = load_text_weights(text, tmp_path / "t5").eval()(TEXT, MASK)
    theirs = saved(input_ids=TEXT, attention_mask=MASK.long()).last_hidden_state
    by_hand = torch.stack([row[mask].mean(dim=0) for row, mask in zip(theirs, MASK, strict=True)])
    torch.testing.assert_close(found.embedding, by_hand)
    torch.testing.assert_close(last_token(theirs, MASK), theirs[range(4), [3, 2, 5, 3]])

    small = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=20, max_position_embeddings=6, hidden_act="quick_gelu", **small)
    saved = folder_of(CLIPTextModel(config), tmp_path / "clip")
    found = load_text_weights(text_tower(activation="quick_gelu"), tmp_path / "clip").eval()(TEXT, MASK)
    torch.testing.assert_close(found.tokens, saved(input_ids=TEXT).last_hidden_state)
    with pytest.raises(ValueError, match=r"hidden_act=quick_gelu instead of gelu"):
        load_text_weights(text_tower(), tmp_path / "clip")


def test_weights_that_do_not_fit_raise_with_the_reason(tmp_path):
    saved = BertModel(BertConfig(vocab_size=20, **BERT))
    saved.save_pretrained(tmp_path / "bert")
    for options, message in (
        ({"num_attention_heads": 4}, "num_attention_heads=2 instead of 4"),  # the shapes are equal
        ({"num_hidden_layers": 3}, "num_hidden_layers=2 instead of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            load_text_weights(bert(**options), tmp_path / "bert")
    with pytest.raises(ValueError, match=r"cannot be read as safetensors of this tower"):
        load_text_weights(bert(max_position_embeddings=40), tmp_path / "bert")
    with pytest.raises(ValueError, match=r"text_checkpoint=.*nowhere is no model of transformers"):
        load_text_weights(bert(), tmp_path / "nowhere")

    pickled = tmp_path / "pickled"
    saved.config.save_pretrained(pickled)
    torch.save(saved.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot be read as safetensors .*: .*no file named model.safetensors"):
        load_text_weights(bert(), pickled)

    # a config with three layers and weights of two
    broken = json.loads((tmp_path / "bert" / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"lacks 16 of the text tower's \d+ tensors: encoder.layer.2"):
        load_text_weights(bert(num_hidden_layers=3), tmp_path / "bert")

    with pytest.raises(ValueError, match=r"no model_type 'bret'; did you mean bert"):
        TransformersTextTower({"model_type": "bret"}, vocabulary=20, length=6)
    with pytest.raises(ValueError, match=r"data.text_length=9: this text tower has 8 positions for tokens"):
        bert(length=9, max_position_embeddings=8)


def lit(backbone: torch.nn.Module, text=None, **options) -> CLIP:
    recipe = OptimizerRecipe(partial(adamw), lr=0.1, weight_decay=0.2)
    frozen = {"embed_dim": None, "project_image": False, "freeze_image": True}
    return CLIP(backbone, text or text_tower(), recipe, **{**frozen, **options})


def step(method: CLIP, optimizer: torch.optim.Optimizer) -> None:
    method.train()
    optimizer.zero_grad()
    method.training_step(image_text_batch(), 0)["loss"].backward()
    optimizer.step()


@pytest.mark.parametrize("frozen", ["image", "text"])
def test_a_frozen_tower_does_not_change_by_a_bit(frozen):
    """Including batch norm's statistics; the other tower is trained."""
    torch.manual_seed(0)
    names = {"image": "image_encoder", "text": "text_encoder"}
    other = names["text" if frozen == "image" else "image"]
    frozen_name = names[frozen]
    backbone = timm.create_model("resnet18", num_classes=0)
    method = lit(backbone, bert(), freeze_image=frozen == "image", freeze_text=frozen == "text")
    optimizer = method.configure_optimizers()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    for _ in range(2):
        step(method, optimizer)
    after = method.state_dict()
    assert any("running_mean" in name for name in after)
    for name, value in after.items():
        if name.startswith(frozen_name):
            assert torch.equal(value, before[name]), name
    assert not any(module.training for module in method.get_submodule(frozen_name).modules())
    assert all(module.training for module in method.get_submodule(other).modules())
    for name, parameter in method.named_parameters():
        learns = not name.startswith(frozen_name)
        assert (parameter.grad is not None) == learns, name
        assert (parameter in optimizer.state) == learns, name
        if learns and name != "text_encoder.transformer.embeddings.token_type_embeddings.weight":
            assert not torch.equal(parameter, before[name]), name


def test_a_frozen_tower_saves_no_activations():
    def saved_numbers(**options) -> int:
        sizes: list[int] = []
        method = clip(**options)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            method.image_features(image_text_batch()["image"]).sum()
        return sum(sizes)

    assert saved_numbers(freeze_image=True) == 0
    assert saved_numbers() > 1000


def test_without_image_projection_texts_are_projected_to_the_image_width():
    backbone = timm.create_model("resnet18", num_classes=0)
    method = lit(backbone).eval()
    image = method.encode_image(image_text_batch()["image"])
    expected = backbone(image_text_batch()["image"])
    torch.testing.assert_close(image, expected / expected.norm(dim=1, keepdim=True))
    assert method.text_projection.weight.shape == (512, 16)
    with pytest.raises(ValueError, match=r"model.embed_dim=64: with model.project_image=false it must be null or 512"):
        lit(backbone, embed_dim=64)


def test_the_frozen_image_tower_is_the_one_of_the_file(tmp_path):
    torch.manual_seed(3)
    saved = small_vit()
    torch.save(saved.state_dict(), tmp_path / "vit.pth")
    method = lit(load_backbone(small_vit(), tmp_path / "vit.pth"))
    for name, value in method.image_encoder.backbone.state_dict().items():
        assert torch.equal(value, saved.state_dict()[name])
    other = small_vit(depth=2)
    with pytest.raises(ValueError, match=r"lacks 12 of the backbone's"):
        load_backbone(other, tmp_path / "vit.pth")


@pytest.mark.parametrize("scale", ["paper", "smoke", "tiny"])
def test_lit_composes(scale, tmp_path):
    overrides = ["experiment=lit_vitb16", f"scale={scale}", "run.dir=/tmp/run"]
    config = compose(overrides)
    assert (config.model.freeze_image, config.model.project_image, config.model.temperature) == (True, False, 0.1)
    if scale == "tiny":
        method = configuration.instantiate(config.model)
        assert isinstance(method.text_encoder, TransformersTextTower)
        assert method.text_projection.weight.shape == (64, 128)
        assert method.image_encoder.pool is cls_token_or_mean is not mean_patch
        # a run can be evaluated without the weights that it started from
        gone = compose([*overrides, "checkpoint=/gone.ckpt", "text_checkpoint=/gone"])
        configuration.instantiate(without_source(gone).model)
        with pytest.raises(UserError, match="text_checkpoint=/gone is no model of transformers"):
            configuration.instantiate(gone.model)
    assert isinstance(text_tower(), CLIPTextTower)


@pytest.mark.parametrize("name", ["vocabulary", "length", "width", "depth", "heads"])
def test_sizes_of_nothing_are_refused_by_their_keys(name):
    with pytest.raises(SettingError, match=rf"model\.text\.{name} must be at least 1, got 0"):
        text_tower(**{name: 0})
