"""I-JEPA: predict the features of target blocks from those of a context block, in the space of a momentum encoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from src.datamodules.batches.image import ImageBatch
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, mean_patch
from src.models.backbones.plain_vit import check_plain_vit, embed_patches, encode_tokens
from src.models.backbones.positions import fixed_positions, position_count
from src.models.functional import full_precision
from src.models.layers.initialization import initialize_linear_layers
from src.models.masked.masking import gather_tokens, pixel_mask
from src.models.masked.multi_block import ContextAndTargets, multi_block_masks
from src.models.pretrain_module import PretrainModule, StepOutput
from src.models.teacher import TeacherPair, teacher_of
from src.optim import OptimizerRecipe


class IJEPA(PretrainModule):
    """Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture (Assran et al., 2023).

    Deviations: schedules of the learning rate and of weight decay are one step behind the authors'; each process draws
    the sizes of its blocks. As in the authors' code residual branches are not scaled down at initialization.

    The encoder sees the context block alone. The predictor gets its features and, for one target block at a time, a
    mask token at each position of the block. The targets are the block's features of the whole image in the teacher,
    normalized without scale and shift.

    Args:
        backbone: a timm ViT without a head, without a class token in the paper, see `check_plain_vit`. Its positional
            embedding is replaced by the fixed sine-cosine one and its weights are initialized anew.
        optimizer: AdamW in the paper.
        targets, target_scale, target_ratio, context_scale, min_context: see `multi_block_masks`.
        predictor_dim, predictor_depth, predictor_heads: width, number of blocks and of attention heads of the
            predictor; the authors take as many heads as the encoder has.
        teacher_momentum: share of the teacher's old weights in each moving average, see `EMATeacher`.

    Raises:
        SettingError: a backbone that does more than a plain ViT; those of `multi_block_masks`.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        optimizer: OptimizerRecipe,
        *,
        targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_ratio: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        min_context: int = 10,
        predictor_dim: int = 384,
        predictor_depth: int = 6,
        predictor_heads: int = 12,
        teacher_momentum: float = 0.996,
    ) -> None:
        super().__init__(optimizer)
        check_plain_vit(backbone, "I-JEPA")
        self.teacher_momentum = teacher_momentum
        self.grid: tuple[int, int] = backbone.patch_embed.grid_size
        self.multi_block_masks = partial(
            multi_block_masks,
            grid=self.grid,
            targets=targets,
            target_scale=target_scale,
            target_ratio=target_ratio,
            context_scale=context_scale,
            min_context=min_context,
        )
        self.multi_block_masks(0.0, 1)  # refuses bad values before training
        self.backbone = backbone
        backbone.pos_embed = fixed_positions(backbone.embed_dim, self.grid, prefix_tokens=position_count(backbone))
        initialize(backbone)
        self.predictor = Predictor(
            encoder_dim=backbone.embed_dim,
            dim=predictor_dim,
            depth=predictor_depth,
            heads=predictor_heads,
            grid=self.grid,
        )
        self.teacher = teacher_of(backbone)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> StepOutput:
        image = batch["image"]
        masks = self.draw_masks(image)
        context = self.encode(image, masks.context)
        prediction = self.predictor(context, masks)
        with torch.no_grad():
            features = self.patches(self.teacher.forward_features(image))
            target = gather_tokens(features, masks.targets.flatten(1)).view_as(prediction)
        logs = {"context": masks.context.shape[1] / features.shape[1]}
        return {
            "loss": normalized_smooth_l1(prediction, target),
            "logs": logs,
            "embedding": features.float().mean(dim=1),
        }

    def draw_masks(self, image: Tensor) -> ContextAndTargets:
        """Draws the context and target blocks of a step."""
        masks = self.multi_block_masks(torch.rand(1).item(), len(image))
        return ContextAndTargets(*(positions.to(image.device) for positions in masks))

    def encode(self, image: Tensor, context: Tensor) -> Tensor:
        """Encodes the patches of the context alone: [B, C, H, W], int64 [B, K] -> [B, K, D]."""
        prefix, patches = embed_patches(self.backbone, image)
        return self.patches(encode_tokens(self.backbone, prefix, gather_tokens(patches, context)))

    def patches(self, tokens: Tensor) -> Tensor:
        """The tokens without class token and registers."""
        return tokens[:, self.backbone.num_prefix_tokens :]

    def encoders(self) -> dict[str, Encoder]:
        return {"student": ImageEncoder(self.backbone, mean_patch), "teacher": ImageEncoder(self.teacher, mean_patch)}

    def teacher_pairs(self) -> list[TeacherPair]:
        return [TeacherPair(self.backbone, self.teacher)]

    def visualize(self, batch: ImageBatch) -> Mapping[str, Tensor]:
        """The image, its context, and each of its target blocks."""
        image = batch["image"]
        masks = self.draw_masks(image)
        columns = [image]
        for positions in (masks.context, *masks.targets.unbind(dim=1)):
            shown = image.new_zeros(len(image), self.grid[0] * self.grid[1]).scatter(1, positions, 1.0)
            columns.append(image * pixel_mask(shown, self.grid, image.shape[-2:]))
        return {"blocks": torch.stack(columns, dim=1)}


@full_precision
def normalized_smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean Huber loss (with a bend at 1) between predictions and targets of zero mean and unit variance: [..., D]."""
    return F.smooth_l1_loss(prediction, F.layer_norm(target, target.shape[-1:]))


class Predictor(nn.Module):
    """Predicts the features of target blocks from those of the context, each block on its own.

    Args:
        encoder_dim: width of the features.
        dim, depth, heads: width, number of blocks and of attention heads of the transformer.
        grid: rows and columns of patches.
    """

    def __init__(self, *, encoder_dim: int, dim: int, depth: int, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = fixed_positions(dim, grid, prefix_tokens=0)
        self.blocks = nn.Sequential(*[Block(dim, heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)])
        self.norm = LayerNorm(dim)
        self.pred = nn.Linear(dim, encoder_dim)
        initialize(self)

    def forward(self, context: Tensor, masks: ContextAndTargets) -> Tensor:
        """context: [B, K, encoder_dim] -> features of the target blocks, [B, T, M, encoder_dim]."""
        targets, patches = masks.targets.shape[1:]
        positions = self.pos_embed.expand(len(context), -1, -1)
        context = self.embed(context) + gather_tokens(positions, masks.context)
        queries = self.mask_token + gather_tokens(positions, masks.targets.flatten(1))
        x = torch.cat(
            [
                context.unsqueeze(1).expand(-1, targets, -1, -1).flatten(0, 1),
                queries.unflatten(1, (targets, patches)).flatten(0, 1).to(context.dtype),
            ],
            dim=1,
        )
        x = self.norm(self.blocks(x))[:, -patches:]
        return self.pred(x).unflatten(0, (-1, targets))


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """Draws all weights and tokens from a normal distribution with a standard deviation of 0.02; biases are zero."""
    initialize_linear_layers(module)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for name, parameter in module.named_parameters():
        if name in ("cls_token", "reg_token", "mask_token"):
            nn.init.trunc_normal_(parameter, std=0.02)
