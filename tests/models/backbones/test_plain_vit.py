"""Methods that take a ViT apart compute what timm computes, or refuse a ViT that has more."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import nn

from src.errors import SettingError
from src.models.backbones.plain_vit import check_plain_vit
from src.models.backbones.video_vit import TubeletEmbed
from src.models.joint_embedding.moco_v3 import MoCoV3
from src.models.masked.mae import MAE
from src.models.masked.masking import Masking, random_masking
from src.models.video.videomae import VideoMAE
from src.optim import OptimizerRecipe, adamw
from tests.toys import small_video_vit, small_vit

RECIPE = OptimizerRecipe(partial(adamw), lr=1e-3)


def mae(vit: Any) -> MAE:
    torch.manual_seed(0)
    return MAE(vit, RECIPE, decoder_dim=8, decoder_depth=1, decoder_heads=2).double().eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pre_norm": True},  # CLIP
        {"reg_tokens": 2},  # DINOv2
        {"reg_tokens": 2, "class_token": False, "global_pool": "avg"},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},  # SigLIP
        {"no_embed_class": True, "reg_tokens": 1},  # DeiT III
        {"dynamic_img_size": True},
        {"img_size": (16, 40)},
        {"in_chans": 4},
    ],
    ids=str,
)
def test_all_patches_through_mae_are_the_features_of_the_vit(options: dict[str, Any]) -> None:
    vit = small_vit(depth=2, **options)
    method = mae(vit)
    for parameter in vit.parameters():  # norms and registers too
        nn.init.normal_(parameter, std=0.3)
    height, width = options.get("img_size", (16, 16))
    image = torch.randn(2, options.get("in_chans", 3), height, width, dtype=torch.float64)
    count = (height // 8) * (width // 8)
    order = torch.arange(count).expand(2, -1)
    everything = Masking(order, order, torch.zeros(2, count))
    torch.testing.assert_close(method.encode(image, everything), vit.forward_features(image), rtol=1e-10, atol=1e-10)
    method.train()
    output = method.training_step({"image": image}, 0)  # type: ignore[typeddict-item]
    output["loss"].backward()
    assert output["loss"].isfinite()
    used = [name for name, p in vit.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert {name for name in ("cls_token", "reg_token", "norm_pre.weight", "blocks.0.attn.qkv.weight") if name in
            dict(vit.named_parameters())} <= set(used)  # fmt: skip


def test_the_decoder_puts_predictions_in_place_whatever_comes_before_the_patches() -> None:
    """With one block that is the identity, the prediction at a place is a function of its token alone."""
    method = mae(small_vit(reg_tokens=3, img_size=(16, 32)))
    method.decoder.blocks = nn.Sequential()
    masking = random_masking(2, 8, 0.5, torch.device("cpu"))
    visible = torch.randn(2, 4 + 4, 16, dtype=torch.float64)
    prediction = method.decoder(visible, masking.restore)
    alone = method.decoder.embed(visible[:, 4:])
    positions = method.decoder.pos_embed[0, 4:]
    for sample in range(2):
        for place in range(8):
            kept = (masking.keep[sample] == place).nonzero().flatten()
            token = alone[sample, kept[0]] if len(kept) else method.decoder.mask_token[0, 0]
            expected = method.decoder.pred(method.decoder.norm(token + positions[place]))
            torch.testing.assert_close(prediction[sample, place], expected)


REFUSED = [
    ("resnet10t", {}, r"a plain timm ViT \(VisionTransformer\), not a ResNet"),
    ("deit_tiny_distilled_patch16_224", {"depth": 1}, "VisionTransformerDistilled has tokens of its own"),
    (
        "vit_tiny_r_s16_p8_224",
        {"depth": 1, "img_size": 64},
        r"embedded one by one \(PatchEmbed\), not by a HybridEmbed",
    ),
    ("test_vit_relpos", {}, "not a VisionTransformerRelPos"),
    ("eva02_tiny_patch14_224", {"depth": 1}, "not a Eva"),
    ("vit_tiny_patch16_224", {"depth": 1, "patch_drop_rate": 0.5}, "backbone.patch_drop_rate: .* set it to 0"),
    ("vit_tiny_patch16_224", {"depth": 1, "patch_size": (8, 16)}, "MAE needs square patches, not 8x16"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_a_vit_that_has_more_is_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    network: Any = timm.create_model(name, num_classes=0, **options)
    with pytest.raises(SettingError, match=message):
        MAE(network, RECIPE)


def test_moco_v3_initializes_every_plain_vit_and_freezes_its_patches() -> None:
    for options in (
        {"pre_norm": True},
        {"reg_tokens": 2, "no_embed_class": True},
        {"class_token": False, "global_pool": ""},
    ):
        vit = small_vit(embed_dim=16, **options)
        MoCoV3(vit, RECIPE, hidden_dim=8, projection_dim=4)
        assert vit.pos_embed.shape[1] == 4 + (0 if vit.no_embed_class else vit.num_prefix_tokens)
        assert not vit.patch_embed.proj.weight.requires_grad
        assert vit.forward_features(torch.randn(1, 3, 16, 16)).isfinite().all()
    relative: Any = timm.create_model("test_vit_relpos", num_classes=0)
    with pytest.raises(SettingError, match=r"MoCo v3 with model.frozen_patches=true needs a plain timm ViT"):
        MoCoV3(relative, RECIPE)
    MoCoV3(relative, RECIPE, frozen_patches=False, hidden_dim=8, projection_dim=4)


def test_videomae_encodes_with_the_norm_before_the_blocks_and_refuses_a_class_token() -> None:
    vit = small_video_vit(embed_dim=12, pre_norm=True, fc_norm=False)
    method = VideoMAE(vit, RECIPE, decoder_dim=8, decoder_depth=1, decoder_heads=2).eval()
    nn.init.normal_(vit.norm_pre.weight)
    video, order = torch.randn(2, 4, 3, 16, 16), torch.arange(8).expand(2, -1)
    everything = Masking(order, order, torch.zeros(2, 8))
    torch.testing.assert_close(method.encode(video, everything), vit.forward_features(video))
    with_class = small_vit(embed_layer=partial(TubeletEmbed, frames=4))
    with pytest.raises(SettingError, match=r"ViT of tubelets alone, and this has 1 tokens before them"):
        VideoMAE(with_class, RECIPE)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"embedded one by one \(TubeletEmbed\), not by a PatchEmbed"):
        check_plain_vit(small_vit(), "VideoMAE", embed=TubeletEmbed)
