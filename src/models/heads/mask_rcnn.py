"""The heads of Mask R-CNN on a feature pyramid: region proposals, bounding boxes, and masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from src.errors import SettingError
from src.models.functional import at_least_float32

_RATIOS = (0.5, 1.0, 2.0)  # height over width of the anchors
_BOX_SIDE, _MASK_SIDE = 7, 14  # positions per side of a region that box and mask heads read
_NAMES = {
    "loss_objectness": "objectness",
    "loss_rpn_box_reg": "proposals",
    "loss_classifier": "classes",
    "loss_box_reg": "boxes",
    "loss_mask": "masks",
}


class MaskRCNNOnMaps(nn.Module):
    """The part of torchvision's Mask R-CNN (He et al., 2017) after the backbone: region proposals, then boxes and masks
    of the regions. Regions are proposed and pooled as in Detectron2. As in torchvision, unlike in Detectron2, boxes
    have a smooth L1 loss, and the targets of masks are shares of pixels.

    torchvision's model also resizes and normalizes images; here the DataModule does, and boxes are in pixels of its
    images. Scores, box coordinates and regression targets stay in float32 under autocast: bfloat16 rounds a coordinate
    of 1000 to 4 pixels.

    Args:
        channels: width of the pyramid's maps.
        strides: strides of the maps from which regions are pooled; the pyramid has one map more, for anchors only.
        num_classes: number of classes without the background.
        anchor_sizes: side of a square anchor in pixels, for each map and for "pool".
        conv_heads: the heads of ViTDet: two convolutions for proposals, four with layer norm and one linear layer for
            boxes, layer norm in the mask head; otherwise torchvision's, with one convolution, two linear layers, no
            norm.
        masks: predict masks; False for Faster R-CNN.
        width: channels of the heads' convolutions.
        hidden: width of the box head's layers.
        candidates: number of regions of each map that enter non-maximum suppression, in training and in evaluation.
        proposals: number of regions of an image that are kept after it, in training and in evaluation.
        regions: number of regions per image in the loss of boxes and masks.
        anchors: number of anchors per image in the loss of proposals.
        detections: largest number of objects detected in an image.
        min_score: lowest score of a detection.

    Raises:
        SettingError: not an anchor size for each map.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        num_classes: int,
        *,
        anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
        conv_heads: bool = False,
        masks: bool = True,
        width: int = 256,
        hidden: int = 1024,
        candidates: tuple[int, int] = (2000, 1000),
        proposals: tuple[int, int] = (1000, 1000),
        regions: int = 512,
        anchors: int = 256,
        detections: int = 100,
        min_score: float = 0.05,
    ) -> None:
        super().__init__()
        if len(anchor_sizes) != len(strides) + 1:
            raise SettingError(
                f"model.heads.anchor_sizes must have a size for each of the pyramid's {len(strides) + 1} maps, got "
                f"{list(anchor_sizes)}"
            )
        sizes = tuple((size,) for size in anchor_sizes)
        self.has_masks = masks
        self.strides = tuple(strides)
        norm = LayerNorm2d if conv_heads else None
        if conv_heads:
            box_head: nn.Module = FastRCNNConvFCHead((channels, _BOX_SIDE, _BOX_SIDE), [width] * 4, [hidden], norm)
        else:
            box_head = TwoMLPHead(channels * _BOX_SIDE**2, hidden)
        neck: Any = nn.Identity()
        neck.out_channels = channels
        model = MaskRCNN(
            neck,
            rpn_anchor_generator=AnchorGenerator(sizes, (_RATIOS,) * len(sizes)),
            rpn_head=RPNHead(channels, len(_RATIOS), conv_depth=2 if conv_heads else 1),
            rpn_pre_nms_top_n_train=candidates[0],
            rpn_post_nms_top_n_train=proposals[0],
            rpn_pre_nms_top_n_test=candidates[1],
            rpn_post_nms_top_n_test=proposals[1],
            rpn_batch_size_per_image=anchors,
            box_roi_pool=RegionPool(strides, _BOX_SIDE),
            box_head=box_head,
            box_predictor=FastRCNNPredictor(hidden, 1 + num_classes),
            box_batch_size_per_image=regions,
            box_detections_per_img=detections,
            box_score_thresh=min_score,
            mask_roi_pool=RegionPool(strides, _MASK_SIDE),
            mask_head=MaskRCNNHeads(channels, (width,) * 4, 1, norm),
            mask_predictor=MaskRCNNPredictor(width, width, 1 + num_classes),
        )
        self.rpn = model.rpn
        self.roi_heads = model.roi_heads
        if not masks:
            self.roi_heads.mask_roi_pool = self.roi_heads.mask_head = self.roi_heads.mask_predictor = None
        for part in (self.rpn.head, self.roi_heads.box_predictor, self.roi_heads.mask_predictor):
            if part is not None:
                part.register_forward_hook(_in_float32)

    def losses(
        self, maps: dict[str, Tensor], sizes: list[tuple[int, int]], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Computes the parts of the loss, by name; in training mode only.

        Args:
            maps: the maps of the pyramid.
            sizes: rows and columns of each image; the rest of the batch's images is padding.
            targets: for each image ``boxes`` [T, 4] with an area above 0, ``labels`` int64 [T] from 1 and ``masks``
                [T, H, W]; T may be 0.
        """
        _, losses = self._regions(maps, sizes, targets)
        return {_NAMES[name]: value for name, value in losses.items()}

    def forward(
        self, maps: dict[str, Tensor], sizes: list[tuple[int, int]], size: tuple[int, int]
    ) -> list[dict[str, Tensor]]:
        """Detects objects in each image, highest score first: ``boxes`` [T, 4], ``scores`` [T], ``labels`` int64 [T]
        from 0, and ``masks`` bool [T, H, W] of ``size``; in evaluation mode only."""
        detections, _ = self._regions(maps, sizes)
        for image in detections:
            image["labels"] = image["labels"] - 1
            if self.has_masks:
                image["masks"] = paste_masks_in_image(image["masks"], image["boxes"], size)[:, 0] >= 0.5
        return detections

    def _regions(
        self, maps: dict[str, Tensor], sizes: list[tuple[int, int]], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        maps = {name: at_least_float32(feature_map) for name, feature_map in maps.items()}
        proposals, proposal_losses = self.rpn(self._canvas(maps, sizes), maps, targets)
        detections, losses = self.roi_heads(maps, proposals, sizes, targets)
        return detections, {**proposal_losses, **losses}

    def _canvas(self, maps: dict[str, Tensor], sizes: list[tuple[int, int]]) -> ImageList:
        """Images for torchvision's anchor generator, which reads only their shape."""
        finest = maps["0"]
        rows, columns = (side * self.strides[0] for side in finest.shape[-2:])
        return ImageList(finest.new_empty(()).expand(len(finest), 3, rows, columns), sizes)


class RegionPool(MultiScaleRoIAlign):
    """RoIAlign (He et al., 2017) from the map that fits a region's size, as in Detectron2: the center of a map's first
    position lies at 0.5 (torchvision's `MultiScaleRoIAlign` puts it at 0), and a region is sampled once for each
    position of the map that it covers.

    Args:
        strides: of the maps "0", "1", ….
        side: rows and columns of the result.
    """

    def __init__(self, strides: Sequence[int], side: int) -> None:
        super().__init__([str(level) for level in range(len(strides))], output_size=side, sampling_ratio=0)
        # torchvision infers them from the first batch, wrongly if all its images are smaller than the padded size
        self.scales = [1 / stride for stride in strides]
        self.map_levels = LevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Maps by name and the boxes [N, 4] of each image -> [sum of N, channels, side, side]."""
        maps = [x[name] for name in self.featmap_names]
        regions = torch.cat(boxes)
        image = torch.cat([torch.full_like(part[:, :1], number) for number, part in enumerate(boxes)])
        levels = self.map_levels(boxes)
        pooled = maps[0].new_zeros(len(regions), maps[0].shape[1], *self.output_size)
        for level, (feature_map, scale) in enumerate(zip(maps, self.scales or [], strict=True)):
            (here,) = torch.where(levels == level)
            rois = torch.cat([image, regions], dim=1)[here]
            part = roi_align(feature_map, rois, self.output_size, scale, self.sampling_ratio, aligned=True)
            pooled = pooled.index_put((here,), part.to(pooled.dtype))
        return pooled


def _in_float32(_: nn.Module, __: Any, output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return at_least_float32(output)
    return type(output)(_in_float32(_, __, part) for part in output)
