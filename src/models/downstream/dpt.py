"""The head of the dense prediction transformer on the maps of a pretrained backbone, for whatever it is to answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.feature_maps import FeatureMaps
from src.models.backbones.image_encoder import ImageEncoder, cls_token_or_mean
from src.models.functional import at_least_float32
from src.models.pretrain_module import PretrainModule
from src.optim import OptimizerRecipe


class DensePrediction(PretrainModule):
    """Numbers for every pixel, by the head of Vision Transformers for Dense Prediction (Ranftl et al., 2021).

    Args:
        backbone: a timm model, pretrained; a ViT with a class token, or a network with stages.
        optimizer: of the head and, if it is not frozen, the backbone.
        outputs: how many numbers a pixel has.
        width: of the fusion blocks.
        widths: of the maps that are put together again, from the finest on.
        readout: the class token is put beside each patch and projected; otherwise it is left out.
        blocks, frozen: see `FeatureMaps`.

    Raises:
        SettingError: there are not four maps, or no class token to be read.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        outputs: int,
        width: int = 256,
        widths: Sequence[int] = (96, 192, 384, 768),
        readout: bool = True,
        blocks: Sequence[int] | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__(optimizer)
        self.features = FeatureMaps(backbone, blocks=blocks, frozen=frozen)
        if len(self.features.channels) != 4 or len(widths) != 4:
            raise SettingError(
                f"model.blocks, model.widths: DPT reads four maps, got {len(self.features.channels)} and {len(widths)}"
            )
        self.readout = readout and self.features.flat
        if self.readout and not getattr(backbone, "num_prefix_tokens", 0):
            raise SettingError("model.readout: this backbone has no class token; model.readout=false leaves it out")
        if self.features.flat:
            self.reassemble: nn.ModuleList | None = nn.ModuleList(
                Reassemble(channels, each, factor, readout=self.readout)
                for channels, each, factor in zip(self.features.channels, widths, (4.0, 2.0, 1.0, 0.5), strict=True)
            )
        else:
            self.reassemble, widths = None, self.features.channels
        self.project = nn.ModuleList(nn.Conv2d(each, width, 3, padding=1, bias=False) for each in widths)
        self.fuse = nn.ModuleList(Fusion(width, first=level == 3) for level in range(4))
        self.narrow = nn.Conv2d(width, width // 2, 3, padding=1)
        self.output = nn.Sequential(
            nn.Conv2d(width // 2, 32, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(32, outputs, 1)
        )

    def predicted(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> what the last convolution says, [B, outputs, H, W], in float32 at least."""
        maps = [project(each) for project, each in zip(self.project, self.reassembled(image), strict=True)]
        x = self.fuse[3](maps[3])
        for level in (2, 1, 0):
            x = self.fuse[level](_as_large(x, maps[level]), maps[level])
        x = F.interpolate(self.narrow(x), size=image.shape[-2:], mode="bilinear", align_corners=True)
        return at_least_float32(self.output(x))

    def reassembled(self, image: Tensor) -> list[Tensor]:
        """Four maps of falling resolution; of patches of 16 pixels at the strides 4, 8, 16 and 32."""
        if self.reassemble is None:
            return self.features(image)
        if self.readout:
            tokens = self.features.with_class_token(image)
            return [part(patches, cls) for part, (patches, cls) in zip(self.reassemble, tokens, strict=True)]
        return [part(patches) for part, patches in zip(self.reassemble, self.features(image), strict=True)]

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": ImageEncoder(self.features.backbone, pool=cls_token_or_mean)}


class Reassemble(nn.Module):
    """Patches as a map of another size (DPT's Read, Concatenate and Resample).

    Args:
        channels: of the patches.
        width: of the map.
        factor: 4, 2, 1 or 1/2 times as many rows and columns.
        readout: whether there is a class token, which is put beside each patch and projected.
    """

    def __init__(self, channels: int, width: int, factor: float, *, readout: bool) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Linear(2 * channels, channels), nn.GELU()) if readout else None
        self.project = nn.Conv2d(channels, width, 1)
        if factor > 1:
            self.resample: nn.Module = nn.ConvTranspose2d(width, width, int(factor), stride=int(factor))
        elif factor < 1:
            self.resample = nn.Conv2d(width, width, 3, stride=int(1 / factor), padding=1)
        else:
            self.resample = nn.Identity()

    def forward(self, patches: Tensor, cls: Tensor | None = None) -> Tensor:
        """patches [B, D, h, w] and the class token [B, D] -> [B, width, factor h, factor w]."""
        if self.read is not None:
            assert cls is not None
            beside = cls[:, None, None].expand(-1, *patches.shape[-2:], -1)
            patches = self.read(torch.cat([patches.movedim(1, -1), beside], dim=-1)).movedim(-1, 1)
        return self.resample(self.project(patches))


class Fusion(nn.Module):
    """What comes from the coarser level, joined by a map of this one, at twice the size (RefineNet's block, as in DPT).

    Args:
        width: of all that is in it.
        first: it is the coarsest level, which nothing joins.
    """

    def __init__(self, width: int, *, first: bool) -> None:
        super().__init__()
        self.joining = None if first else ResidualUnit(width)
        self.refine = ResidualUnit(width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, joining: Tensor | None = None) -> Tensor:
        """[B, width, h, w], twice -> [B, width, 2 h, 2 w]."""
        if self.joining is not None:
            assert joining is not None
            x = x + self.joining(joining)
        x = F.interpolate(self.refine(x), scale_factor=2.0, mode="bilinear", align_corners=True)
        return self.out(x)


class ResidualUnit(nn.Module):
    """Two convolutions, each after a ReLU, beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _as_large(x: Tensor, other: Tensor) -> Tensor:
    """What was doubled is one pixel too large where the coarser map was rounded up."""
    if x.shape[-2:] == other.shape[-2:]:
        return x
    return F.interpolate(x, size=other.shape[-2:], mode="bilinear", align_corners=True)
