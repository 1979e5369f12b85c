"""ResNets of space and time against torchvision's own."""

from __future__ import annotations

import pytest
import torch
from timm.models._manipulate import group_with_matcher
from torch import nn
from torchvision.models.video import r2plus1d_18, r3d_18

from src.errors import SettingError
from src.models.backbones.video_conv import TimeConv3d, r2plus1d, r3d
from src.models.backbones.video_encoder import VideoEncoder


@pytest.mark.parametrize(("ours", "theirs"), [(r3d, r3d_18), (r2plus1d, r2plus1d_18)])
def test_at_full_width_it_is_torchvisions(ours, theirs) -> None:
    reference = theirs(num_classes=5).eval()
    model = ours(num_classes=5).eval()
    model.load_state_dict(reference.state_dict())
    video = torch.randn(1, 4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(video), reference(video.transpose(1, 2)))


@pytest.mark.parametrize("half", [False, True], ids=["autocast", "half-precision weights"])
def test_time_convolutions_of_a_cpu_have_whole_gradients(half) -> None:
    """PyTorch's own in bfloat16 are NaN here, as often as freed memory holds NaN."""
    torch.manual_seed(0)
    conv = TimeConv3d(16, 16, (3, 1, 1), padding=(1, 0, 0), bias=False)
    x = torch.randn(2, 16, 2, 4, 4)
    if half:
        conv, x = conv.bfloat16(), x.bfloat16()
    exact = nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0), bias=False)
    exact.load_state_dict({"weight": conv.weight.detach().float()})
    exact(x.float()).square().mean().backward()
    for _ in range(5):
        junk = [torch.full((1000, 1000), torch.nan) for _ in range(3)]
        del junk
        conv.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=not half):
            y = conv(x)
        assert y.dtype == x.dtype
        y.float().square().mean().backward()
        torch.testing.assert_close(conv.weight.grad.float(), exact.weight.grad, rtol=0.02, atol=1e-4)


def test_a_small_one_answers_as_an_encoder() -> None:
    model = r2plus1d(layers=(1, 1, 1, 1), width=4).eval()
    encoder = VideoEncoder(model)
    features = encoder(torch.randn(2, 8, 3, 32, 32))
    assert encoder.dim == 32
    assert (features.grid, features.patches.shape) == ((1, 2, 2), (2, 4, 32))
    torch.testing.assert_close(features.embedding, features.patches.mean(dim=1))
    torch.testing.assert_close(
        model.forward_head(model.forward_features(torch.ones(1, 8, 3, 32, 32)), pre_logits=True),
        encoder(torch.ones(1, 8, 3, 32, 32)).embedding,
    )


def test_layers_are_counted_from_the_stem_to_the_classifier() -> None:
    model = r3d(layers=(1, 2, 1, 1), width=4, num_classes=2)
    levels = group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True)
    assert levels["stem.0.weight"] == 0
    assert levels["layer1.0.conv1.0.weight"] == 1
    assert levels["layer2.1.conv2.0.weight"] == 3
    assert levels["fc.weight"] == max(levels.values()) == 6


def test_stages_that_cannot_be_are_refused() -> None:
    with pytest.raises(SettingError, match=r"backbone\.layers=.* must be the numbers of blocks in four stages"):
        r3d(layers=(1, 1))
