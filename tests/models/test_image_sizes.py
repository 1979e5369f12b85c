"""Images that are not square, and of one or four channels, through a method of each family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from src import configuration
from src.configuration import instantiate
from src.models.pretrain_module import PretrainModule

HEIGHT, WIDTH = 32, 64


def built(experiment: str, channels: int = 3, *overrides: str) -> PretrainModule:
    values = [f"image_size=[{HEIGHT},{WIDTH}]", "local_image_size=[16,32]", f"data.channels={channels}", *overrides]
    if "_vit" in experiment and not experiment.startswith("videomae"):
        values.append("backbone.patch_size=8")
    values += [f"data.mean={[0.5] * channels}", f"data.std={[0.25] * channels}"]
    config = configuration.compose("train", [f"experiment={experiment}", "scale=tiny", "run.dir=/none", *values])
    torch.manual_seed(0)
    method: PretrainModule = instantiate(config.model)
    if hasattr(method, "build"):
        method.build(3)
    return method


def batch_for(method: PretrainModule, channels: int) -> dict[str, Any]:
    """A batch with every field that the methods below read."""
    rows, size = torch.arange(4), (channels, HEIGHT, WIDTH)
    frames = getattr(getattr(next(iter(method.encoders().values())).backbone, "patch_embed", None), "frames", 8)
    return {
        "image": torch.randn(4, *size),
        "views": torch.randn(4, 2, *size),
        "local_views": torch.randn(4, 2, channels, 16, 32),
        "video": torch.randn(4, frames, *size),
        "label": rows % 3,
        "mask": torch.randint(3, (4, HEIGHT, WIDTH)),
        "depth": torch.rand(4, HEIGHT, WIDTH) + 0.5,
        "valid": torch.ones(4, HEIGHT, WIDTH, dtype=torch.bool),
        "text": torch.tensor([[2, 7, 8, 1, 0, 0]] * 4) + rows[:, None] % 2,
        "text_mask": torch.ones(4, 6, dtype=torch.bool),
        "motion": torch.randn(4, 14),
        "appearance": torch.randn(4, 13),
        "index": rows,
        "replaced": rows < 0,
    }


@pytest.mark.parametrize(
    ("experiment", "channels", "grid"),
    [
        ("mae_vitb", 4, (4, 8)),
        ("simmim_vitb", 4, (4, 8)),
        ("ijepa_vitb", 4, (4, 8)),
        ("droppos_vitb", 1, (4, 8)),
        ("gmml_vits", 3, (4, 8)),
        ("sit_vits", 3, (4, 8)),
        ("mixedae_vitb", 4, (4, 8)),
        ("simclr_r50", 1, (2, 4)),
        ("dino_vits", 3, (4, 8)),
        ("ibot_vits", 3, (4, 8)),
        ("moco_v3_vits", 4, (4, 8)),
        ("supervised_vits", 1, (4, 8)),
        ("clip_vitb32", 3, (4, 8)),
        ("align_b7", 4, (1, 2)),
        ("videomae_vitb", 1, (8, 4, 8)),
        ("sts_r2plus1d", 4, (1, 2, 4)),
        ("finetune_vitb", 4, (4, 8)),
        ("linear_vitb", 1, (4, 8)),
        ("segmentation_upernet_vitb", 3, (4, 8)),
        ("depth_dpt_vitb", 4, (4, 8)),
    ],
)
def test_a_step_and_the_features_of_images_that_are_not_square(
    experiment: str, channels: int, grid: tuple[int, ...]
) -> None:
    method = built(experiment, channels)
    batch = batch_for(method, channels)
    if experiment.startswith(("simclr", "moco", "byol", "sit")):
        del batch["local_views"]
    output: Any = method.training_step(batch, 0)
    output["loss"].backward()
    assert output["loss"].isfinite()
    encoder = next(iter(method.encoders().values())).eval()
    with torch.no_grad():
        features = encoder(batch["video" if len(grid) == 3 else "image"])
    assert features.grid == grid
    assert features.patches.shape == (4, torch.tensor(grid).prod(), encoder.dim)


def test_mae_reconstructs_wide_images_of_four_channels_in_place() -> None:
    """The target of a patch is its own pixels: (row, column, channel), patches in raster order."""
    method: Any = built("mae_vitb", 4)
    image = torch.randn(2, 4, HEIGHT, WIDTH)
    method.norm_pix = False
    target = method.target(image)
    for number, (row, column) in ((0, (0, 0)), (11, (1, 3)), (31, (3, 7))):
        pixels = image[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        assert torch.equal(target[:, number], pixels.permute(0, 2, 3, 1).flatten(1))
    reconstruction = method.visualize({"image": image})["reconstruction"]
    assert reconstruction.shape == (2, 3, 4, HEIGHT, WIDTH)
    visible = reconstruction[:, 1] != 0
    assert torch.equal(reconstruction[:, 2][visible], image[visible])
