"""X-CLIP: CLIP for videos, whose frames leave each other messages and whose class names look at the video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from src.collectives import rank
from src.datamodules.batches.base import labels_of
from src.datamodules.batches.video import VideoBatch
from src.datamodules.named_video import NamedVideoDataModule
from src.datamodules.text.tokenizer import Tokenizer
from src.errors import SettingError
from src.models.backbones.encoder import Encoder, Features
from src.models.backbones.image_encoder import ImageEncoder, cls_token
from src.models.downstream.mixing import mix
from src.models.functional import at_least_float32, full_precision, l2_normalize
from src.models.image_text.base import ImageTextModule, load_towers
from src.models.layers.attention import Attention
from src.models.pretrain_module import StepOutput
from src.models.text.text_tower import TextTower
from src.optim import OptimizerRecipe, Rule

_AT_A_TIME = 2**13  # videos times classes whose prompts are made at once


class XCLIP(ImageTextModule):
    """Expanding Language-Image Pretrained Models for General Video Recognition (Ni et al., 2022): a video is classified
    by the names of the classes. Deviations: the clips of a batch are mixed with its reverse, and the colors of a clip
    change alike in all frames, where the authors draw both anew.

    What is compared has a row for each video, its feature and then what its places look like, and a row for each name,
    its feature before it has seen a video; `similarity` lets the one look at the other.

    Args:
        backbone: a timm ViT with a class token and no head.
        text: the text tower.
        optimizer: AdamW with betas (0.9, 0.98) in the paper.
        frames: of a clip.
        start: a run of this template with two towers, its folder or a checkpoint; None for weights as created.
        embed_dim: width of what is compared, as in the start.
        temperature: of the scale where there is no start.
        template: how a class is put in words, with one ``{}``; the authors have its name alone. None for the data's
            own.
        freeze_text: the text tower, its projection and the scale stay as they are, and each name is read once.
        messages: frames talk to each other in every block; otherwise each is seen alone.
        integration_depth: blocks that bring the frames' features together; 0 for their mean.
        prompt_depth: layers by which names look at the video; 0 for names as they are.
        alpha: what share of that is added to a name at the start, in each dimension.
        heads: of these blocks and layers; None for one in 64 dimensions, as in CLIP.
        fresh_lr: the learning rate of what CLIP does not have is so many times the others'.
        mixup, cutmix, smoothing: see `mix`; 0 for none.
        seed: of the mixing.

    Raises:
        WeightsError: the start is of another architecture.
        SettingError: the backbone has no class token, or a number is out of range; when training starts, the data does
            not name its classes; in a step, clips of another number of frames.
    """

    image_encoder: CrossFrameEncoder
    class_text: Tensor  # int64 [K, L]: the names of the classes that are trained on
    class_mask: Tensor  # bool [K, L]
    row_of: Tensor  # int64: which of them a label stands for

    def __init__(
        self,
        backbone: VisionTransformer,
        text: TextTower,
        optimizer: OptimizerRecipe,
        *,
        frames: int = 8,
        start: str | Path | None = None,
        embed_dim: int = 512,
        temperature: float = 0.07,
        template: str | None = "{}",
        freeze_text: bool = True,
        messages: bool = True,
        integration_depth: int = 1,
        prompt_depth: int = 2,
        alpha: float = 0.1,
        heads: int | None = None,
        fresh_lr: float = 10.0,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        smoothing: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, cls_token, text, optimizer, embed_dim=embed_dim, freeze_text=freeze_text)
        if frames < 1 or min(integration_depth, prompt_depth, mixup, cutmix) < 0 or temperature <= 0:
            raise SettingError(
                f"model: frames={frames} >= 1, integration_depth={integration_depth}, prompt_depth={prompt_depth}, "
                f"mixup={mixup}, cutmix={cutmix} >= 0 and temperature={temperature} > 0 are needed"
            )
        if not 0 <= smoothing < 1:
            raise SettingError(f"model.smoothing is a share below 1, got {smoothing}")
        if template is not None and template.count("{}") != 1:
            raise SettingError(f"model.template has one {{}} for the name of the class; got '{template}'")
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)))
        load_towers(self, start)
        # only now what the start does not have
        heads = heads or max(1, embed_dim // 64)
        self.image_encoder = CrossFrameEncoder(backbone, messages=messages)
        block: Any = backbone.blocks[0]
        activation = type(block.mlp.act)
        self.integration = (
            MultiframeIntegration(frames, embed_dim, depth=integration_depth, heads=heads, activation=activation)
            if integration_depth
            else None
        )
        self.prompts = (
            VideoPrompts(
                backbone.embed_dim, embed_dim, depth=prompt_depth, heads=heads, alpha=alpha, activation=activation
            )
            if prompt_depth
            else None
        )
        if freeze_text:
            self.text_projection.requires_grad_(False)
            self.logit_scale.requires_grad_(False)
        self.frame_count = frames
        self.template = template
        self.fresh_lr = fresh_lr
        self.mixup, self.cutmix, self.smoothing, self.seed = mixup, cutmix, smoothing, seed
        for name in ("class_text", "class_mask", "row_of"):
            self.register_buffer(name, None, persistent=False)
        self._class_features: Tensor | None = None

    def training_step(self, batch: VideoBatch, batch_idx: int) -> StepOutput:
        video, label = batch["video"], self.row_of[labels_of(batch, "X-CLIP")]
        smoothing = self.smoothing
        if self.mixup or self.cutmix:
            video, label = mix(
                video,
                label,
                classes=len(self.class_text),
                mixup=self.mixup,
                cutmix=self.cutmix,
                smoothing=smoothing,
                place=(self.seed, self.global_step, batch_idx, rank()),
            )
            smoothing = 0.0  # the mixed labels are smooth already
        tokens = self.image_encoder.tokens(video)
        logits = self.logit_scale.exp() * self.similarity(self.seen(tokens), self.class_features())
        loss = F.cross_entropy(logits, label, label_smoothing=smoothing)
        logs = {} if self.prompts is None else {"alpha": self.prompts.alpha.detach().mean()}
        return {"loss": loss, "logs": logs, "embedding": self.image_encoder.embed(tokens).detach().float()}

    def encode_image(self, image: Tensor) -> Tensor:
        """What is compared of clips: [B, T, 3, H, W] -> [B, 1 + N, E]."""
        return self.seen(self.image_encoder.tokens(image))

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor:
        """What is compared of token ids [B, L]: [B, E], as long as the projection makes it."""
        return self.text_projection(self.text_features(text, mask))

    def seen(self, tokens: Tensor) -> Tensor:
        """The video's feature, and the N places of its frames as the names will see them, none where they look at
        nothing: [B, T, P + N, D] -> [B, 1 + N, E].

        Raises:
            SettingError: clips of another number of frames.
        """
        if self.integration is not None and tokens.shape[1] != self.frame_count:
            raise SettingError(
                f"data.train_view.clip.frames: clips of {tokens.shape[1]} frames, where model.frames={self.frame_count}"
            )
        frames = self.image_projection(self.image_encoder.frames(tokens))
        video = frames.mean(dim=1) if self.integration is None else self.integration(frames)
        if self.prompts is None:
            return video[:, None]
        return torch.cat([video[:, None], self.prompts.context(self.image_encoder.patches(tokens))], dim=1)

    def similarity(self, query: Tensor, keys: Tensor) -> Tensor:
        """The cosine of each video with each name that has seen it; videos [Q, 1 + N, E] and names [K, E], or the other
        way round, to [Q, K]."""
        if query.ndim == 2:
            return self.similarity(keys, query).T
        if self.prompts is None:
            return cosines(l2_normalize(query[:, 0]), l2_normalize(keys).expand(len(query), -1, -1))
        parts = query.split(max(1, _AT_A_TIME // len(keys)))
        return torch.cat(
            [cosines(l2_normalize(part[:, 0]), l2_normalize(self.prompts(keys, part[:, 1:]))) for part in parts]
        )

    def name_classes(self, tokenizer: Tokenizer, texts: Sequence[str], held_out: Sequence[int] = ()) -> None:
        """Takes the classes to train on.

        Args:
            texts: what each class is called, by label.
            held_out: labels of classes that training does not know of.
        """
        kept = [label for label in range(len(texts)) if label not in held_out]
        ids, mask = tokenizer([texts[label] for label in kept])
        self.class_text, self.class_mask = ids.to(self.device), mask.to(self.device)
        self.row_of = torch.full((len(texts),), -1, device=self.device)
        self.row_of[kept] = torch.arange(len(kept), device=self.device)
        self._class_features = None

    def class_features(self) -> Tensor:
        """Those of the names: [K, E]."""
        if not self.frozen["text_encoder"]:
            return self.encode_text(self.class_text, self.class_mask)
        if self._class_features is None:
            with torch.no_grad():
                self._class_features = at_least_float32(self.encode_text(self.class_text, self.class_mask))
        return self._class_features

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": self.image_encoder}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        fresh = "^(?:image_encoder.messages|integration|prompts)[.]"
        rules = [
            Rule(f"{fresh}positions$", lr_multiplier=self.fresh_lr, weight_decay=0.0),
            Rule(fresh, lr_multiplier=self.fresh_lr),
        ]
        names = list(self.named_parameters())
        return self.optimizer_recipe.build(self, [rule for rule in rules if any(rule.matches(*each) for each in names)])

    def on_fit_start(self) -> None:
        super().on_fit_start()
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(datamodule, NamedVideoDataModule):
            raise SettingError("data._target_: X-CLIP learns the names of classes, for which a NamedVideoDataModule is")
        self.name_classes(datamodule.tokenizer, datamodule.class_texts(self.template), datamodule.held_out)


class CrossFrameEncoder(ImageEncoder):
    """A ViT that reads the frames of a clip, each on its own but for the messages between them. Its embedding is the
    mean of the frames' class tokens.

    Args:
        backbone: a timm ViT with a class token.
        messages: whether there are any.

    Raises:
        SettingError: another backbone.
    """

    def __init__(self, backbone: VisionTransformer, *, messages: bool = True) -> None:
        super().__init__(backbone, cls_token)
        if not isinstance(backbone, VisionTransformer) or backbone.cls_token is None:
            raise SettingError("backbone: X-CLIP's frames talk by the class token of a ViT, which this one has not")
        blocks: Any = backbone.blocks
        made = [Message(backbone.embed_dim, each.attn.num_heads) for each in blocks]
        self.messages = nn.ModuleList(made) if messages else None

    def tokens(self, video: Tensor) -> Tensor:
        """What the last block makes of the frames, before the norm: [B, T, 3, H, W] -> [B, T, P + N, D]."""
        vit: Any = self.backbone
        apart = video.shape[:2]
        x = vit.patch_embed(video.flatten(0, 1))
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))
        for number, block in enumerate(vit.blocks):
            if self.messages is None:
                x = block(x)
                continue
            message = self.messages[number](x[:, 0].unflatten(0, apart)).flatten(0, 1)
            # attention reads the message; the MLP looks at each token alone, so that it can be dropped after it as well
            x = block(torch.cat([x, message[:, None]], dim=1))[:, :-1]
        return x.unflatten(0, apart)

    def frames(self, tokens: Tensor) -> Tensor:
        """One feature a frame: [B, T, P + N, D] -> [B, T, D]."""
        return self.backbone.norm(tokens[:, :, 0])  # type: ignore[operator]

    def patches(self, tokens: Tensor) -> Tensor:
        """[B, T, P + N, D] -> [B, T, N, D]."""
        return tokens[:, :, self.backbone.num_prefix_tokens :]

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, T, P + N, D] -> [B, D]."""
        return self.frames(tokens).mean(dim=1)

    def forward(self, image: Tensor) -> Features:
        """image: clips [B, T, 3, H, W], normalized."""
        tokens = self.tokens(image)
        patches = self.backbone.norm(self.patches(tokens)).flatten(1, 2)  # type: ignore[operator]
        rows, columns = self.backbone.patch_embed.grid_size  # type: ignore[union-attr,misc]
        return Features(embedding=self.embed(tokens), patches=patches, grid=(image.shape[1], rows, columns))


class Message(nn.Module):
    """What each frame tells the others, made of its class token, once it has heard them. Frames have no order here.

    Args:
        dim, heads: of the ViT.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, frames: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        message = self.project(frames)
        asked = self.norm(message)
        return message + self.attention(asked, asked, asked, need_weights=False)[0]


class MultiframeIntegration(nn.Module):
    """The features of a clip's frames, which know their place in time here, to one.

    Args:
        frames: T.
        dim, depth, heads: of the transformer.
        activation: of its MLPs.
    """

    def __init__(self, frames: int, dim: int, *, depth: int, heads: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(1, frames, dim))
        self.blocks = nn.Sequential(
            *[Block(dim, heads, qkv_bias=True, act_layer=activation, norm_layer=nn.LayerNorm) for _ in range(depth)]
        )
        nn.init.trunc_normal_(self.positions, std=0.02)
        small_linear_layers(self)
        for block in self.blocks:
            nn.init.xavier_uniform_(block.get_parameter("attn.qkv.weight"))

    def forward(self, frames: Tensor) -> Tensor:
        """[B, T, E] -> [B, E]."""
        return (frames + self.blocks(frames + self.positions)).mean(dim=1)


class VideoPrompts(nn.Module):
    """Names that have looked at a video.

    Args:
        width: of the ViT's tokens.
        dim, depth, heads: of the layers in which they look.
        alpha: how much of what they have found is added at the start.
        activation: of the layers' MLPs.
    """

    def __init__(
        self, width: int, dim: int, *, depth: int, heads: int, alpha: float, activation: type[nn.Module]
    ) -> None:
        super().__init__()
        self.norm_patches = nn.LayerNorm(width)
        self.project = nn.Linear(width, dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList([PromptLayer(dim, heads, activation) for _ in range(depth)])
        self.alpha = nn.Parameter(torch.full((dim,), alpha))
        small_linear_layers(self)
        nn.init.normal_(self.project.weight)  # a norm follows: how large it is decides how slowly it turns

    def context(self, patches: Tensor) -> Tensor:
        """What there is to be looked at, the mean over frames: [B, T, N, D] -> [B, N, E]."""
        return self.norm(self.project(self.norm_patches(patches)).mean(dim=1))

    def forward(self, names: Tensor, context: Tensor) -> Tensor:
        """[K, E] and [B, N, E] -> [B, K, E]."""
        x = names.expand(len(context), -1, -1)
        for layer in self.layers:
            x = layer(x, context)
        return names + self.alpha * x


class PromptLayer(nn.Module):
    """Attention from names to a video and an MLP, each behind a norm and beside a residual.

    Args:
        dim, heads: of the layer.
        activation: of the MLP.
    """

    def __init__(self, dim: int, heads: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, act_layer=activation)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, K, E] and [B, N, E] -> [B, K, E]."""
        x = x + self.attention(self.norm1(x), self.attention.keys_values(context))
        return x + self.mlp(self.norm2(x))


@full_precision
def cosines(video: Tensor, names: Tensor) -> Tensor:
    """Of unit vectors, one a video and K names for each: [B, E] and [B, K, E] -> [B, K]."""
    return torch.einsum("be,bke->bk", video, names)


@torch.no_grad()
def small_linear_layers(module: nn.Module) -> None:
    """The linear layers within begin at a standard deviation of 0.02, without bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
