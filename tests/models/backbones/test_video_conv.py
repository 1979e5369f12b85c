"""ResNets of space and time against torchvision's own."""

from __future__ import annotations

import pytest
import torch
from timm.models._manipulate import group_with_matcher
from torchvision.models.video import r2plus1d_18, r3d_18

from src.errors import SettingError
from src.models.backbones.video_conv import r2plus1d, r3d
from src.models.backbones.video_encoder import VideoEncoder


@pytest.mark.parametrize(("ours", "theirs"), [(r3d, r3d_18), (r2plus1d, r2plus1d_18)])
def test_at_full_width_it_is_torchvisions(ours, theirs) -> None:
    reference = theirs(num_classes=5).eval()
    model = ours(num_classes=5).eval()
    model.load_state_dict(reference.state_dict())
    video = torch.randn(1, 4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(video), reference(video.transpose(1, 2)))


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
