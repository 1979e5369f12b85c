"""A method with two towers, judged: classes by their names, and what belongs together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from src.collectives import gather_rows
from src.datamodules.batches.base import mean_of_samples, optional_labels
from src.datamodules.datamodule import DataModule
from src.datamodules.extras.captions import CaptionedSource
from src.datamodules.sources.source import Split
from src.errors import SettingError
from src.evaluation.features import autocast
from src.evaluation.geometry import geometry
from src.evaluation.hard_negatives import HardNegativeSource, preference
from src.evaluation.retrieval import retrieval
from src.evaluation.run import exact_products, readable
from src.evaluation.similarity import CustomSimilarity, Similarity, dot, pairwise, similarity_of
from src.evaluation.zero_shot import PHOTOS, class_scores, classifier, within
from src.models.functional import inference
from src.randomness import seeded

_TEXTS = 256  # a forward pass


@runtime_checkable
class TwoTowers(Protocol):
    """What a method must answer to be judged here; both give unit vectors of one width, unless the method is
    `CustomSimilarity` and says itself how what they give is compared."""

    def encode_image(self, image: Tensor) -> Tensor: ...

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ImageTextEvaluation:
    """Zero-shot classification by ``templates`` and retrieval among the same images.

    Reports ``zeroshot_top1`` and, of more than five classes, ``zeroshot_top5`` where there are labels, and beside the
    ensemble ``zeroshot_single_top1``. Where training has gone without some classes, ``zeroshot_unseen_top1`` is of
    their images, among their names, and ``zeroshot_seen_top1`` the same of the other classes.

    Where the source has texts for judging, ``retrieval_i2t_r1`` … ``retrieval_rsum`` are by these;
    ``hardnegatives_<kind>`` where it also has mistaken ones (see `preference`); ``gap``, the distance between the mean
    image and the mean text, and ``geometry_<name>`` (see `geometry`) are of each image with its first text.

    A method that is `CustomSimilarity` has neither gap nor geometry, and its templates are averaged as scores and not as
    vectors. Images may be videos, of which several clips' scores are averaged.

    Args:
        templates: prompts of a class, each with one ``{}``; None for the data's own, or those of natural images.
        single: the prompt that is judged alone; None alike.
        samples: images at most, a fixed random choice; None for all.
        negatives: so many of these, evenly chosen, are compared with mistaken texts too; None for all.
        split: "val" or "test".
    """

    templates: Sequence[str] | None = None
    single: str | None = None
    samples: int | None = 5000
    negatives: int | None = 1000
    split: Split = "val"

    def __call__(
        self, module: nn.Module, datamodule: DataModule, device: torch.device, *, precision: str = "32-true"
    ) -> dict[str, float]:
        """
        Args:
            module: has `TwoTowers`' methods; left in the modes it was in.

        Raises:
            SettingError: the module has not.
        """
        if not isinstance(module, TwoTowers):
            raise SettingError(
                f"pictures and texts are judged of a method with a text tower, which {type(module).__name__} is not"
            )
        towers: TwoTowers = module
        similarity = similarity_of(module)

        def encode(texts: Sequence[str]) -> Tensor:
            parts = []
            for start in range(0, len(texts), _TEXTS):
                ids, mask = datamodule.tokenizer(texts[start : start + _TEXTS])
                parts.append(towers.encode_text(ids.to(device), mask.to(device)).float())
            return torch.cat(parts)

        with seeded(0), inference(module), autocast(precision, device):
            images, labels, index = self._images(towers, datamodule, device)
            source = datamodule.test_source if self.split == "test" else datamodule.val_source
            scores: dict[str, float] = {}
            told = isinstance(source, CaptionedSource)
            if isinstance(source, CaptionedSource):
                texts = [source.captions(position) for position in index.tolist()]
                text = encode([text for each in texts for text in each])
                owner = torch.tensor([row for row, each in enumerate(texts) for _ in each], device=device)
                scores |= {
                    f"retrieval_{name}": value
                    for name, value in retrieval(images, text, owner, similarity=similarity).items()
                }
                if not isinstance(module, CustomSimilarity):
                    scores["gap"] = (images.mean(dim=0) - text.mean(dim=0)).norm().item()
            known = labels >= 0
            if len(datamodule.classes) and bool(known.any()):
                prompts = source.prompts or PHOTOS

                def fit(templates: Sequence[str]) -> tuple[Tensor, Tensor]:
                    if isinstance(module, CustomSimilarity):
                        each = class_scores(images[known], datamodule.classes, encode, similarity, templates)
                    else:
                        each = dot(images[known], classifier(datamodule.classes, encode, templates))
                    mean, first = mean_of_samples(each, index[known])  # over the clips of a video
                    return mean, labels[known][first]

                ensemble, label = fit(self.templates or prompts.templates)
                scores["zeroshot_top1"] = within(ensemble, label)
                if ensemble.shape[1] > 5:
                    scores["zeroshot_top5"] = within(ensemble, label, k=5)
                if len(source.held_out):
                    scores |= _apart(ensemble, label, source.held_out)
                scores["zeroshot_single_top1"] = within(*fit([self.single or prompts.single]))
            if isinstance(source, HardNegativeSource):
                scores |= self._hard_negatives(images, index, source, encode, similarity)
        if told and len(images) > 1 and not isinstance(module, CustomSimilarity):
            first = [0, *accumulate(map(len, texts))][:-1]
            with exact_products():
                scores |= {f"geometry_{name}": value for name, value in geometry(images, text[first]).items()}
        return scores

    def _hard_negatives(
        self,
        images: Tensor,
        index: Tensor,
        source: HardNegativeSource,
        encode: Callable[[Sequence[str]], Tensor],
        similarity: Similarity,
    ) -> dict[str, float]:
        """The right texts against the mistaken ones: of encoded images at ``index`` [N]."""
        count = min(len(index), self.negatives or len(index))
        rows = [place * len(index) // count for place in range(count)]
        found = [(row, each) for row in rows for each in source.mistakes(int(index[row]))]
        if not found:
            return {}
        own = images[[row for row, _ in found]]
        right, wrong = (
            pairwise(similarity, own, encode(texts))
            for texts in ([each.right for _, each in found], [each.wrong for _, each in found])
        )
        by_kind = preference(right, wrong, [each.kind for _, each in found])
        return {f"hardnegatives_{kind}": value for kind, value in by_kind.items()}

    def _images(
        self, towers: TwoTowers, datamodule: DataModule, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors, labels and positions in the source of every image that could be read, in the source's order."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for batch in readable(datamodule, self.split, self.samples, device):
            vectors = towers.encode_image(batch[datamodule.input_key]).float()
            found.append((vectors, optional_labels(batch), batch["index"]))
        images, labels, index = (gather_rows(torch.cat(column)) for column in zip(*found, strict=True))
        order = index.argsort(stable=True)
        return images[order], labels[order], index[order]


def _apart(scores: Tensor, labels: Tensor, held_out: Sequence[int]) -> dict[str, float]:
    """``zeroshot_seen_top1`` and ``zeroshot_unseen_top1`` of scores [N, K], each among its own classes."""
    is_held = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
    is_held[list(held_out)] = True
    found = {}
    for name, kind in (("seen", ~is_held), ("unseen", is_held)):
        rows = kind[labels]
        if len(held_out) and bool(rows.any()):
            place = kind.cumsum(dim=0) - 1  # of a class among those of its kind
            found[f"zeroshot_{name}_top1"] = within(scores[rows][:, kind], place[labels[rows]])
    return found
