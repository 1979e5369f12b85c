"""The base class of methods with an image tower and a text tower."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool
from src.models.backbones.weights import Weights, WeightsError, check_activation, load_into, shorten
from src.models.functional import l2_normalize
from src.models.image_text.micro_batches import check_micro_batch, in_micro_batches
from src.models.pretrain_module import PretrainModule
from src.models.text.text_tower import TextTower
from src.optim import OptimizerRecipe

# a start must have these
_TOWERS = ("image_encoder.backbone.", "text_encoder.", "image_projection.", "text_projection.", "logit_scale")


class ImageTextModule(PretrainModule):
    """An image tower and a text tower whose features are projected to the same width and L2-normalized.

    Training starts (``checkpoint``) from both towers of another run with their projections and logit scale, or from an
    image encoder alone where the weights have no text tower.

    A frozen tower has no gradient, stays in evaluation mode and saves no activations; its projection is trained.

    Args:
        backbone: any timm model without a head.
        pool: turns the backbone's tokens into the image's feature.
        text: the text tower.
        embed_dim: width of the projected features; None compares the towers' features without a projection.
        bias: adds a bias to the projections.
        project_image: False compares the image tower's features as they are and projects the text's to their width.
        freeze_image, freeze_text: keeps the weights of a tower as they are.
        micro_batch: pairs that a tower encodes at a time, see `in_micro_batches`; the loss is that of the whole batch.
            None for all pairs.

    Raises:
        SettingError: the towers have different widths and there is no projection, ``micro_batch`` is below 1, or a
            trained tower has batch norm and ``micro_batch`` is set.
    """

    starts_from_towers: ClassVar[bool] = False  # True for a method that makes no sense without both towers' weights

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
            raise SettingError(
                f"model.embed_dim=null: the towers' features have widths {width} and {text.dim}; set a common width"
            )
        if not project_image and embed_dim not in (None, width):
            raise SettingError(
                f"model.embed_dim={embed_dim}: with model.project_image=false it must be null or {width}, the width of "
                "the image's features"
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
        """Computes the image tower's features, not projected: [B, 3, H, W] -> [B, D]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen["image_encoder"]):
            return in_micro_batches(lambda part: self.image_encoder(part).embedding, image, size=self.micro_batch)

    def text_features(self, text: Tensor, mask: Tensor) -> Tensor:
        """Computes the text tower's features, not projected: token ids [B, L] and padding mask -> [B, D]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen["text_encoder"]):
            return in_micro_batches(lambda *part: self.text_encoder(*part).embedding, text, mask, size=self.micro_batch)

    def encode_image(self, image: Tensor) -> Tensor:
        """Encodes images [B, 3, H, W] to unit vectors [B, E]."""
        return l2_normalize(self.image_projection(self.image_features(image)))

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor:
        """Encodes token ids [B, L] with their padding mask, False for padding, to unit vectors [B, E]."""
        return l2_normalize(self.text_projection(self.text_features(text, mask)))

    def encode_patches(self, image: Tensor) -> Tensor:
        """Encodes the patches of images [B, 3, H, W] to unit vectors [B, rows, columns, E], with the projection of the
        image's feature."""
        features = self.image_encoder(image)
        return l2_normalize(self.image_projection(features.patches)).unflatten(1, features.grid)

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": self.image_encoder}

    def load_start(self, weights: Weights) -> str:
        if has_towers(weights):
            return load_towers(self, weights)
        if self.starts_from_towers:
            raise WeightsError(
                f"{weights.origin}: {type(self).__name__} starts from both towers of a run, and this has no text tower"
            )
        return super().load_start(weights)

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


def has_towers(weights: Weights) -> bool:
    """True for the weights of a run with two towers, unless one encoder of it was asked for."""
    return not weights.one_encoder and any(name.startswith("text_encoder.") for name in weights.tensors)


def load_towers(module: ImageTextModule, weights: Weights) -> str:
    """Loads the towers, projections and logit scale of a run into ``module``, in place, with everything else that both
    have under the same name and in the same shape, such as a decoder. Returns one line that says what was loaded.

    Raises:
        WeightsError: a tensor of the towers is missing, or has another shape. Nothing is loaded then.
    """
    state = {name: value for name, value in module.state_dict().items() if not name.startswith("teacher.")}
    image = "image_encoder.backbone."
    others = {name: value for name, value in state.items() if not name.startswith(image)}
    hint = "; with checkpoint_encoder=encoder the image tower alone is loaded"
    missing = [name for name in state if name.startswith(_TOWERS) and name not in weights.tensors]
    if missing:
        raise WeightsError(
            f"{weights.origin} lacks {len(missing)} of the towers' {len(state)} tensors: {shorten(missing)}{hint}"
        )
    mismatched = [
        f"{name} {list(weights.tensors[name].shape)} instead of {list(value.shape)}"
        for name, value in others.items()
        if name in weights.tensors and weights.tensors[name].shape != value.shape
    ]
    if mismatched:
        raise WeightsError(f"{weights.origin} has another architecture: it has {shorten(mismatched)}{hint}")
    transformer: Any = getattr(module.text_encoder, "transformer", None)
    check_activation(weights, getattr(getattr(transformer, "encoder", None), "layers", None))
    line = load_into(module.image_encoder.backbone, weights._replace(prefix=image))
    module.load_state_dict({name: weights.tensors[name] for name in others if name in weights.tensors}, strict=False)
    new = [name for name in others if name not in weights.tensors]
    notes = [f"not from the file: {shorten(new)}"] if new else []
    return "; ".join([line, f"{len(others) - len(new)} tensors of the text tower and the projections", *notes])
