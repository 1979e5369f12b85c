"""VideoMAE against transformers' implementation, and its parts by hand."""

from __future__ import annotations

import pytest
import timm
import torch
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from src.errors import SettingError
from src.export.hf_videos import videomae_weights
from src.models.backbones.video_encoder import VideoEncoder
from src.models.backbones.video_vit import sinusoids
from src.models.losses.reconstruction import masked_mse
from src.models.video.masking import running_cell_masking, tube_masking
from src.models.video.videomae import VideoMAE, from_tubelets, normalize_tubelets, to_tubelets
from src.optim import OptimizerRecipe, Rule
from src.train import compose
from tests.toys import small_video_vit

RECIPE = OptimizerRecipe(torch.optim.AdamW, lr=1e-3)


def vit(frames: int = 4) -> timm.models.VisionTransformer:
    return small_video_vit(frames, img_size=32, embed_dim=24, depth=2, fc_norm=False)


def method(**options: object) -> VideoMAE:
    torch.manual_seed(0)
    return VideoMAE(vit(), RECIPE, **{"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, **options})


def theirs(ours: VideoMAE) -> VideoMAEForPreTraining:
    """Returns transformers' model with our weights."""
    config = VideoMAEConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        tubelet_size=2,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        decoder_num_attention_heads=2,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_intermediate_size=64,
        norm_pix_loss=True,
        layer_norm_eps=1e-6,
        use_mean_pooling=False,  # a final norm, as the authors' encoder has
    )
    model = VideoMAEForPreTraining(config).eval()
    decoder = {
        "embed": "encoder_to_decoder",
        "mask_token": "mask_token",
        "norm": "decoder.norm",
        "pred": "decoder.head",
    }
    encoder = videomae_weights(ours.backbone.state_dict())
    model.load_state_dict(
        {f"videomae.{name}": value for name, value in encoder.items()}
        | videomae_weights(ours.decoder.state_dict(), names=decoder, layers="decoder.decoder_layers")
    )
    return model


def test_the_loss_equals_that_of_transformers() -> None:
    """transformers ported the authors' code independently; same weights, clips and masks here."""
    ours = method(pixel_std=(0.229, 0.224, 0.225))
    with torch.no_grad():  # biases are initialized to zero, where a wrong one would not show
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model = theirs(ours)
    torch.manual_seed(3)
    # transformers undoes ImageNet's normalization before it normalizes targets
    unit = torch.rand(3, 4, 3, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    video = (unit - mean) / std
    torch.manual_seed(5)
    masking = tube_masking(3, ours.grid, ours.mask_ratio, video.device)
    torch.manual_seed(5)
    loss = ours.training_step({"video": video}, 0)["loss"]
    expected = model(pixel_values=video, bool_masked_pos=masking.mask.bool()).loss
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)


def test_tubelets_and_back() -> None:
    video = torch.arange(2 * 4 * 3 * 4 * 8, dtype=torch.float32).view(2, 4, 3, 4, 8)
    tubelets = to_tubelets(video, (2, 2, 4))
    assert tubelets.shape == (2, 2 * 2 * 2, 16, 3)
    assert torch.equal(from_tubelets(tubelets, (2, 2, 4), (2, 2, 2)), video)
    # the second tubelet: the first two frames, upper rows, right half; pixels laid out by frame, row and column
    expected = video[0, :2, :, :2, 4:].permute(0, 2, 3, 1).reshape(16, 3)
    assert torch.equal(tubelets[0, 1], expected)


def test_each_channel_of_a_tubelet_is_normalized_alone() -> None:
    tubelets = torch.tensor([[[[0.0, 10.0], [2.0, 30.0]]]])
    target, mean, std = normalize_tubelets(tubelets)
    assert mean.flatten().tolist() == [1.0, 20.0]
    torch.testing.assert_close(std.flatten(), torch.tensor([2**0.5, 200**0.5]))
    torch.testing.assert_close(target.flatten(), torch.tensor([-1.0, -1.0, 1.0, 1.0]) / 2**0.5, rtol=1e-5, atol=0)


def test_the_addition_to_the_deviation_is_one_of_pixels_before_their_normalization() -> None:
    """Dark pixels whose deviation is near the 1e-6 that the authors add to it in [0, 1]."""
    pixels = 1e-6 * torch.arange(8.0, dtype=torch.float64).view(1, 1, 4, 2)
    std = torch.tensor([0.5, 0.25], dtype=torch.float64)
    expected = (pixels - pixels.mean(dim=2, keepdim=True)) / (pixels.std(dim=2, keepdim=True) + 1e-6)
    target, _, _ = normalize_tubelets((pixels - 0.4) / std, std.tolist())
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=0)
    assert not torch.allclose(normalize_tubelets((pixels - 0.4) / std, (1.0, 1.0))[0], expected, rtol=0.05)
    with pytest.raises(SettingError, match=r"model\.pixel_std=\[1\.0\] must have a value for each of the 2 channels"):
        normalize_tubelets(pixels, [1.0])


def test_initialization_is_the_authors() -> None:
    torch.manual_seed(0)
    ours = VideoMAE(vit(), RECIPE, decoder_dim=96, decoder_depth=1, decoder_heads=2)
    # torch's own, uniform to 1 / sqrt(24); Xavier's bound would be sqrt(6 / (24 + 96))
    embed = ours.decoder.embed.weight
    assert embed.abs().max() <= 24**-0.5
    assert embed.std().item() == pytest.approx((3 * 24) ** -0.5, rel=0.05)
    for weight in (ours.backbone.blocks[0].attn.qkv.weight, ours.decoder.blocks[0].mlp.fc1.weight):
        assert weight.std().item() == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.05)
    # a normal distribution within one deviation of 0.02 has 0.54 times that
    token = ours.decoder.mask_token
    assert token.abs().max() <= 0.02
    assert token.std().item() == pytest.approx(0.54 * 0.02, rel=0.15)
    assert ours.decoder.pred.bias.abs().max() == 0


def test_the_recipe_decays_what_the_authors_decay() -> None:
    config = compose(["experiment=videomae_vitb", "scale=tiny"])
    rules = [
        Rule(**{key: value for key, value in rule.items() if key != "_target_"}) for rule in config.optimizer.rules
    ]
    groups = OptimizerRecipe(torch.optim.AdamW, lr=1.0, weight_decay=0.05, rules=rules).build(method()).param_groups
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decay["decoder.mask_token"] == decay["decoder.norm.weight"] == decay["backbone.norm.bias"] == 0
    assert decay["decoder.embed.weight"] == decay["backbone.patch_embed.projection.weight"] == 0.05


def test_with_dual_masking_the_loss_is_of_tubelets_both_masked_and_decoded() -> None:
    ours, video = method(decoder_masking=running_cell_masking, mask_ratio=0.5), torch.randn(2, 4, 3, 32, 32)
    torch.manual_seed(2)
    masking = tube_masking(2, ours.grid, 0.5, video.device)
    decoded = running_cell_masking(masking, ours.grid)
    prediction = ours.decoder(ours.encode(video, masking), masking.keep, decoded)
    target = normalize_tubelets(to_tubelets(video, ours.tubelet))[0].flatten(2)
    errors = []
    for clip in range(2):
        for row, place in enumerate(decoded[clip].tolist()):
            if masking.mask[clip, place]:
                errors.append((prediction[clip, row] - target[clip, place]).pow(2).mean())
    assert 0 < len(errors) < decoded.numel()
    torch.manual_seed(2)
    loss = ours.training_step({"video": video}, 0)["loss"]
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_masked_tubelets_do_not_reach_the_encoder() -> None:
    ours, video = method(), torch.randn(1, 4, 3, 32, 32)
    masking = tube_masking(1, ours.grid, ours.mask_ratio, video.device)
    changed = to_tubelets(video, ours.tubelet)
    changed = torch.where(masking.mask[..., None, None] > 0, torch.randn_like(changed), changed)
    changed = from_tubelets(changed, ours.tubelet, ours.grid)
    assert torch.equal(ours.encode(video, masking), ours.encode(changed, masking))


def test_pictures_show_the_clip_and_leave_visible_cubes_alone() -> None:
    ours, video = method(), torch.randn(2, 4, 3, 32, 32)
    torch.manual_seed(7)
    shown = ours.visualize({"video": video})["reconstruction"]
    torch.manual_seed(7)
    masking = tube_masking(2, ours.grid, ours.mask_ratio, video.device)
    assert shown.shape == (2 * 3, 2, 3, 32, 32)
    assert torch.equal(shown[0::3], video[:, ::2])
    visible = (
        from_tubelets(1 - masking.mask[..., None, None].expand(-1, -1, 128, 3), ours.tubelet, ours.grid)[:, ::2] > 0
    )
    torch.testing.assert_close(shown[2::3][visible], video[:, ::2][visible])
    assert torch.equal(shown[1::3][~visible], torch.zeros_like(shown[1::3][~visible]))
    assert not torch.equal(shown[2::3][~visible], shown[1::3][~visible])


def test_video_visualizations_show_the_same_as_the_images() -> None:
    ours, video = method(), torch.randn(2, 4, 3, 32, 32)
    torch.manual_seed(7)
    stills = ours.visualize({"video": video})["reconstruction"]
    torch.manual_seed(7)
    clips = ours.visualize_video({"video": video})["reconstruction"]
    assert clips.shape == (2, 3, 4, 3, 32, 32)
    assert torch.equal(clips[:, 0], video)
    assert torch.equal(clips[1, :, ::2], stills[3:])


def test_the_positional_embedding_alternates_sines_and_cosines() -> None:
    table = sinusoids(4, 3)[0]
    angles = torch.tensor([0.0, 1.0, 2.0])
    expected = torch.stack([angles.sin(), angles.cos(), (angles / 100).sin(), (angles / 100).cos()], dim=1)
    torch.testing.assert_close(table, expected)
    assert not table.requires_grad


def test_the_encoder_reads_all_tubelets() -> None:
    encoder = VideoEncoder(method().backbone.eval())
    features = encoder(torch.randn(2, 4, 3, 32, 32))
    assert features.grid == (2, 4, 4)
    assert features.patches.shape == (2, 32, encoder.dim)
    torch.testing.assert_close(features.embedding, features.patches.mean(dim=1))


def test_clips_of_another_size_raise() -> None:
    with pytest.raises(SettingError, match="a clip of 5 frames of 32x32 pixels is no whole number of tubelets"):
        vit(frames=5)
    with pytest.raises(SettingError, match="clips of 8 frames of 32x32 pixels, where the backbone reads 4"):
        VideoEncoder(vit())(torch.randn(1, 8, 3, 32, 32))


def test_masked_mse_is_the_error_of_masked_patches() -> None:
    prediction, target = torch.zeros(1, 2, 3), torch.tensor([[[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]])
    assert masked_mse(prediction, target, torch.tensor([[0.0, 1.0]])) == 4.0


@pytest.mark.parametrize(
    ("experiment", "clips", "rate", "lowest", "warmup", "epochs"),
    [
        # MCG-NJU/VideoMAE, run_mae_pretraining.py, commit 14ef8d8: rates of 1.5e-4 and 1e-5 times the batch / 256; the
        # batch is that of the paper
        ("videomae_vitb", 1024, 6.0e-4, 4.0e-5, "40 epochs", 1600),
        # OpenGVLab/VideoMAEv2, scripts/pretrain/vit_b_hybrid_pt.sh, commit 29eab1e: 32 GPUs x 32 videos of four clips;
        # rates times the videos / 256
        ("videomae_v2_vitb", 4096, 4.0e-3, 4.0e-5, "20 epochs", 200),
    ],
)
def test_the_recipe_is_the_authors(experiment, clips, rate, lowest, warmup, epochs):
    config = compose([f"experiment={experiment}", "scale=paper", "paths.data=videos"])
    lr = config.schedules.optimizer.lr
    assert config.data.batch_size == clips
    assert (lr.peak, lr.end) == pytest.approx((rate, lowest))
    assert (lr.warmup, config.trainer.max_epochs) == (warmup, epochs)
    assert config.data.train_view.crop.flip == 0.0  # neither mirrors in pretraining
    assert config.data.train_view.get("repeats", 1) == (4 if "v2" in experiment else 1)
