"""SwAV: predict from one crop the prototype assignment (code) of another crop of the same image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from src.collectives import reduce_sum, world_size
from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, mean_patch
from src.models.backbones.positions import accept_any_image_size
from src.models.functional import feature_std, in_full_precision, l2_normalize
from src.models.heads.mlp import MlpHead
from src.models.joint_embedding.base import JointEmbedding, forward_views_jointly
from src.models.joint_embedding.queue import FeatureQueue
from src.models.losses.distillation import effective_prototypes, entropy
from src.models.losses.swapped import check_sample_count, sinkhorn, swapped_prediction
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe

CODE_CROPS = 2


class SwAV(JointEmbedding):
    """Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (Caron et al., 2020).

    The two global crops are assigned to prototypes, balanced over the images of all processes; every crop predicts the
    codes of the others. Local crops predict codes and are not assigned. The recipe freezes the prototypes for the first
    steps (`FreezeAtFirst`).

    With gradient accumulation an assignment is over a micro-batch, not over the step's whole batch, so four
    micro-batches do not equal one batch; the queue of earlier features makes up for it. All micro-batches of a step see
    the same queue, and their images are enqueued together after the step.

    Deviations: the queue is filled from the first step on, so that it is full when it comes into use; the authors begin
    to fill it when it comes into use, and wait some 15 steps.

    Args:
        backbone: any timm model without a head.
        optimizer: SGD with a trust ratio for every tensor (`larc`) in the paper.
        prototypes: K, number of prototypes.
        hidden_dim: width of the projector's hidden layer; None for that of the backbone's features.
        projection_dim: width of what is compared with the prototypes.
        eps: smoothness of the codes.
        iterations: iterations of Sinkhorn-Knopp; 0 for a softmax, which does not prevent collapse.
        temperature: the predictions' scores are divided by it.
        queue_size: number of earlier images in the assignments, a multiple of the batch size; 0 for no queue.
        use_queue: the assignments use the queue once it is full. ``schedules.use_queue`` sets it after a warm-up.
        pool: makes the embedding, which is projected and evaluated, of the backbone's tokens.

    Raises:
        SettingError: a bad value; in a step, not two global crops, or more prototypes than images to assign to them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerRecipe,
        *,
        prototypes: int = 3000,
        hidden_dim: int | None = None,
        projection_dim: int = 128,
        eps: float = 0.05,
        iterations: int = 3,
        temperature: float = 0.1,
        queue_size: int = 0,
        use_queue: bool = True,
        pool: Pool = mean_patch,
    ) -> None:
        super().__init__(optimizer)
        if min(eps, temperature) <= 0:
            raise SettingError(f"model.eps={eps} and model.temperature={temperature} must be above 0")
        if prototypes < 1 or iterations < 0 or queue_size < 0:
            raise SettingError(
                f"model.prototypes={prototypes} must be at least 1, model.iterations={iterations} and "
                f"model.queue_size={queue_size} must not be negative"
            )
        self.eps = eps
        self.iterations = iterations
        self.temperature = temperature
        self.use_queue = use_queue
        self.encoder = ImageEncoder(accept_any_image_size(backbone), pool)
        width = self.encoder.dim
        self.projector = MlpHead((width, hidden_dim or width, projection_dim), hidden_bias=True)
        self.prototypes = nn.Linear(projection_dim, prototypes, bias=False)
        # a row holds the projections of both code crops of an image
        self.queue = FeatureQueue(CODE_CROPS * projection_dim, queue_size) if queue_size else None

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        crops = self.crops(batch)
        with torch.no_grad():
            self.prototypes.weight.copy_(normalize(self.prototypes.weight, dim=1))
        h = torch.cat([forward_views_jointly(lambda x: self.encoder(x).embedding, x) for x in crops], dim=1)
        z = l2_normalize(forward_views_jointly(self.projector, h))
        scores = self.scores(z)
        codes = self.assign(scores[:, :CODE_CROPS].detach())
        loss = swapped_prediction(codes, scores, self.temperature)
        if self.queue is not None:
            self.queue.stage(z[:, :CODE_CROPS].flatten(1))
        predictions = (scores.detach() / self.temperature).softmax(dim=-1)
        logs = {
            "effective_prototypes": effective_prototypes(mean_over_images(codes)),
            "effective_predictions": effective_prototypes(mean_over_images(predictions)),
            "code_entropy": entropy(codes),
            "std": feature_std(z),
        }
        return {"loss": loss, "logs": logs, "embedding": h[:, 0].detach().float()}

    def crops(self, batch: MultiViewBatch) -> list[Tensor]:
        """The two global crops, and the local crops if there are any: [B, V, 3, H, W] of each size."""
        views = batch["views"]
        if views.shape[1] != CODE_CROPS:
            raise SettingError(
                f"data.train_view: SwAV assigns {CODE_CROPS} views of an image, but the batch has {views.shape[1]} in "
                "train_view.views (further ones belong in train_view.local_views)"
            )
        queued = self.queue.size if self.queue is not None else 0
        check_sample_count(self.prototypes.out_features, len(views) * world_size() + queued)
        return [views, batch["local_views"]] if "local_views" in batch else [views]

    def scores(self, z: Tensor) -> Tensor:
        """Cosines with the prototypes, in float32 at least: [..., D] -> [..., K]."""
        return in_full_precision(self.prototypes, z)

    @torch.no_grad()
    def assign(self, scores: Tensor) -> Tensor:
        """Codes of each code crop, balanced over the images of all processes and the queue: [B, 2, K] -> [B, 2, K]."""
        images = len(scores)
        if self.queue is not None and self.use_queue and self.queue.full:
            queued = self.scores(self.queue.local_part().unflatten(1, (CODE_CROPS, -1)))
            scores = torch.cat([queued, scores])
        codes = [
            sinkhorn(scores_of_crop, eps=self.eps, iterations=self.iterations, reduce=reduce_sum)
            for scores_of_crop in scores.unbind(dim=1)
        ]
        return torch.stack(codes, dim=1)[-images:]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.queue is not None:
            self.queue.enqueue()

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": self.encoder}


def mean_over_images(distributions: Tensor) -> Tensor:
    """Mean over crops and the images of all processes: [B, V, K] -> [K]."""
    return reduce_sum(distributions.mean(dim=(0, 1))) / world_size()
