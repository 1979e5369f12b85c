"""Fine-tuning of a pretrained backbone for image classification."""

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
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, mean_patch
from src.models.backbones.layout import explained, without_values
from src.models.downstream.classifier import Classifier, truncated_normal
from src.models.layers.mixing import mix
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe, Rule, layer_decay_rules


class FineTune(Classifier):
    """The fine-tuning of Masked Autoencoders Are Scalable Vision Learners (He et al., 2021). Deviations: none.

    The classifier reads the mean of the patch tokens after a new norm (timm's ``fc_norm``, created by
    ``backbone.global_pool="avg"``), which replaces the final norm. Batches are augmented with `mix`.

    Args:
        backbone: a timm model; its classifier is replaced.
        optimizer: its rules come before those of the layer decay.
        layer_decay: factor of the learning rate from each layer to the one below; 1 for none.
        mixup, cutmix, smoothing: see `mix`; label smoothing alone if both are 0.
        head_std: standard deviation of the classifier's initialization, a truncated normal distribution.
        seed: of mixup and cutmix.
        num_classes: number of classes; None for the number of classes in the data.

    Raises:
        SettingError: a value is out of range, or the backbone has no classifier to replace.
    """

    new_parameters = ("fc_norm.",)

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
            raise SettingError(
                "model.mixup and model.cutmix must be at least 0 and model.smoothing in [0, 1), got "
                f"{mixup}, {cutmix} and {smoothing}"
            )
        if not 0 < layer_decay <= 1:
            raise SettingError(f"model.layer_decay must lie in (0, 1], got {layer_decay}")
        check_classifier(backbone)
        if layer_decay != 1 and not callable(getattr(backbone, "group_matcher", None)):
            raise SettingError(
                f"model.layer_decay={layer_decay}: {type(backbone).__name__} does not name its layers (timm's "
                "group_matcher); set it to 1"
            )
        self.backbone = backbone
        self.layer_decay = layer_decay
        self.mixup, self.cutmix, self.smoothing = mixup, cutmix, smoothing
        self.head_std = head_std
        self.seed = seed
        self.encoders()  # refuses a backbone whose features evaluation could not read

    def make_head(self, num_classes: int) -> None:
        self.backbone.reset_classifier(num_classes)  # type: ignore[operator]
        truncated_normal(self.backbone.get_classifier(), self.head_std)  # type: ignore[operator]

    def training_step(self, batch: ImageBatch, batch_idx: int) -> StepOutput:
        return self.learn(batch["image"], self.labels_of(batch), batch_idx)

    def learn(self, image: Tensor, label: Tensor, batch_idx: int) -> StepOutput:
        """The step on images [B, 3, H, W] or clips [B, T, 3, H, W] with class labels [B]."""
        smoothing = self.smoothing
        if self.mixup or self.cutmix:
            image, label = self.mix(image, label, batch_idx)
            smoothing = 0.0  # mix has smoothed the labels
        embedding = self.embed(image)
        loss = F.cross_entropy(self.classify(embedding).float(), label, label_smoothing=smoothing)
        return {"loss": loss, "embedding": embedding.detach().float()}

    def mix(self, image: Tensor, label: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
        """`mix` of images or clips with the step's random numbers.

        Raises:
            BatchError: the batch size is odd.
        """
        return mix(
            image,
            label,
            classes=self.num_classes or 0,
            mixup=self.mixup,
            cutmix=self.cutmix,
            smoothing=self.smoothing,
            seeds=(self.seed, self.global_step, batch_idx, rank()),
        )

    def embed(self, image: Tensor) -> Tensor:
        """The input of the classifier, [B, D]."""
        with explained(self.backbone, image):
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
        """The pooling before the classifier."""
        norm = getattr(self.backbone, "fc_norm", None)
        return mean_patch if norm is None else partial(_normed_mean, norm)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        rules = [] if self.layer_decay == 1 else layer_rules(self.backbone, self.layer_decay, prefix="backbone.")
        return self.optimizer_recipe.build(self, extra_rules=rules)


def check_classifier(backbone: nn.Module) -> None:
    """Checks that ``backbone`` has one linear classifier, which timm's ``reset_classifier`` replaces.

    Raises:
        SettingError: it has none, several, or one of another kind.
    """
    needed = ("forward_features", "forward_head", "get_classifier", "reset_classifier")
    missing = [name for name in needed if not callable(getattr(backbone, name, None))]
    name = type(backbone).__name__
    what = f"backbone.model_name: fine-tuning replaces the linear classifier of a timm model, and {name}"
    if missing:
        raise SettingError(f"{what} has no {', '.join(missing)}")
    network = without_values(backbone)
    network.reset_classifier(2)
    layer = network.get_classifier()
    if not isinstance(layer, nn.Linear):
        kind = f"{len(layer)} of them" if isinstance(layer, tuple | nn.ModuleList) else f"a {type(layer).__name__}"
        raise SettingError(f"{what} has {kind}")


def layer_rules(backbone: nn.Module, decay: float, prefix: str = "", *, decay_tokens: bool = False) -> list[Rule]:
    """Optimizer rules that multiply the learning rate by ``decay`` from each layer to the one below. Layers are those
    of timm's ``group_matcher``: in a ViT, class token, positional embedding and patch embedding are layer 0, the blocks
    follow, and all later parameters are one layer with factor 1.

    Parameters in the model's ``no_weight_decay`` (positional embedding, class token) have no weight decay.

    Args:
        backbone: a timm model.
        decay: factor from a layer to the one below.
        prefix: of the backbone's parameter names in the module that is optimized.
        decay_tokens: weight decay for parameters in ``no_weight_decay`` too, as mmsegmentation has it.
    """
    layer_of = group_with_matcher(backbone.named_parameters(), backbone.group_matcher(), reverse=True)  # type: ignore[operator]
    layers: dict[int, list[str]] = defaultdict(list)
    for name, layer in layer_of.items():
        layers[layer].append(name)
    undecayed = set() if decay_tokens else set(getattr(backbone, "no_weight_decay", set)())
    patterns = [_exactly(layers[layer], prefix) for layer in sorted(layers)]
    rules = []
    for layer, rule in zip(sorted(layers), layer_decay_rules(patterns, decay), strict=True):
        exempt = [name for name in layers[layer] if name in undecayed]
        if exempt:
            rules.append(replace(rule, pattern=_exactly(exempt, prefix), weight_decay=0.0))
        if len(exempt) < len(layers[layer]):
            rules.append(rule)
    return rules


def layer_rules_below(backbone: nn.Module, decay: float, prefix: str = "", *, decay_tokens: bool = False) -> list[Rule]:
    """`layer_rules` for a backbone below a separate head: the head has factor 1, and the last trainable layer of the
    backbone has factor ``decay``."""
    rules = layer_rules(backbone, decay, prefix=prefix, decay_tokens=decay_tokens)
    trainable = [
        (prefix + name, parameter) for name, parameter in backbone.named_parameters() if parameter.requires_grad
    ]
    top = max(rule.lr_multiplier for rule in rules if any(rule.matches(*named) for named in trainable))
    return [replace(rule, lr_multiplier=rule.lr_multiplier * decay / top) for rule in rules]


def _exactly(names: list[str], prefix: str) -> str:
    return f"^{re.escape(prefix)}(?:{'|'.join(map(re.escape, names))})$"


def _normed_mean(norm: nn.Module, prefix: Tensor, patches: Tensor) -> Tensor:
    return norm(mean_patch(prefix, patches))
