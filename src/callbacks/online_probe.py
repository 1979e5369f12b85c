"""A linear probe that is trained along with the encoder, on the embeddings of the training step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.classification import multiclass_accuracy

from src.collectives import gather_rows, rank
from src.errors import SettingError
from src.evaluation.features import FeatureSets
from src.randomness import seeded

log = logging.getLogger(__name__)

_EPS = 1e-6
_UNLABELED = "the data has no labels"


class OnlineProbe(L.Callback):
    """Trains affine-free batch norm and a linear classifier on ``StepOutput["embedding"]``, with an AdamW of their own.

    Embeddings are detached, so the method is trained as without the probe. There is one update for each optimizer step,
    on the rows of all its micro-batches and processes; rows with label -1 are left out. ``eval/probe_train_top1`` is
    the accuracy on training rows before they are learned from, over an epoch; `OnlineEvaluation` evaluates the probe on
    its queries (``eval/probe_top1``), whose embeddings come from the method's first encoder.

    The state of the callback is complete: a resumed run continues with the same bits.

    Args:
        lr, weight_decay: of AdamW, constant, since the features keep changing.
        seed: of the initial weights.
    """

    def __init__(self, *, lr: float = 1e-3, weight_decay: float = 1e-4, seed: int = 0) -> None:
        self.lr = lr
        self.weight_decay = weight_decay
        self.seed = seed
        self._probe: _Probe | None = None
        self._restored: Mapping[str, Any] | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._stepped_at = 0
        self._warned = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stepped_at = trainer.global_step
        self._waiting = []
        if self._restored is not None and self._probe is None:
            # not with the next batch: a run that is resumed after the last step of an epoch evaluates first
            classes, dim = self._restored["linear"]["weight"].shape
            self._make_probe(dim, classes, pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        classes = len(trainer.datamodule.classes)  # type: ignore[attr-defined]
        if "embedding" not in outputs or "label" not in batch or classes == 0:
            self._warn("the method returns no embedding" if classes and "embedding" not in outputs else _UNLABELED)
            return
        embedding, label = outputs["embedding"].detach().float(), batch["label"]
        if embedding.ndim != 2 or len(embedding) != len(label):
            raise SettingError(
                f"the step's embedding must be [B, D] with one row for each of the {len(label)} labels, "
                f"got {list(embedding.shape)}"
            )
        self._waiting.append((embedding, label))
        if trainer.global_step == self._stepped_at:
            return
        self._stepped_at = trainer.global_step
        embeddings, labels = (gather_rows(torch.cat(parts)) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        self._learner(embeddings, classes).learn(embeddings[labels >= 0], labels[labels >= 0])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._probe is None or not self._probe.seen:
            return
        accuracy = self._probe.accuracy.compute()
        self._probe.accuracy.reset()
        self._probe.seen = 0
        pl_module.log("eval/probe_train_top1", accuracy, batch_size=1, sync_dist=True)

    @torch.no_grad()
    def score(self, sets: FeatureSets, device: torch.device) -> dict[str, float]:
        """Returns top-1 on the queries; nothing before the first update.

        Raises:
            SettingError: the width of the queries' features is not that of the embeddings of training.
        """
        if self._probe is None:
            return {}
        features, labels = sets.query.features, sets.query.labels
        if features.shape[1] != self._probe.linear.in_features:
            raise SettingError(
                f"OnlineProbe learned from embeddings of width {self._probe.linear.in_features}, but the first encoder "
                f"gives {features.shape[1]}: the step's embedding must be what that encoder gives"
            )
        predicted = torch.cat([self._probe.predict(part.to(device)).cpu() for part in features.split(8192)])
        classes = max(sets.classes, self._probe.linear.out_features)
        accuracy = multiclass_accuracy(predicted, labels, num_classes=classes, average="micro", validate_args=False)
        return {"probe_top1": accuracy.item()}

    def state_dict(self) -> dict[str, Any]:
        if self._probe is None:
            return dict(self._restored or {})
        return self._probe.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # the probe is made when training starts, on its device
        self._restored = state_dict or None
        self._probe = None

    def _learner(self, embeddings: Tensor, classes: int) -> _Probe:
        return self._probe or self._make_probe(embeddings.shape[1], classes, embeddings.device)

    def _make_probe(self, dim: int, classes: int, device: torch.device) -> _Probe:
        with seeded(self.seed):
            self._probe = _Probe(dim, classes, lr=self.lr, weight_decay=self.weight_decay)
        self._probe.to(device)
        if self._restored is not None:
            self._probe.restore(self._restored)
        return self._probe

    def _warn(self, reason: str) -> None:
        if not self._warned and rank() == 0:
            log.warning("%s: no online probe", reason)
        self._warned = True


class _Probe:
    """Classifier, optimizer and accuracy over the epoch."""

    def __init__(self, dim: int, classes: int, *, lr: float, weight_decay: float) -> None:
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=_EPS)
        self.linear = nn.Linear(dim, classes)
        self.accuracy = MulticlassAccuracy(classes, average="micro", validate_args=False, sync_on_compute=False)
        self.accuracy.persistent(True)
        self.seen = 0
        self.lr, self.weight_decay = lr, weight_decay
        self._make_optimizer()

    def to(self, device: torch.device) -> None:
        for module in (self.norm, self.linear, self.accuracy):
            module.to(device)
        self._make_optimizer()

    @torch.no_grad()
    def learn(self, embeddings: Tensor, labels: Tensor) -> None:
        """Makes one update from embeddings [n, D], float32, and labels [n]; none from fewer than two rows, which batch
        norm cannot normalize."""
        if len(labels) < 2:
            return
        x = self.norm.train()(embeddings)
        logits = self.linear(x)
        self.accuracy.update(logits.argmax(dim=1), labels)
        self.seen += len(labels)
        # the gradient of the mean cross-entropy in closed form, as autograd would cost more at every step
        error = F.softmax(logits, dim=1)
        error[torch.arange(len(labels), device=labels.device), labels] -= 1
        error /= len(labels)
        self.linear.weight.grad = error.T @ x
        self.linear.bias.grad = error.sum(dim=0)
        self.optimizer.step()

    def predict(self, embeddings: Tensor) -> Tensor:
        """Predicts classes [n]."""
        return self.linear(self.norm.eval()(embeddings.float())).argmax(dim=1)

    def state(self) -> dict[str, Any]:
        return {
            "norm": self.norm.state_dict(),
            "linear": self.linear.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "accuracy": self.accuracy.state_dict(),
            "seen": self.seen,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.norm.load_state_dict(state["norm"])
        self.linear.load_state_dict(state["linear"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["seen"]:
            self.accuracy.load_state_dict(state["accuracy"])
        self.seen = state["seen"]

    def _make_optimizer(self) -> None:
        self.optimizer = torch.optim.AdamW(self.linear.parameters(), lr=self.lr, weight_decay=self.weight_decay)
