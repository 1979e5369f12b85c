"""What methods with an image tower and a text tower share."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool
from src.models.backbones.weights import WeightsError, read, some
from src.models.functional import l2_normalize
from src.models.image_text.micro_batches import check_micro_batch, in_micro_batches
from src.models.pretrain_module import PretrainModule
from src.models.text.text_tower import TextTower
from src.optim import OptimizerRecipe

log = logging.getLogger(__name__)


class ImageTextModule(PretrainModule):
    """Two towers whose features are brought to one width and compared as unit vectors.

    A frozen tower takes no gradient, stays in evaluation mode and keeps no activations; its projection learns.

    Args:
        backbone: any timm model without a head.
        pool: what of its tokens is the image's feature.
        text: the text tower.
        embed_dim: width of what is compared; None compares the towers' features as they are.
        bias: of the projections.
        project_image: False compares the image tower's features as they are, and brings those of the text to them.
        freeze_image, freeze_text: which towers stay as they were given.
        micro_batch: pairs that go through a tower at a time, see `in_micro_batches`; the loss is that of the whole
            batch. None for all at once.

    Raises:
        ValueError: no projection between towers of different widths.
        SettingError: ``micro_batch`` is no number of pairs, or a tower that learns has batch norm.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pool: Pool,
        text: TextTower,
        optimizer: OptimizerRecipe,
        *,
        embed_dim: int | None,
        bias: bool = False,
        project_image: bool = True,
        freeze_image: bool = False,
        freeze_text: bool = False,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(optimizer)
        self.image_encoder = ImageEncoder(backbone, pool)
        self.text_encoder = text
        width = self.image_encoder.dim
        if project_image and embed_dim is None and width != text.dim:
            raise ValueError(f"model.embed_dim: features of {width} and {text.dim} numbers need a common width")
        if not project_image and embed_dim not in (None, width):
            raise ValueError(
                f"model.embed_dim={embed_dim}: without project_image what is compared has the {width} numbers of the "
                "image's features"
            )
        self.image_projection = _projection(width, embed_dim if project_image else None, bias)
        self.text_projection = _projection(text.dim, embed_dim if project_image else width, bias)
        self.frozen = {"image_encoder": freeze_image, "text_encoder": freeze_text}
        for name in self._frozen():
            self.get_submodule(name).requires_grad_(False)
        self.train()
        check_micro_batch(micro_batch, self)
        self.micro_batch = micro_batch

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in self._frozen():
            self.get_submodule(name).eval()
        return self

    def image_features(self, image: Tensor) -> Tensor:
        """The image tower's own: [B, 3, H, W] -> [B, D]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen["image_encoder"]):
            return in_micro_batches(lambda part: self.image_encoder(part).embedding, image, size=self.micro_batch)

    def text_features(self, text: Tensor, mask: Tensor) -> Tensor:
        """The text tower's own: token ids [B, L], the mask saying which are no padding -> [B, D]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen["text_encoder"]):
            return in_micro_batches(lambda *part: self.text_encoder(*part).embedding, text, mask, size=self.micro_batch)

    def encode_image(self, image: Tensor) -> Tensor:
        """Unit vectors [B, E] of images [B, 3, H, W]."""
        return l2_normalize(self.image_projection(self.image_features(image)))

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors [B, E] of token ids [B, L], the mask saying which are no padding."""
        return l2_normalize(self.text_projection(self.text_features(text, mask)))

    def encode_patches(self, image: Tensor) -> Tensor:
        """Unit vectors [B, rows, columns, E] of the positions in images [B, 3, H, W], each projected as if it were
        the image's feature."""
        features = self.image_encoder(image)
        return l2_normalize(self.image_projection(features.patches)).unflatten(1, features.grid)

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": self.image_encoder}

    def _frozen(self) -> list[str]:
        return [name for name, frozen in self.frozen.items() if frozen]


def _projection(width: int, embed_dim: int | None, bias: bool) -> nn.Module:
    if embed_dim is None:
        return nn.Identity()
    projection = nn.Linear(width, embed_dim, bias=bias)
    nn.init.normal_(projection.weight, std=width**-0.5)
    if bias:
        nn.init.zeros_(projection.bias)
    return projection


def modality_gap(image: Tensor, text: Tensor) -> Tensor:
    """Returns the distance between the mean image vector and the mean text vector of a batch, for the log."""
    return (image.mean(dim=0) - text.mean(dim=0)).norm().detach()


def hash_texts(ids: Tensor) -> Tensor:
    """Returns one number a text, equal for equal texts: token ids int64 [N, L] -> int64 [N].

    A hash needs no sorting and no synchronization with the device. Two different texts share a number with a
    probability of about 2^-64.
    """
    # the constants of splitmix64 (Steele et al., 2014), one weight a position; int64 products wrap around as intended
    weight = torch.arange(1, ids.shape[1] + 1, device=ids.device) * -7046029254386353131
    weight = (weight ^ (weight >> 30)) * -4658895280553007687
    weight = (weight ^ (weight >> 27)) * -7723592293110705685
    return (ids * (weight ^ (weight >> 31))).sum(dim=1)


def load_towers(module: ImageTextModule, start: str | Path | None) -> None:
    """Gives ``module`` the towers, projections and scale of a run, in place; what else the run holds is left out.

    Raises:
        WeightsError: the file cannot be read, or has not all of them in their shapes.
    """
    if start is None:
        log.info("towers: weights as created (checkpoint=null): nothing was learned before")
        return
    found = read(Path(start))
    own = module.state_dict()
    missing = [name for name in own if name not in found.tensors]
    if missing:
        raise WeightsError(f"{found.origin} lacks {len(missing)} of the towers' {len(own)} tensors: {some(missing)}")
    wrong = [
        f"{name} {list(found.tensors[name].shape)} instead of {list(value.shape)}"
        for name, value in own.items()
        if found.tensors[name].shape != value.shape
    ]
    if wrong:
        raise WeightsError(f"{found.origin} is of another architecture: it has {some(wrong)}")
    module.load_state_dict({name: found.tensors[name] for name in own})
    log.info("towers: %d tensors from %s", len(own), found.origin)
