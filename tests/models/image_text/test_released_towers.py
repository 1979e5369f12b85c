"""Released CLIP and SigLIP towers load into ours, compared with the forward pass of transformers' own classes."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from src.models.backbones.weights import WeightsError, load_backbone, read_weights
from src.models.image_text.clip import CLIP
from src.models.image_text.siglip import SigLIP
from src.models.text.text_tower import CLIPTextTower, SigLIPTextTower
from src.optim import OptimizerRecipe
from tests.toys import MASK, TEXT, small_vit

RECIPE = OptimizerRecipe(torch.optim.AdamW, lr=1.0)
SIZES = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def randomized(model: Any) -> Any:
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.logit_scale.data.fill_(1.5)
    return model.eval()


def released_clip(activation: str = "quick_gelu") -> CLIPModel:
    """Random weights; a text ends at its greatest id, as in OpenAI's vocabulary."""
    text = {**SIZES, "vocab_size": 20, "max_position_embeddings": 6, "hidden_act": activation, "eos_token_id": 2}
    vision = {**SIZES, "image_size": 16, "patch_size": 8, "hidden_act": activation}
    return randomized(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)))


def in_openai_layout(model: CLIPModel) -> dict[str, Tensor]:
    """The weights as openai/CLIP, clip/model.py, names and shapes them, written down module by module."""
    w = model.state_dict()

    def block(tower: str, prefix: str, number: int) -> dict[str, Tensor]:
        theirs, ours = f"{tower}.encoder.layers.{number}", f"{prefix}transformer.resblocks.{number}"
        renamed = {
            f"{ours}.attn.in_proj_{leaf}": torch.cat([w[f"{theirs}.self_attn.{p}_proj.{leaf}"] for p in "qkv"])
            for leaf in ("weight", "bias")
        }
        pairs = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
        pairs |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
        return renamed | {
            f"{ours}.{a}.{leaf}": w[f"{theirs}.{b}.{leaf}"] for a, b in pairs.items() for leaf in ("weight", "bias")
        }

    state = {
        "positional_embedding": w["text_model.embeddings.position_embedding.weight"],
        "text_projection": w["text_projection.weight"].T.contiguous(),
        "logit_scale": w["logit_scale"],
        "token_embedding.weight": w["text_model.embeddings.token_embedding.weight"],
        "ln_final.weight": w["text_model.final_layer_norm.weight"],
        "ln_final.bias": w["text_model.final_layer_norm.bias"],
        "visual.class_embedding": w["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": w["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": w["visual_projection.weight"].T.contiguous(),
        "visual.conv1.weight": w["vision_model.embeddings.patch_embedding.weight"],
    }
    for new, old in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        state |= {f"visual.{new}.{leaf}": w[f"vision_model.{old}.{leaf}"] for leaf in ("weight", "bias")}
    for number in range(2):
        state |= block("vision_model", "visual.", number) | block("text_model", "", number)
    return state


def clip(activation: str = "quick_gelu") -> CLIP:
    torch.manual_seed(0)
    vit = small_vit("vit_base_patch16_clip_224", depth=2, act_layer=activation)
    text = CLIPTextTower(vocabulary=20, length=6, width=16, depth=2, heads=2, activation=activation)
    return CLIP(vit, text, RECIPE, embed_dim=8).eval()


def texts_with_the_greatest_id_last() -> Tensor:
    return TEXT.masked_fill(TEXT == 1, 19)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["openai", "open_clip", "transformers"])
def test_clips_towers_compute_the_same_features(layout, tmp_path):
    released = released_clip()
    if layout == "transformers":
        released.save_pretrained(tmp_path)
        path: Path = tmp_path
    else:
        state = in_openai_layout(released)
        if layout == "openai":
            numbers = {"input_resolution": 16, "context_length": 6, "vocab_size": 20}
            state = {name: value.half() for name, value in state.items()}
            state |= {name: torch.tensor(value) for name, value in numbers.items()}
            released.load_state_dict({name: value.half().float() for name, value in released.state_dict().items()})
            path = tmp_path / "ViT-B-32.pth"
            torch.save(state, path)
        else:
            path = tmp_path / "open_clip_model.safetensors"
            save_file({f"module.{name}": value.contiguous() for name, value in state.items()}, path)
    module = clip()
    line = module.load_start(read_weights(path))
    assert "tensors of the text tower and the projections" in line
    assert "not from the file" not in line
    ids = texts_with_the_greatest_id_last()
    output = released(input_ids=ids, pixel_values=IMAGES)
    torch.testing.assert_close(module.encode_image(IMAGES), output.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(module.encode_text(ids, MASK), output.text_embeds, atol=1e-6, rtol=0)
    assert module.logit_scale.item() == 1.5
    # any other method takes the image tower alone
    vit = load_backbone(clip().image_encoder.backbone, path)
    expected = released.vision_model(pixel_values=IMAGES).pooler_output
    torch.testing.assert_close(vit.forward_features(IMAGES)[:, 0], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_siglips_towers_compute_the_same_features(tmp_path):
    text = {**SIZES, "vocab_size": 20, "max_position_embeddings": 6, "projection_size": 16}
    config = SiglipConfig(text_config=text, vision_config={**SIZES, "image_size": 16, "patch_size": 8})
    released = randomized(SiglipModel(config))
    released.logit_bias.data.fill_(-3.0)
    released.save_pretrained(tmp_path)
    vit = small_vit("vit_base_patch16_siglip_224", depth=2, act_layer="gelu_tanh")
    tower = SigLIPTextTower(vocabulary=20, length=6, width=16, depth=2, heads=2, embed_dim=16)
    module = SigLIP(vit, tower, RECIPE).eval()
    assert "not from the file" not in module.load_start(read_weights(tmp_path))
    output = released(input_ids=TEXT, pixel_values=IMAGES)
    torch.testing.assert_close(module.encode_image(IMAGES), output.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(module.encode_text(TEXT, MASK), output.text_embeds, atol=1e-6, rtol=0)
    assert (module.logit_scale.item(), module.logit_bias.item()) == (1.5, -3.0)


def test_openais_archives_are_refused_with_the_way_out(tmp_path):
    """They are TorchScript, as which PyTorch would execute their code. Its files are known by a constants.pkl."""
    with zipfile.ZipFile(tmp_path / "ViT-B-32.pt", "w") as archive:
        archive.writestr("ViT-B-32/constants.pkl", b"")
        archive.writestr("ViT-B-32/code/__torch__.py", "raise RuntimeError")
    with pytest.raises(WeightsError, match=r"it is a TorchScript archive.*torch.jit.load\(.*\).state_dict\(\)"):
        read_weights(tmp_path / "ViT-B-32.pt")


@pytest.mark.parametrize("layout", ["openai", "transformers"])
def test_another_activation_is_refused(layout, tmp_path):
    path: Path = tmp_path
    if layout == "openai":
        path = tmp_path / "clip.pth"
        numbers = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
        torch.save({"state_dict": {**in_openai_layout(released_clip()), **numbers}}, path)
    else:
        released_clip().save_pretrained(path)
    module = clip("gelu")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(
        WeightsError, match="trained with quick_gelu, and this tower has gelu: set activation=quick_gelu"
    ):
        module.load_start(read_weights(path))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with pytest.raises(WeightsError, match="this tower has gelu"):
        load_backbone(module.image_encoder.backbone, path)
    with pytest.raises(WeightsError, match=r"another architecture: it has image_projection.weight \[8, 16\]"):
        CLIP(clip().image_encoder.backbone, clip().text_encoder, RECIPE, embed_dim=12).load_start(read_weights(path))
