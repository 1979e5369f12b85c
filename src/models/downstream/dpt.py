"""The head of the dense prediction transformer (DPT) on a pretrained backbone."""

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
    """Predicts values for every pixel with the head of Vision Transformers for Dense Prediction (Ranftl et al., 2021).

    Args:
        backbone: a timm model, pretrained: a ViT with a class token, or a network with stages.
        optimizer: for the head and, unless it is frozen, the backbone.
        outputs: number of values a pixel.
        width: channels of the fusion blocks.
        widths: channels of the four reassembled maps, the finest first.
        readout: concatenates the class token with each patch token and projects them; False ignores the class token.
        blocks, frozen: see `FeatureMaps`.

    Raises:
        SettingError: the backbone does not have four maps, or has no class token to read.
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
                f"model.blocks, model.widths: DPT needs four maps, got {len(self.features.channels)} and {len(widths)}"
            )
        self.encoders()  # refuses a backbone whose features evaluation could not read
        self.readout = readout and self.features.flat
        if self.readout and not getattr(backbone, "num_prefix_tokens", 0):
            raise SettingError("model.readout: the backbone has no class token; use model.readout=false")
        if self.features.flat:
            self.reassemble: nn.ModuleList | None = nn.ModuleList(
                Reassemble(channels, map_width, factor, readout=self.readout)
                for channels, map_width, factor in zip(
                    self.features.channels, widths, (4.0, 2.0, 1.0, 0.5), strict=True
                )
            )
        else:
            self.reassemble, widths = None, self.features.channels
        self.project = nn.ModuleList(nn.Conv2d(map_width, width, 3, padding=1, bias=False) for map_width in widths)
        self.fuse = nn.ModuleList(Fusion(width, first=level == 3) for level in range(4))
        self.narrow = nn.Conv2d(width, width // 2, 3, padding=1)
        self.output = nn.Sequential(
            nn.Conv2d(width // 2, 32, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(32, outputs, 1)
        )

    def predict_pixels(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> outputs of the last convolution, [B, outputs, H, W], in float32 or float64."""
        maps = [project(x) for project, x in zip(self.project, self.reassemble_maps(image), strict=True)]
        x = self.fuse[3](maps[3])
        for level in (2, 1, 0):
            x = self.fuse[level](_match_size(x, maps[level]), maps[level])
        x = F.interpolate(self.narrow(x), size=image.shape[-2:], mode="bilinear", align_corners=True)
        return at_least_float32(self.output(x))

    def reassemble_maps(self, image: Tensor) -> list[Tensor]:
        """Four maps, the finest first; at strides 4, 8, 16 and 32 for a ViT with patches of 16 pixels."""
        if self.reassemble is None:
            return self.features(image)
        if self.readout:
            tokens = self.features.with_class_token(image)
            return [part(patches, cls) for part, (patches, cls) in zip(self.reassemble, tokens, strict=True)]
        return [part(patches) for part, patches in zip(self.reassemble, self.features(image), strict=True)]

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": ImageEncoder(self.features.backbone, pool=cls_token_or_mean)}


class Reassemble(nn.Module):
    """Converts patch tokens to a map of another resolution (DPT's Read, Concatenate and Resample).

    Args:
        channels: width of the tokens.
        width: channels of the map.
        factor: rows and columns of the map over those of the patches: 4, 2, 1 or 1/2.
        readout: concatenates the class token with each patch token and projects them.
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
            class_tokens = cls[:, None, None].expand(-1, *patches.shape[-2:], -1)
            patches = self.read(torch.cat([patches.movedim(1, -1), class_tokens], dim=-1)).movedim(-1, 1)
        return self.resample(self.project(patches))


class Fusion(nn.Module):
    """Adds a level's map to the features from the coarser level, and doubles the resolution (DPT's variant of
    RefineNet's block).

    Args:
        width: channels of inputs and outputs.
        first: True at the coarsest level, which has a single input.
    """

    def __init__(self, width: int, *, first: bool) -> None:
        super().__init__()
        self.joining = None if first else ResidualUnit(width)
        self.refine = ResidualUnit(width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, joining: Tensor | None = None) -> Tensor:
        """x, and unless ``first`` the map of the level: [B, width, h, w] -> [B, width, 2 h, 2 w]."""
        if self.joining is not None:
            assert joining is not None
            x = x + self.joining(joining)
        x = F.interpolate(self.refine(x), scale_factor=2.0, mode="bilinear", align_corners=True)
        return self.out(x)


class ResidualUnit(nn.Module):
    """Two convolutions, each after a ReLU, with a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _match_size(x: Tensor, other: Tensor) -> Tensor:
    """Resizes x to the size of the finer map. They differ by a pixel if that map has an odd size."""
    if x.shape[-2:] == other.shape[-2:]:
        return x
    return F.interpolate(x, size=other.shape[-2:], mode="bilinear", align_corners=True)
