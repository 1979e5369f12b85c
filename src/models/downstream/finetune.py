"""Fine-tuning of a whole pretrained backbone for classification."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from functools import partial

import torch
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.nn import functional as F

from src.collectives import rank
from src.datamodules.batches.image import ImageBatch
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, mean_patch
from src.models.downstream.classifier import Classifier, truncated_normal
from src.models.downstream.mixing import mix
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe, Rule, layer_decay_rules


class FineTune(Classifier):
    """The fine-tuning of Masked Autoencoders Are Scalable Vision Learners (He et al., 2021). Deviations: none.

    On the mean of the patches stands a fresh norm (timm's ``fc_norm``, by ``global_pool="avg"`` in the backbone) in the
    place of the final one. The learning rate falls by ``layer_decay`` from each layer to the one below it. Visualizations and
    labels of a batch are mixed with its reverse, by mixup or cutmix, one or the other with equal odds.

    Args:
        backbone: a timm model; its classifier is replaced.
        optimizer: its rules come before those of the layer decay.
        layer_decay: 1 for none.
        mixup, cutmix: parameter of the beta distribution the share is drawn from; 0 for none.
        smoothing: share of a label that goes to all classes alike.
        head_std: of the truncated normal distribution the classifier starts from.
        seed: of the mixing, which is a function of it and the step.
        num_classes: None for as many as the data has.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        layer_decay: float = 0.65,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        smoothing: float = 0.1,
        head_std: float = 2e-5,
        seed: int = 0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(optimizer, num_classes)
        if min(mixup, cutmix) < 0 or not 0 <= smoothing < 1:
            raise ValueError(
                f"FineTune: mixup={mixup}, cutmix={cutmix} >= 0, smoothing={smoothing} in [0, 1) are needed"
            )
        if not 0 < layer_decay <= 1:
            raise ValueError(f"FineTune: layer_decay must lie in (0, 1], got {layer_decay}")
        self.backbone = backbone
        self.layer_decay = layer_decay
        self.mixup, self.cutmix, self.smoothing = mixup, cutmix, smoothing
        self.head_std = head_std
        self.seed = seed

    def make_head(self, num_classes: int) -> None:
        self.backbone.reset_classifier(num_classes)  # type: ignore[operator]
        truncated_normal(self.backbone.get_classifier(), self.head_std)  # type: ignore[operator]

    def training_step(self, batch: ImageBatch, batch_idx: int) -> StepOutput:
        return self.learn(batch["image"], self.labels_of(batch), batch_idx)

    def learn(self, image: Tensor, label: Tensor, batch_idx: int) -> StepOutput:
        """A step on images [B, 3, H, W], or clips [B, T, 3, H, W], and their classes [B]."""
        smoothing = self.smoothing
        if self.mixup or self.cutmix:
            image, label = self.mix(image, label, batch_idx)
            smoothing = 0.0  # the mixed labels are smooth already
        embedding = self.embed(image)
        loss = F.cross_entropy(self.classify(embedding).float(), label, label_smoothing=smoothing)
        return {"loss": loss, "embedding": embedding.detach().float()}

    def mix(self, image: Tensor, label: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Visualizations, or clips, mixed with the batch's reverse, and shares of the classes [B, K].

        Raises:
            BatchError: the batch is odd; its middle image would be mixed with itself.
        """
        return mix(
            image,
            label,
            classes=self.num_classes or 0,
            mixup=self.mixup,
            cutmix=self.cutmix,
            smoothing=self.smoothing,
            place=(self.seed, self.global_step, batch_idx, rank()),
        )

    def embed(self, image: Tensor) -> Tensor:
        """What the classifier sees: [B, D]."""
        features = self.backbone.forward_features(image)  # type: ignore[operator]
        return self.backbone.forward_head(features, pre_logits=True)  # type: ignore[operator]

    def classify(self, embedding: Tensor) -> Tensor:
        return self.backbone.get_classifier()(embedding)  # type: ignore[operator]

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.embed(image))

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": ImageEncoder(self.backbone, pool=self.pool)}

    @property
    def pool(self) -> Pool:
        """What the classifier stands on."""
        norm = getattr(self.backbone, "fc_norm", None)
        return mean_patch if norm is None else partial(_normed_mean, norm)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        rules = [] if self.layer_decay == 1 else layer_rules(self.backbone, self.layer_decay, prefix="backbone.")
        return self.optimizer_recipe.build(self, extra_rules=rules)


def layer_rules(backbone: nn.Module, decay: float, prefix: str = "") -> list[Rule]:
    """Optimizer rules for each layer of a timm model as its ``group_matcher`` counts them: for a ViT tokens, positions
    and patch projection are layer 0, then come the blocks, and what follows them counts as one layer with factor 1.

    What the model itself excepts from weight decay (positions, class token) gets none.
    """
    level_of = group_with_matcher(backbone.named_parameters(), backbone.group_matcher(), reverse=True)  # type: ignore[operator]
    layers: dict[int, list[str]] = defaultdict(list)
    for name, level in level_of.items():
        layers[level].append(name)
    undecayed = set(getattr(backbone, "no_weight_decay", set)())
    patterns = [_exactly(layers[level], prefix) for level in sorted(layers)]
    rules = []
    for level, rule in zip(sorted(layers), layer_decay_rules(patterns, decay), strict=True):
        excepted = [name for name in layers[level] if name in undecayed]
        if excepted:
            rules.append(replace(rule, pattern=_exactly(excepted, prefix), weight_decay=0.0))
        if len(excepted) < len(layers[level]):
            rules.append(rule)
    return rules


def layer_rules_below(backbone: nn.Module, decay: float, prefix: str = "") -> list[Rule]:
    """As `layer_rules`, for a backbone that a head stands on which is no part of it: the head is the layer with factor
    1, and the last layer of the backbone that learns has ``decay``."""
    rules = layer_rules(backbone, decay, prefix=prefix)
    learning = [(prefix + name, each) for name, each in backbone.named_parameters() if each.requires_grad]
    top = max(rule.lr_multiplier for rule in rules if any(rule.matches(*each) for each in learning))
    return [replace(rule, lr_multiplier=rule.lr_multiplier * decay / top) for rule in rules]


def _exactly(names: list[str], prefix: str) -> str:
    return f"^{re.escape(prefix)}(?:{'|'.join(map(re.escape, names))})$"


def _normed_mean(norm: nn.Module, prefix: Tensor, patches: Tensor) -> Tensor:
    return norm(mean_patch(prefix, patches))
