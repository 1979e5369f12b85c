"""SwALIP: each modality predicts how the embeddings of the other modality are assigned in another view."""

from __future__ import annotations

from torch import Tensor

from src.collectives import gather, reduce_sum
from src.errors import SettingError
from src.models.functional import full_precision
from src.models.image_text.clip_rocket import AddedObjective, PairViews
from src.models.losses.row_chunks import MAX_ENTRIES, in_row_chunks
from src.models.losses.swapped import sinkhorn


class SwALIP(AddedObjective):
    """SwALIP, SwAV between images and texts (Fini et al., 2023): the batch's embeddings of the other modality are the
    prototypes. Deviations: none.

    Args:
        image_dim, text_dim: widths of the towers' features, which it does not use: it compares the embeddings of the
            strong views' heads.
        eps: smoothness of the assignments.
        iterations: of Sinkhorn-Knopp.
        weight: of this loss.

    Raises:
        SettingError: ``eps`` is not positive or ``weight`` negative; in a step, other than two strong views.
    """

    def __init__(
        self, image_dim: int, text_dim: int, *, eps: float = 0.05, iterations: int = 3, weight: float = 0.2
    ) -> None:
        super().__init__()
        if eps <= 0 or weight < 0:
            raise SettingError(f"model.objective: eps={eps} must be above 0, weight={weight} at least 0")
        self.eps, self.iterations, self.weight = eps, iterations, weight

    def forward(self, features: PairViews, embeddings: PairViews, local_scale: Tensor) -> Tensor:
        images, texts = embeddings.images, embeddings.texts
        if images.shape[1] != 2:
            raise SettingError(
                f"data.train_view: SwALIP swaps two strong views of each image and text, got {images.shape[1]}"
            )
        all_images, all_texts = gather(images)[0], gather(texts)[0]
        loss = self._direction(images, all_texts, local_scale) + self._direction(texts, all_images, local_scale)
        return self.weight * loss / 2

    def _direction(self, queries: Tensor, prototypes: Tensor, logit_scale: Tensor) -> Tensor:
        """Mean over the four combinations of a view of the queries with one of the prototypes, [B, 2, E] and
        [N, 2, E]: each predicts the assignment of the other view's queries to the other view's prototypes."""
        total = queries.new_zeros(())
        for view in range(2):
            for prototype_view in range(2):
                codes = assignment(
                    queries[:, 1 - view], prototypes[:, 1 - prototype_view], eps=self.eps, iterations=self.iterations
                )
                total = total + assignment_cross_entropy(
                    queries[:, view], prototypes[:, prototype_view], codes, logit_scale=logit_scale
                )
        return total / 4


@full_precision
def assignment(queries: Tensor, prototypes: Tensor, *, eps: float, iterations: int) -> Tensor:
    """Assigns the queries of all processes evenly to the prototypes, without gradient: [B, D], [N, D] -> [B, N]."""
    similarity = queries.detach() @ prototypes.detach().T
    return sinkhorn(similarity, eps=eps, iterations=iterations, reduce=reduce_sum)


@full_precision
def assignment_cross_entropy(
    queries: Tensor, prototypes: Tensor, codes: Tensor, *, logit_scale: Tensor, max_entries: int = MAX_ENTRIES
) -> Tensor:
    """Mean cross-entropy of codes [B, N] and the softmax of the scaled similarities of queries [B, D] with prototypes
    [N, D]."""

    def cross_entropy(queries: Tensor, codes: Tensor, prototypes: Tensor, logit_scale: Tensor) -> Tensor:
        return -(codes * (logit_scale * queries @ prototypes.T).log_softmax(dim=1)).sum(dim=1)

    rows, shared = [queries, codes], [prototypes, logit_scale]
    return in_row_chunks(cross_entropy, rows, shared, columns=len(prototypes), max_entries=max_entries).mean()
