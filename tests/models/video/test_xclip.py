"""X-CLIP against transformers' implementation, and its parts by hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import XCLIPConfig, XCLIPModel

from src.datamodules.batches.base import BatchError
from src.datamodules.datamodule import DataModule
from src.datamodules.scenes.films import FilmsSource
from src.datamodules.views.video import CenterVideoCrop, DenseClip
from src.errors import SettingError
from src.export.hf_two_towers import vision_weights
from src.models.backbones.cross_frame_encoder import CrossFrameEncoder
from src.models.backbones.weights import WeightsError, read_weights
from src.models.layers.video_prompts import VideoPrompts
from src.models.text.text_tower import CLIPTextTower
from src.models.video.xclip import XCLIP
from src.optim import OptimizerRecipe, adamw
from tests.toys import small_vit

FRAMES, CLASSES = 3, 4
# the end token has the largest id, as transformers expects
TEXT = torch.tensor([[1, 5, 19, 0, 0], [1, 6, 7, 19, 0], [1, 7, 5, 6, 19], [1, 8, 19, 0, 0]])
MASK = TEXT != 0


def vit() -> timm.models.VisionTransformer:
    return small_vit("vit_base_patch32_clip_quickgelu_224", embed_dim=24, depth=2)


def tower() -> CLIPTextTower:
    return CLIPTextTower(vocabulary=20, length=5, width=16, depth=2, heads=2, activation="quick_gelu")


class IdTokenizer:
    """Maps the row number of a text in TEXT to its token ids."""

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = torch.stack([TEXT[int(text)] for text in texts])
        return rows, rows != 0


def method(held_out: tuple[int, ...] = (), **options: Any) -> XCLIP:
    torch.manual_seed(0)
    recipe = OptimizerRecipe(partial(adamw, betas=(0.9, 0.98)), lr=1e-3, weight_decay=1e-3)
    plain = {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0}
    module = XCLIP(vit(), tower(), recipe, **{"frames": FRAMES, "embed_dim": 12, "heads": 2, **plain, **options})
    module.set_classes(IdTokenizer(), [str(row) for row in range(CLASSES)], held_out)  # type: ignore[arg-type]
    return module


def with_random_weights(module: XCLIP) -> XCLIP:
    """Adds noise to every parameter, so that an unused one would change the comparison."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def clips(count: int = 2, frames: int = FRAMES) -> Tensor:
    return torch.randn(count, frames, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def batch(count: int = 4) -> dict[str, Tensor]:
    return {"video": clips(count), "label": torch.arange(count) % CLASSES}


def theirs(ours: XCLIP) -> XCLIPModel:
    """Returns transformers' model with our weights."""
    config = XCLIPConfig(
        text_config={
            "vocab_size": 20,
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 5,
        },
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "num_frames": FRAMES,
            "mit_hidden_size": 12,
            "mit_intermediate_size": 48,
            "mit_num_hidden_layers": 1,
            "mit_num_attention_heads": 2,
        },
        projection_dim=12,
        prompt_layers=2,
        prompt_num_attention_heads=2,
    )
    weights: dict[str, Tensor] = {"logit_scale": ours.logit_scale.squeeze()}

    def copy(to: str, source: nn.Module) -> None:
        weights.update({f"{to}.{name}": value for name, value in source.state_dict().items()})

    def copy_in_parts(to: str, weight: Tensor, bias: Tensor, parts: tuple[str, ...] = ("q", "k", "v")) -> None:
        for part, w, b in zip(parts, weight.chunk(3), bias.chunk(3), strict=True):
            weights[f"{to}.{part}_proj.weight"], weights[f"{to}.{part}_proj.bias"] = w, b

    copy("text_model", ours.text_encoder.transformer)
    named = vision_weights(ours.image_encoder.backbone)
    weights.update({f"vision_model.{name.replace('pre_layrnorm', 'pre_layernorm')}": w for name, w in named.items()})
    for number, cross_frame in enumerate(ours.image_encoder.cross_frame_attention):
        to = f"vision_model.encoder.layers.{number}"
        copy(f"{to}.message_fc", cross_frame.project)
        copy(f"{to}.message_ln", cross_frame.norm)
        copy_in_parts(f"{to}.message_attn", cross_frame.attention.in_proj_weight, cross_frame.attention.in_proj_bias)
        copy(f"{to}.message_attn.out_proj", cross_frame.attention.out_proj)
    copy("visual_projection", ours.image_projection)
    copy("text_projection", ours.text_projection)
    weights["mit.position_embedding"] = ours.integration.positions
    for number, block in enumerate(ours.integration.blocks):
        to = f"mit.encoder.layers.{number}"
        copy_in_parts(f"{to}.self_attn", block.attn.qkv.weight, block.attn.qkv.bias)
        copy(f"{to}.self_attn.out_proj", block.attn.proj)
        copy(f"{to}.layer_norm1", block.norm1)
        copy(f"{to}.layer_norm2", block.norm2)
        copy(f"{to}.mlp.fc1", block.mlp.fc1)
        copy(f"{to}.mlp.fc2", block.mlp.fc2)
    prompts = ours.prompts
    copy("prompts_visual_layernorm", prompts.norm_patches)
    weights["prompts_visual_projection"] = prompts.project.weight.T
    copy("prompts_generator.layernorm", prompts.norm)
    weights["prompts_generator.alpha"] = prompts.alpha
    for number, layer in enumerate(prompts.layers):
        to = f"prompts_generator.decoder.{number}"
        copy(f"{to}.norm1", layer.norm1)
        copy(f"{to}.norm3", layer.norm2)
        copy(f"{to}.cross_attn.q_proj", layer.attention.query)
        for part, w in zip("kv", layer.attention.key_value.weight.chunk(2), strict=True):
            weights[f"{to}.cross_attn.{part}_proj.weight"] = w
        copy(f"{to}.cross_attn.proj", layer.attention.out)
        copy(f"{to}.mlp.0", layer.mlp.fc1)
        copy(f"{to}.mlp.3", layer.mlp.fc2)
    model = XCLIPModel(config)
    model.load_state_dict(weights)  # strict: all of their tensors and no others
    return model.eval()


@torch.no_grad()
def test_every_part_equals_that_of_transformers() -> None:
    """transformers ported the authors' code independently; same weights, clips and texts here."""
    ours = with_random_weights(method()).eval()
    model, video = theirs(ours), clips()
    output = model(input_ids=TEXT, pixel_values=video)
    tokens = ours.image_encoder.tokens(video)
    same = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    same(tokens.flatten(0, 1), output.vision_model_output.last_hidden_state)  # cross-frame attention
    same(ours.image_encoder.frame_features(tokens).flatten(0, 1), output.vision_model_output.pooler_output)
    names, encoded = ours.encode_text(TEXT, MASK), ours.encode_image(video)
    same(names, model.get_text_features(input_ids=TEXT).pooler_output)
    same(encoded.video, output.mit_output.pooler_output)
    prompted = ours.prompts(names, encoded.context)
    same(nn.functional.normalize(prompted, dim=-1), output.text_embeds)
    logits = ours.logit_scale.exp() * ours.similarity(encoded, names)
    same(logits, output.logits_per_video)
    assert (logits.amax(dim=1) - logits.amin(dim=1)).min() > 0.1  # logits differ between classes
    same(ours.similarity(names, encoded), logits.T / ours.logit_scale.exp())  # text to video


def test_the_training_step_is_cross_entropy_over_the_class_names() -> None:
    ours = method(smoothing=0.1)
    given = batch()
    output = ours.training_step(given, 0)
    logits = ours.logit_scale.exp() * ours.similarity(ours.encode_image(given["video"]), ours.encode_text(TEXT, MASK))
    log_p = logits.log_softmax(dim=1)
    by_hand = -sum(0.9 * log_p[row, row] + 0.1 * log_p[row].mean() for row in range(4)) / 4
    torch.testing.assert_close(output["loss"], by_hand)
    embedding = ours.encoders()["encoder"](given["video"]).embedding  # the feature of probes
    torch.testing.assert_close(output["embedding"], embedding)
    with pytest.raises(BatchError, match="X-CLIP learns from labels; 1 of 4 samples of a batch have none"):
        ours.training_step({**given, "label": torch.tensor([0, 1, -1, 2])}, 0)


def test_mixing_depends_on_seed_and_step_and_leaves_the_batch_unchanged() -> None:
    ours, given = method(mixup=0.8, cutmix=1.0, smoothing=0.1), batch()
    before = given["video"].clone()
    first, again = (ours.training_step(given, 0)["loss"] for _ in range(2))
    assert torch.equal(given["video"], before)
    torch.testing.assert_close(first, again)  # a function of seed and step
    assert not torch.allclose(first, ours.training_step(given, 1)["loss"])


@pytest.mark.parametrize("cross_frame_attention", [True, False])
def test_frames_exchange_information_only_by_cross_frame_attention(cross_frame_attention: bool) -> None:
    torch.manual_seed(0)
    encoder = CrossFrameEncoder(vit(), cross_frame_attention=cross_frame_attention)
    video = clips().requires_grad_()
    tokens = encoder.tokens(video)
    tokens[0, 0].square().sum().backward()
    assert video.grad[0, 0].abs().sum() > 0
    assert (video.grad[0, 1:].abs().sum() > 0) == cross_frame_attention
    assert video.grad[1].abs().sum() == 0  # clips do not exchange information
    if not cross_frame_attention:
        frame = encoder.backbone.forward_features(video[:, 0])
        torch.testing.assert_close(encoder.backbone.norm(tokens[:, 0]), frame)


def test_only_the_integration_depends_on_the_order_of_frames() -> None:
    video, reversed_video = clips(), clips().flip(1)
    for depth in (0, 1):
        ours = with_random_weights(method(integration_depth=depth)).eval()
        with torch.no_grad():
            same = all(
                torch.allclose(*parts, atol=1e-5)
                for parts in zip(ours.encode_image(video), ours.encode_image(reversed_video), strict=True)
            )
        assert same == (depth == 0)


def test_names_are_adapted_to_the_video_by_alpha() -> None:
    torch.manual_seed(0)
    prompts = VideoPrompts(24, 12, depth=2, heads=2, alpha=0.1, activation=nn.GELU)
    torch.testing.assert_close(prompts.alpha, torch.full((12,), 0.1))
    names, context = torch.randn(CLASSES, 12), prompts.context(torch.randn(2, FRAMES, 4, 24))
    added = prompts(names, context) - names
    assert added.shape == (2, CLASSES, 12)
    assert not torch.allclose(added[0], added[1])
    with torch.no_grad():
        prompts.alpha.mul_(2)
    torch.testing.assert_close(prompts(names, context) - names, 2 * added)
    with torch.no_grad():
        prompts.alpha.zero_()
    torch.testing.assert_close(prompts(names, context), names.expand(2, -1, -1))


def test_prompts_computed_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = method().eval()
    names, encoded = ours.encode_text(TEXT, MASK), ours.encode_image(clips(5))
    whole = ours.similarity(encoded, names)
    monkeypatch.setattr("src.models.video.xclip._PROMPTS_AT_ONCE", 2 * CLASSES)
    torch.testing.assert_close(ours.similarity(encoded, names), whole)


def test_frozen_parameters_have_no_gradient_and_names_are_encoded_once() -> None:
    ours, calls = method().train(), []
    ours.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        ours.training_step(batch(), 0)["loss"].backward()
    assert len(calls) == 1
    assert not ours.text_encoder.training
    for name, parameter in ours.named_parameters():
        frozen = name.startswith(("text_encoder.", "text_projection.", "logit_scale"))
        assert (parameter.grad is None) == frozen, name
    free = method(freeze_text=False)
    free.training_step(batch(), 0)["loss"].backward()
    assert all(parameter.grad is not None for parameter in free.parameters())


def test_new_parameters_have_a_higher_rate_and_positions_no_decay() -> None:
    groups = method().configure_optimizers().param_groups
    rate = {name: group["lr"] for group in groups for name in group["names"]}
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert rate["image_encoder.backbone.blocks.0.attn.qkv.weight"] == 1e-3
    for name in ("image_encoder.cross_frame_attention.1.project.weight", "integration.positions", "prompts.alpha"):
        assert rate[name] == pytest.approx(1e-2)
    assert decay["integration.positions"] == decay["prompts.alpha"] == 0
    assert (
        decay["image_encoder.cross_frame_attention.1.attention.in_proj_weight"]
        == decay["prompts.project.weight"]
        == 1e-3
    )
    assert not any(name.startswith("text") for name in rate)
    bare = method(cross_frame_attention=False, integration_depth=0, prompt_depth=0).configure_optimizers().param_groups
    assert {group["lr"] for group in bare} == {1e-3}  # without new parts


def test_held_out_classes_are_not_among_the_logits() -> None:
    ours = method(held_out=(1,))
    assert torch.equal(ours.class_text, TEXT[[0, 2, 3]])
    assert ours.label_to_class.tolist() == [0, -1, 1, 2]
    loss = ours.training_step({"video": clips(2), "label": torch.tensor([2, 3])}, 0)["loss"]
    logits = ours.logit_scale.exp() * ours.similarity(ours.encode_image(clips(2)), ours.class_features())
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, torch.tensor([1, 2])))


def test_towers_are_loaded_from_a_run(tmp_path: Path) -> None:
    from tests.toys import clip

    run, file = clip(), tmp_path / "last.ckpt"
    torch.save({"encoders": {"encoder": "image_encoder.backbone."}, "state_dict": run.state_dict()}, file)
    vit = small_vit()
    text = CLIPTextTower(vocabulary=20, length=6, width=16, depth=2, heads=2)
    recipe = OptimizerRecipe(partial(adamw), lr=1e-3)
    loaded = XCLIP(vit, text, recipe, frames=FRAMES, embed_dim=8, heads=1, temperature=0.5)
    loaded.load_start(read_weights(file))
    state = loaded.state_dict()
    for name, value in run.state_dict().items():
        assert torch.equal(state[name], value), name
    with pytest.raises(WeightsError, match="has another architecture"):
        XCLIP(vit, text, recipe, frames=FRAMES, embed_dim=4, heads=1).load_start(read_weights(file))


def test_bad_arguments_raise() -> None:
    with pytest.raises(SettingError, match=r"clip.frames=2 and model.frames=3 must be equal"):
        method().encode_image(clips(frames=2))
    with pytest.raises(SettingError, match="template must have one"):
        method(template="an action")
    with pytest.raises(SettingError, match="smoothing must be at least 0 and below 1"):
        method(smoothing=1.0)
    recipe = OptimizerRecipe(partial(adamw), lr=1e-3)
    with pytest.raises(SettingError, match="X-CLIP needs a ViT with a class token"):
        XCLIP(timm.create_model("resnet10t", num_classes=0), tower(), recipe, embed_dim=12)


def test_it_can_memorize_a_few_clips() -> None:
    ours, given = method(), batch()
    optimizer = ours.configure_optimizers()
    losses = []
    for _ in range(48):
        loss = ours.training_step(given, 0)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 1.0
    assert min(losses[20:]) < 0.05


def test_data_without_class_names_raises() -> None:
    clip = DenseClip(frames=FRAMES, stride=1)
    films = DataModule(
        source=partial(FilmsSource, count=8, resolution=16),
        train_view=CenterVideoCrop(clip, size=16),
        eval_view=CenterVideoCrop(clip, size=16),
        batch_size=4,
        num_workers=0,
    )
    ours = method()
    ours._trainer = SimpleNamespace(datamodule=films, callbacks=[])  # type: ignore[assignment]
    with pytest.raises(SettingError, match=r"data\.extras: without texts no tokenizer can be learned"):
        ours.on_fit_start()


def test_the_loss_of_a_batch_is_the_mean_of_its_halves() -> None:
    """Class names are the same in all processes: nothing is gathered, and DDP's mean is that of the batch."""
    given, results = batch(), []
    for part in (slice(0, 2), slice(2, 4), slice(0, 4)):
        ours = method().double()
        loss = ours.training_step({"video": given["video"][part].double(), "label": given["label"][part]}, 0)["loss"]
        loss.backward()
        results.append((loss.detach(), ours.image_encoder.cross_frame_attention[0].project.weight.grad))
    for first, second, whole in zip(*results, strict=True):
        torch.testing.assert_close((first + second) / 2, whole)
