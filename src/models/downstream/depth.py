"""Depth from single pictures on the maps of a pretrained backbone: the head of the dense prediction transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from src.datamodules.batch import DepthBatch
from src.errors import SettingError
from src.models.backbones.feature_maps import FeatureMaps
from src.models.backbones.image_encoder import ImageEncoder, cls_token_or_mean
from src.models.downstream import colours
from src.models.losses.depth import silog
from src.models.pretrain_module import PretrainModule, StepOutput
from src.optim import OptimizerRecipe


class DepthEstimator(PretrainModule):
    """Metres for every pixel, by the head of Vision Transformers for Dense Prediction (Ranftl et al., 2021).

    Validated by what the literature reports, the mean over pictures of: ``eval/abs_rel`` |prediction - depth| / depth,
    ``eval/rmse`` in metres and ``eval/delta1``, the share of pixels that are wrong by a factor below 1.25. Pictures are
    taken whole, predictions brought to the size of the ground truth.

    Deviations: trained for metres from the start, by `silog` (the paper trains on ten data sets for depths that are
    known up to scale and shift first); the output is a sigmoid between ``nearest`` and ``farthest``, where the paper's
    is a ReLU.

    Args:
        backbone: a timm model, pretrained; a ViT with a class token, or a network with stages.
        optimizer: of the head and, if it is not frozen, the backbone.
        nearest, farthest: metres, what can be answered.
        width: of the fusion blocks.
        widths: of the maps that are put together again, from the finest on.
        readout: the class token is put beside each patch and projected; otherwise it is left out.
        focus: see `silog`.
        loss_scale: factor on the loss, 10 in BTS.
        blocks, frozen: see `FeatureMaps`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        nearest: float = 1e-3,
        farthest: float = 10.0,
        width: int = 256,
        widths: Sequence[int] = (96, 192, 384, 768),
        readout: bool = True,
        focus: float = 0.85,
        loss_scale: float = 10.0,
        blocks: Sequence[int] | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__(optimizer)
        if not 0 < nearest < farthest or not 0 <= focus <= 1:
            raise SettingError(
                f"{type(self).__name__}: 0 < nearest < farthest and focus in [0, 1] are needed, got {nearest}, "
                f"{farthest} and {focus}"
            )
        self.features = FeatureMaps(backbone, blocks=blocks, frozen=frozen)
        if len(self.features.channels) != 4 or len(widths) != 4:
            raise SettingError(
                f"model.blocks, model.widths: DPT reads four maps, got {len(self.features.channels)} and {len(widths)}"
            )
        self.readout = readout and self.features.flat
        if self.readout and not getattr(backbone, "num_prefix_tokens", 0):
            raise SettingError("model.readout: this backbone has no class token; model.readout=false leaves it out")
        self.nearest, self.farthest = nearest, farthest
        self.focus, self.loss_scale = focus, loss_scale
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
        self.output = nn.Sequential(nn.Conv2d(width // 2, 32, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(32, 1, 1))
        self.metrics = nn.ModuleDict({name: MeanMetric() for name in ("abs_rel", "rmse", "delta1")})

    def training_step(self, batch: DepthBatch, batch_idx: int) -> StepOutput:
        loss = silog(self(batch["image"]), batch["depth"], batch["valid"], focus=self.focus)
        return {"loss": self.loss_scale * loss}

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> metres, float32 [B, H, W]."""
        maps = [project(each) for project, each in zip(self.project, self.reassembled(image), strict=True)]
        x = self.fuse[3](maps[3])
        for level in (2, 1, 0):
            x = self.fuse[level](_as_large(x, maps[level]), maps[level])
        x = F.interpolate(self.narrow(x), size=image.shape[-2:], mode="bilinear", align_corners=True)
        share = self.output(x)[:, 0].float().sigmoid()
        return self.nearest + (self.farthest - self.nearest) * share

    def reassembled(self, image: Tensor) -> list[Tensor]:
        """Four maps of falling resolution; of patches of 16 pixels at the strides 4, 8, 16 and 32."""
        if self.reassemble is None:
            return self.features(image)
        if self.readout:
            tokens = self.features.with_class_token(image)
            return [part(patches, cls) for part, (patches, cls) in zip(self.reassemble, tokens, strict=True)]
        return [part(patches) for part, patches in zip(self.reassemble, self.features(image), strict=True)]

    def validation_step(self, batch: DepthBatch, batch_idx: int) -> None:
        keep = ~batch["replaced"] & batch["valid"].flatten(1).any(dim=1)
        image, depth, valid = (batch[name][keep] for name in ("image", "depth", "valid"))
        if len(image) == 0:
            return
        predicted = self(image)
        if predicted.shape != depth.shape:
            predicted = F.interpolate(predicted[:, None], size=depth.shape[-2:], mode="bilinear")[:, 0]
        for name, values in depth_errors(predicted, depth, valid).items():
            metric = self.metrics[name]
            metric.update(values)  # type: ignore[operator]
            self.log(f"eval/{name}", metric, batch_size=len(image))  # type: ignore[arg-type]

    def pictures(self, batch: DepthBatch) -> Mapping[str, Tensor]:
        """The picture, what is predicted, and what is true, in the colours of the truth's range; dark where it is far,
        or not known."""
        image, depth, valid = batch["image"], batch["depth"], batch["valid"]
        nearest = depth.masked_fill(~valid, self.farthest).flatten(1).amin(dim=1)
        farthest = depth.masked_fill(~valid, self.nearest).flatten(1).amax(dim=1)
        shown = [self(image), depth.masked_fill(~valid, self.farthest)]
        drawn = [colours.of_depths(each, nearest, farthest) for each in shown]
        drawn = [F.interpolate(each, size=image.shape[-2:], mode="nearest-exact") for each in drawn]
        return {"depth": torch.stack([image, *(self.trainer.datamodule.normalise(each) for each in drawn)], dim=1)}  # type: ignore[attr-defined]

    def encoders(self) -> dict[str, ImageEncoder]:
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


def depth_errors(predicted: Tensor, depth: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """``abs_rel``, ``rmse`` and ``delta1`` of each picture: [B, H, W] metres, with something known of each -> [B]."""
    predicted, depth = predicted.float(), torch.where(valid, depth, 1.0)
    count = valid.flatten(1).sum(dim=1)

    def mean(of: Tensor) -> Tensor:
        return torch.where(valid, of, 0.0).flatten(1).sum(dim=1) / count

    ratio = torch.maximum(predicted / depth, depth / predicted)
    return {
        "abs_rel": mean((predicted - depth).abs() / depth),
        "rmse": mean((predicted - depth).square()).sqrt(),
        "delta1": mean((ratio < 1.25).float()),
    }


def _as_large(x: Tensor, other: Tensor) -> Tensor:
    """What was doubled is one pixel too large where the coarser map was rounded up."""
    if x.shape[-2:] == other.shape[-2:]:
        return x
    return F.interpolate(x, size=other.shape[-2:], mode="bilinear", align_corners=True)
