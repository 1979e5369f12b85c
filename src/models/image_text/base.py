"""What methods with an image tower and a text tower share."""

from __future__ import annotations

from torch import Tensor, nn

from src.models.backbones.image_encoder import ImageEncoder, Pool
from src.models.image_text.text_tower import Tower
from src.models.joint_embedding.base import unit
from src.models.pretrain_module import PretrainModule
from src.optim import OptimizerRecipe


class ImageTextModule(PretrainModule):
    """Two towers whose features are brought to one width and compared as unit vectors.

    Args:
        backbone: any timm model without a head.
        pool: what of its tokens is the image's feature.
        text: the text tower.
        embed_dim: width of what is compared; None compares the towers' features as they are.
        bias: of the projections.

    Raises:
        ValueError: no projection between towers of different widths.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pool: Pool,
        text: Tower,
        optimizer: OptimizerRecipe,
        *,
        embed_dim: int | None,
        bias: bool = False,
    ) -> None:
        super().__init__(optimizer)
        self.image_encoder = ImageEncoder(backbone, pool)
        self.text_encoder = text
        if embed_dim is None and self.image_encoder.dim != text.dim:
            raise ValueError(
                f"model.embed_dim: features of {self.image_encoder.dim} and {text.dim} numbers need a common width"
            )
        self.image_projection = _projection(self.image_encoder.dim, embed_dim, bias)
        self.text_projection = _projection(text.dim, embed_dim, bias)

    def encode_image(self, image: Tensor) -> Tensor:
        """Unit vectors [B, E] of pictures [B, 3, H, W]."""
        return unit(self.image_projection(self.image_encoder(image).embedding))

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors [B, E] of token ids [B, L], the mask saying which are no filling."""
        return unit(self.text_projection(self.text_encoder(text, mask).embedding))

    def encode_patches(self, image: Tensor) -> Tensor:
        """Unit vectors [B, rows, columns, E] of the positions in pictures [B, 3, H, W], each projected as if it were
        the picture's feature."""
        features = self.image_encoder(image)
        return unit(self.image_projection(features.patches)).unflatten(1, features.grid)

    def encoders(self) -> dict[str, ImageEncoder]:
        return {"encoder": self.image_encoder}


def _projection(width: int, embed_dim: int | None, bias: bool) -> nn.Module:
    if embed_dim is None:
        return nn.Identity()
    projection = nn.Linear(width, embed_dim, bias=bias)
    nn.init.normal_(projection.weight, std=width**-0.5)
    if bias:
        nn.init.zeros_(projection.bias)
    return projection
