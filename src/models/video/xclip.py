"""X-CLIP: CLIP for videos, with cross-frame attention and class names adapted to the video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from src.collectives import rank
from src.datamodules.batches.base import labels_of
from src.datamodules.batches.video import VideoBatch
from src.datamodules.text.tokenizer import Tokenizer
from src.errors import SettingError
from src.models.backbones.cross_frame_encoder import CrossFrameEncoder
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import cls_token
from src.models.functional import at_least_float32, full_precision, l2_normalize
from src.models.image_text.base import ImageTextModule
from src.models.layers.mixing import mix
from src.models.layers.multiframe_integration import MultiframeIntegration
from src.models.layers.video_prompts import VideoPrompts
from src.models.pretrain_module import StepOutput
from src.models.text.text_tower import TextTower
from src.optim import OptimizerRecipe, Rule

_PROMPTS_AT_ONCE = 2**13  # pairs of a video and a class whose prompts are in memory at a time


class VideoFeatures(NamedTuple):
    """Encoded clips, and the context that class names are adapted by."""

    video: Tensor  # [B, E]
    context: Tensor  # [B, N, E]


class XCLIP(ImageTextModule):
    """Expanding Language-Image Pretrained Models for General Video Recognition (Ni et al., 2022): a video is classified
    by its similarity with the names of the classes. Deviations: the clips of a batch are mixed with the reversed batch,
    and the colors of a clip change alike in all frames, where the authors draw both at random. The recipe's rates come
    a step earlier than theirs.

    Args:
        backbone: a timm ViT with a class token and no head.
        text: the text tower.
        optimizer: AdamW with betas (0.9, 0.98) in the paper.
        frames: number of frames in a clip.
        embed_dim: width of the compared features, as in the CLIP run it starts from (``checkpoint``).
        temperature: initial temperature, where it starts from no run.
        template: prompt of a class, with one ``{}`` for its name; the authors use the name alone. None for the data's
            own.
        freeze_text: keeps the text tower, its projection and the logit scale as they are; each name is encoded once.
        cross_frame_attention: frames exchange information in every block; False encodes each frame on its own.
        integration_depth: number of blocks that integrate the frames' features; 0 for their mean.
        prompt_depth: number of layers that adapt the names to the video; 0 for names as they are.
        alpha: initial weight of the adaptation, for each dimension.
        heads: of these blocks and layers; None for embed_dim / 64, as in CLIP.
        new_lr_multiplier: factor on the learning rate of all parameters that CLIP does not have.
        mixup, cutmix, smoothing: see `mix`; 0 for none.
        seed: of the mixing.

    Raises:
        SettingError: the backbone has no class token, or a number is out of range; when training starts, the data does
            not name its classes; in a step, clips have another number of frames.
    """

    starts_from_towers = True
    image_encoder: CrossFrameEncoder
    class_text: Tensor  # int64 [K, L], token ids of the names of the training classes
    class_mask: Tensor  # bool [K, L], False for padding
    label_to_class: Tensor  # int64, row in class_text of each label; -1 for classes held out of training

    def __init__(
        self,
        backbone: VisionTransformer,
        text: TextTower,
        optimizer: OptimizerRecipe,
        *,
        frames: int = 8,
        embed_dim: int = 512,
        temperature: float = 0.07,
        template: str | None = "{}",
        freeze_text: bool = True,
        cross_frame_attention: bool = True,
        integration_depth: int = 1,
        prompt_depth: int = 2,
        alpha: float = 0.1,
        heads: int | None = None,
        new_lr_multiplier: float = 10.0,
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
            raise SettingError(f"model.smoothing must be at least 0 and below 1, got {smoothing}")
        if template is not None and template.count("{}") != 1:
            raise SettingError(f"model.template must have one {{}} for the name of the class, got '{template}'")
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)))
        # everything below is new: the start does not have it
        heads = heads or max(1, embed_dim // 64)
        self.image_encoder = CrossFrameEncoder(backbone, cross_frame_attention=cross_frame_attention)
        block: Any = backbone.blocks[0]
        options: dict[str, Any] = {"heads": heads, "activation": type(block.mlp.act)}
        self.integration = (
            MultiframeIntegration(frames, embed_dim, depth=integration_depth, **options) if integration_depth else None
        )
        self.prompts = (
            VideoPrompts(backbone.embed_dim, embed_dim, depth=prompt_depth, alpha=alpha, **options)
            if prompt_depth
            else None
        )
        if freeze_text:
            self.text_projection.requires_grad_(False)
            self.logit_scale.requires_grad_(False)
        self.frames = frames
        self.template = template
        self.new_lr_multiplier = new_lr_multiplier
        self.mixup, self.cutmix, self.smoothing, self.seed = mixup, cutmix, smoothing, seed
        for name in ("class_text", "class_mask", "label_to_class"):
            self.register_buffer(name, None, persistent=False)
        self._class_features: Tensor | None = None

    def training_step(self, batch: VideoBatch, batch_idx: int) -> StepOutput:
        video, target = batch["video"], self.label_to_class[labels_of(batch, "X-CLIP")]
        smoothing = self.smoothing
        if self.mixup or self.cutmix:
            video, target = mix(
                video,
                target,
                classes=len(self.class_text),
                mixup=self.mixup,
                cutmix=self.cutmix,
                smoothing=smoothing,
                seeds=(self.seed, self.global_step, batch_idx, rank()),
            )
            smoothing = 0.0  # the mixed targets are smoothed already

        tokens = self.image_encoder.tokens(video)
        similarity = self.similarity(self.video_and_context(tokens), self.class_features())
        loss = F.cross_entropy(self.logit_scale.exp() * similarity, target, label_smoothing=smoothing)
        logs = {} if self.prompts is None else {"alpha": self.prompts.alpha.detach().mean()}
        return {"loss": loss, "logs": logs, "embedding": self.image_encoder.embedding(tokens).detach().float()}

    def video_and_context(self, tokens: Tensor) -> VideoFeatures | Tensor:
        """Computes each video's feature and the N context tokens that names attend to, from [B, T, P + N, D]; without
        prompts the feature alone, [B, E].

        Raises:
            SettingError: clips of another number of frames.
        """
        if self.integration is not None and tokens.shape[1] != self.frames:
            raise SettingError(
                f"data.train_view.clip.frames={tokens.shape[1]} and model.frames={self.frames} must be equal"
            )
        frames = self.image_projection(self.image_encoder.frame_features(tokens))
        video = frames.mean(dim=1) if self.integration is None else self.integration(frames)
        if self.prompts is None:
            return video
        return VideoFeatures(video, self.prompts.context(self.image_encoder.patch_tokens(tokens)))

    def similarity(self, query: VideoFeatures | Tensor, keys: VideoFeatures | Tensor) -> Tensor:
        """Computes the cosine similarity of each video with each name adapted to it: Q videos and text features [K, E],
        or the other way round, to [Q, K]."""
        if isinstance(keys, VideoFeatures):
            return self.similarity(keys, query).T
        if not isinstance(query, VideoFeatures):
            return _cosine(l2_normalize(query), l2_normalize(keys).expand(len(query), -1, -1))
        assert self.prompts is not None
        keys = keys.to(self.prompts.alpha.dtype)  # stored features are float32, weights may be in half precision
        size = max(1, _PROMPTS_AT_ONCE // len(keys))
        return torch.cat(
            [
                _cosine(l2_normalize(video), l2_normalize(self.prompts(keys, context)))
                for video, context in zip(query.video.split(size), query.context.split(size), strict=True)
            ]
        )

    def encode_image(self, image: Tensor) -> VideoFeatures | Tensor:  # type: ignore[override]
        """Encodes clips for `similarity`, [B, T, 3, H, W], see `video_and_context`."""
        return self.video_and_context(self.image_encoder.tokens(image))

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor:
        """Encodes token ids [B, L] for `similarity`: [B, E], not normalized."""
        return self.text_projection(self.text_features(text, mask))

    def class_features(self) -> Tensor:
        """Returns the text features of the class names: [K, E]. A frozen text tower encodes them once."""
        if not self.frozen["text_encoder"]:
            return self.encode_text(self.class_text, self.class_mask)
        if self._class_features is None:
            with torch.no_grad():
                self._class_features = at_least_float32(self.encode_text(self.class_text, self.class_mask))
        return self._class_features

    def set_classes(self, tokenizer: Tokenizer, texts: Sequence[str], held_out: Sequence[int] = ()) -> None:
        """Sets the classes to train on.

        Args:
            texts: prompt of each class, by label.
            held_out: labels of classes that are left out of training.
        """
        labels = [label for label in range(len(texts)) if label not in held_out]
        ids, mask = tokenizer([texts[label] for label in labels])
        self.class_text, self.class_mask = ids.to(self.device), mask.to(self.device)
        self.label_to_class = torch.full((len(texts),), -1, device=self.device)
        self.label_to_class[labels] = torch.arange(len(labels), device=self.device)
        self._class_features = None

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": self.image_encoder}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        new = "^(?:image_encoder.cross_frame_attention|integration|prompts)[.]"
        rules = [
            Rule(f"{new}positions$", lr_multiplier=self.new_lr_multiplier, weight_decay=0.0),
            Rule(new, lr_multiplier=self.new_lr_multiplier),
        ]
        parameters = list(self.named_parameters())
        used = [rule for rule in rules if any(rule.matches(name, parameter) for name, parameter in parameters)]
        return self.optimizer_recipe.build(self, used)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.set_classes(datamodule.tokenizer, datamodule.class_texts(self.template), datamodule.held_out)


@full_precision
def _cosine(video: Tensor, text: Tensor) -> Tensor:
    """Multiplies unit vectors, one a video and K texts for each video: [B, E] and [B, K, E] -> [B, K]."""
    return torch.einsum("be,bke->bk", video, text)
