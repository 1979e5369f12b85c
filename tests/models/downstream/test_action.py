"""Tests of action recognition with video and image backbones."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.data.mixup import Mixup

from src.datamodules.batches.video import VideoBatch
from src.models.backbones.image_encoder import ImageEncoder
from src.models.backbones.video_conv import r2plus1d
from src.models.backbones.video_encoder import FrameEncoder, VideoEncoder, clip_encoder
from src.models.backbones.video_vit import sinusoids
from src.models.backbones.weights import WeightsError, load_backbone
from src.models.downstream.action import FineTuneAction, LinearAction
from src.optim import OptimizerRecipe, adamw
from src.randomness import seeded
from tests.toys import small_video_vit, small_vit

RECIPE = OptimizerRecipe(adamw, lr=1.0, weight_decay=0.05)


def video_vit(**options: Any) -> timm.models.VisionTransformer:
    return small_video_vit(**{"embed_dim": 24, "depth": 2, "fc_norm": True, **options})


def image_vit() -> timm.models.VisionTransformer:
    return small_vit(embed_dim=24, depth=2, global_pool="avg")


def batch(count: int = 4, classes: int = 3) -> VideoBatch:
    return {
        "video": torch.randn(count, 4, 3, 16, 16),
        "label": torch.arange(count) % classes,
        "index": torch.arange(count),
        "replaced": torch.zeros(count, dtype=torch.bool),
    }


def built(backbone: torch.nn.Module, **options: object) -> FineTuneAction:
    torch.manual_seed(0)
    module = FineTuneAction(backbone, RECIPE, head_std=0.5, **options)  # type: ignore[arg-type]
    module.build(3)
    return module.eval()


def test_frames_of_a_clip_are_mixed_equally() -> None:
    """Equal to mixing each frame as an image with the same random numbers."""
    module, data = built(video_vit()), batch()
    for step in range(4):  # some steps use mixup, some cutmix
        mixed, shares = module.mix(data["video"], data["label"], step)
        for frame in range(4):
            mixing = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=3)
            with seeded(0, 0, step, 0):
                expected, target = mixing(data["video"][:, frame].clone(), data["label"])
            assert torch.equal(mixed[:, frame], expected)
            assert torch.equal(shares, target)


def test_the_loss_is_the_cross_entropy_with_the_mixed_labels() -> None:
    module, data = built(video_vit()), batch()
    mixed, target = module.mix(data["video"], data["label"], 1)
    by_hand = -(target.double() * module(mixed).double().log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(module.training_step(data, 1)["loss"].double(), by_hand, rtol=1e-5, atol=1e-6)


def test_layer_decay_and_a_fixed_positional_embedding() -> None:
    module = built(video_vit(), layer_decay=0.75)
    groups = module.configure_optimizers().param_groups
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert rates["backbone.patch_embed.projection.weight"] == pytest.approx(0.75**3)
    assert rates["backbone.blocks.0.attn.qkv.weight"] == pytest.approx(0.75**2)
    assert rates["backbone.blocks.1.mlp.fc2.weight"] == pytest.approx(0.75)
    assert rates["backbone.fc_norm.weight"] == rates["backbone.head.weight"] == 1.0
    assert "backbone.pos_embed" not in rates
    assert torch.equal(module.backbone.pos_embed, sinusoids(24, 8))


def test_the_embedding_is_the_norm_of_the_mean() -> None:
    module, video = built(video_vit()), batch()["video"]
    tokens = module.backbone.forward_features(video)
    expected = torch.nn.functional.layer_norm(tokens.mean(dim=1), (24,), eps=module.backbone.fc_norm.eps)
    torch.testing.assert_close(module.embed(video), expected)
    torch.testing.assert_close(module.encoders()["encoder"](video).embedding, expected)


def test_an_image_backbone_averages_frames_and_ignores_their_order() -> None:
    module, video = built(image_vit()), batch()["video"]
    encoder = module.encoders()["encoder"]
    assert isinstance(encoder, FrameEncoder)
    image_encoder = ImageEncoder(module.backbone, module.pool)
    embeddings = torch.stack([image_encoder(video[:, frame]).embedding for frame in range(4)], dim=1)
    torch.testing.assert_close(module.embed(video), embeddings.mean(dim=1))
    features = encoder(video)
    torch.testing.assert_close(features.embedding, embeddings.mean(dim=1))
    assert (features.grid, features.patches.shape) == ((4, 2, 2), (4, 16, 24))
    torch.testing.assert_close(features.patches[:, 4:8], image_encoder(video[:, 1]).patches)
    torch.testing.assert_close(module(video.flip(1)), module(video))
    clips = built(video_vit())
    assert not torch.allclose(clips(video.flip(1)), clips(video))


def test_probabilities_of_several_clips_of_a_video_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    module = built(video_vit())
    # a confident clip of class 0 and two less confident ones of class 1: the mean of the logits would be class 0
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    monkeypatch.setattr(module, "forward", lambda video: logits[: len(video)])
    logged: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
    data = batch() | {"index": torch.tensor([5, 5, 5, 8]), "label": torch.tensor([1, 1, 1, 2])}
    module.validation_step(data, 0)  # type: ignore[arg-type]
    assert module.metrics["top1"].compute() == 1.0
    share = logits.softmax(dim=1)
    expected = -(share[:3, 1].mean().log() + share[3, 2].log()) / 2
    torch.testing.assert_close(logged["eval/loss"].compute(), expected)  # type: ignore[operator]


def test_linear_probing_trains_the_head_alone() -> None:
    for backbone in (video_vit(), image_vit(), r2plus1d(layers=(1, 1, 1, 1), width=4)):
        module = LinearAction(backbone, RECIPE, pool=clip_encoder(backbone).pool)
        module.build(3)
        module.train()
        module.training_step(batch(), 0)["loss"].backward()
        trained = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
        assert trained == {"head.weight", "head.bias"}
        assert not backbone.training


def test_positional_embeddings_of_larger_clips_are_interpolated_at_each_time(tmp_path) -> None:
    torch.save(video_vit().state_dict(), tmp_path / "small.pth")
    larger = load_backbone(video_vit(img_size=32), tmp_path / "small.pth")
    table, source = larger.pos_embed.unflatten(1, (2, 4, 4)), sinusoids(24, 8).unflatten(1, (2, 2, 2))
    for time in range(2):
        expected = torch.nn.functional.interpolate(
            source[:, time].permute(0, 3, 1, 2), size=(4, 4), mode="bicubic", antialias=False, align_corners=False
        )
        torch.testing.assert_close(table[:, time].permute(0, 3, 1, 2), expected)
    with pytest.raises(WeightsError, match="8 tokens, not a square grid for each of 4 times"):
        load_backbone(video_vit(frames=8), tmp_path / "small.pth")


def test_it_learns_classes_that_single_frames_do_not_show() -> None:
    """A bright column moves right or left from a random start, so that every single frame occurs in both classes."""
    generator = torch.Generator().manual_seed(0)
    begin = torch.randint(16, (32,), generator=generator)
    label = torch.arange(32) % 2
    places = (begin[:, None] + torch.arange(4) * (4 * label[:, None] - 2)) % 16
    video = torch.zeros(32, 4, 3, 16, 16).scatter_(
        4, places.view(32, 4, 1, 1, 1).expand(-1, -1, 3, 16, -1), torch.ones(1).expand(32, 4, 3, 16, 1).clone()
    )
    data = batch(32, 2) | {"video": video, "label": label}
    module = built(video_vit(), mixup=0.0, cutmix=0.0, layer_decay=1.0).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for step in range(80):
        optimizer.zero_grad()
        module.training_step(data, step)["loss"].backward()  # type: ignore[arg-type]
        optimizer.step()
    assert (module(video).argmax(dim=1) == label).float().mean() > 0.9


def test_clip_encoder_depends_on_the_backbone() -> None:
    assert isinstance(clip_encoder(video_vit()), VideoEncoder)
    assert isinstance(clip_encoder(r2plus1d(layers=(1, 1, 1, 1), width=4)), VideoEncoder)
    assert isinstance(clip_encoder(image_vit()), FrameEncoder)
