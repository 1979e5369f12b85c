"""SwAV: predict from one crop which prototypes another crop of the same image was assigned to."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from src.collectives import reduce_sum, world_size
from src.datamodules.batches.image import MultiViewBatch
from src.errors import SettingError
from src.models.backbones.encoder import Encoder
from src.models.backbones.image_encoder import ImageEncoder, Pool, mean_patch
from src.models.backbones.positions import any_size
from src.models.functional import feature_std, full_precision, l2_normalize
from src.models.heads.mlp import MlpHead
from src.models.joint_embedding.base import JointEmbedding, forward_views_jointly
from src.models.joint_embedding.queue import FeatureQueue
from src.models.losses.distillation import effective_prototypes, entropy
from src.models.losses.swapped import check_too_few_samples, sinkhorn, swapped_prediction
from src.models.pretrain_module import StepOutput
from src.optim import OptimizerRecipe

CODE_CROPS = 2


class SwAV(JointEmbedding):
    """Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (Caron et al., 2020).

    The two large crops are assigned to prototypes, equally over the images of all processes; every crop predicts the
    codes of the others. Small crops are predicted from, and never assigned. The recipe leaves the prototypes where they
    are for the first steps (`FreezeAtFirst`).

    Where gradients are accumulated, an assignment is over a micro-batch, not over the step's whole batch: four
    micro-batches are not one, by design. The features queued in earlier steps make up for it. What holds whatever the
    number of micro-batches: all of a step see the same queue, which moves once a step, by the step's images.

    Deviations: the queue is filled from the first step on, so that it is full when it comes into use; the authors begin
    to fill it then, some 15 steps before.

    Args:
        backbone: any timm model without a head.
        optimizer: in the paper SGD with a trust ratio for every tensor (`larc`).
        prototypes: K.
        hidden_dim: of the projector; None for as wide as the backbone's features.
        projection_dim: width of what is compared with the prototypes.
        eps: smoothness of the codes.
        iterations: of Sinkhorn-Knopp. 0: codes are a softmax, which nothing keeps from being all the same.
        temperature: of the predictions.
        queue_size: images whose features take part in the assignments, a multiple of those of a step; 0 for no queue.
        use_queue: whether a full queue takes part; ``schedules.use_queue`` says from when on.
        pool: what of the backbone's tokens is projected and evaluated.

    Raises:
        SettingError: in a step, where there are not two views besides the local ones, or more prototypes than images
            to assign to them.
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
            raise ValueError(f"SwAV: eps and temperature must be above 0, got {eps} and {temperature}")
        if prototypes < 1 or iterations < 0 or queue_size < 0:
            raise ValueError(
                "SwAV: there must be prototypes, and neither iterations nor queue_size may be negative; "
                f"got {prototypes}, {iterations} and {queue_size}"
            )
        self.eps = eps
        self.iterations = iterations
        self.temperature = temperature
        self.use_queue = use_queue
        self.encoder = ImageEncoder(any_size(backbone), pool)
        width = self.encoder.dim
        self.projector = MlpHead((width, hidden_dim or width, projection_dim), hidden_bias=True)
        self.prototypes = nn.Linear(projection_dim, prototypes, bias=False)
        # a row an image: what the code crops were, side by side
        self.queue = FeatureQueue(CODE_CROPS * projection_dim, queue_size) if queue_size else None

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> StepOutput:
        resolutions = self.crops(batch)
        with torch.no_grad():
            self.prototypes.weight.copy_(normalize(self.prototypes.weight, dim=1))
        h = torch.cat(
            [forward_views_jointly(lambda x: self.encoder(x).embedding, crops) for crops in resolutions], dim=1
        )
        z = l2_normalize(forward_views_jointly(self.projector, h))
        scores = self.compare(z).transpose(0, 1)
        codes = self.assign(scores[:CODE_CROPS].detach())
        loss = swapped_prediction(codes, scores, self.temperature)
        if self.queue is not None:
            self.queue.hold(z[:, :CODE_CROPS].flatten(1))
        predicted = (scores.detach() / self.temperature).softmax(dim=-1)
        logs = {
            "effective_prototypes": effective_prototypes(mean_use(codes)),
            "effective_predictions": effective_prototypes(mean_use(predicted)),
            "code_entropy": entropy(codes),
            "std": feature_std(z),
        }
        return {"loss": loss, "logs": logs, "embedding": h[:, 0].detach().float()}

    def crops(self, batch: MultiViewBatch) -> list[Tensor]:
        """[B, V, 3, H, W] of each size: the two code crops, then the local ones if there are any."""
        views = batch["views"]
        if views.shape[1] != CODE_CROPS:
            raise SettingError(
                f"data.train_view: SwAV assigns {CODE_CROPS} views of an image, but the batch has {views.shape[1]} in "
                "train_view.views (further ones belong in train_view.local_views)"
            )
        queued = self.queue.size if self.queue is not None else 0
        check_too_few_samples(self.prototypes.out_features, len(views) * world_size() + queued)
        return [views, batch["local_views"]] if "local_views" in batch else [views]

    def compare(self, z: Tensor) -> Tensor:
        """Cosines with the prototypes, in float32 at least: [..., D] -> [..., K]."""
        return full_precision(self.prototypes)(z)

    @torch.no_grad()
    def assign(self, scores: Tensor) -> Tensor:
        """Balanced codes of each code crop, over the images of all processes and the queue: [2, B, K]."""
        images = scores.shape[1]
        if self.queue is not None and self.use_queue and self.queue.full:
            earlier = self.compare(self.queue.share().unflatten(1, (CODE_CROPS, -1))).transpose(0, 1)
            scores = torch.cat([earlier, scores], dim=1)
        codes = [sinkhorn(each, eps=self.eps, iterations=self.iterations, reduce=reduce_sum) for each in scores]
        return torch.stack(codes)[:, -images:]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.queue is not None:
            self.queue.push()

    def encoders(self) -> dict[str, Encoder]:
        return {"encoder": self.encoder}


def mean_use(distributions: Tensor) -> Tensor:
    """Mean over crops and the images of all processes: [V, B, K] -> [K]."""
    return reduce_sum(distributions.mean(dim=(0, 1))) / world_size()
