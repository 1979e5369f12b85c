"""Logs retrievals, similarities and captions of an image-text method on the same validation images during the run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from src.callbacks.drawing import (
    Retrieval,
    caption_sheet,
    image_to_text_sheet,
    similarity_sheet,
    text_to_image_sheet,
    tile,
)
from src.callbacks.visualizations import VisualizationCallback, seeded_everywhere, writers
from src.datamodules.batches.base import optional_labels
from src.datamodules.dataset import SampleKey
from src.errors import SettingError
from src.evaluation.captions import Captioner
from src.evaluation.image_text import TwoTowers
from src.evaluation.retrieval import ranks
from src.evaluation.similarity import Similarity, dot, similarity_of
from src.models.functional import inference
from src.sharding import unsharded

log = logging.getLogger(__name__)

_THUMBNAIL = 112  # side in pixels, the largest that a sheet draws
_TILE = 48  # side in pixels of a point in the projector


@dataclass(frozen=True)
class GallerySet:
    """The validation images and their texts, chosen once a run."""

    image: Tensor  # uint8 [N, 3, H, W]
    text: Tensor  # token ids [N, L]
    mask: Tensor  # bool [N, L], True for tokens that are not padding
    thumbnails: list[Image.Image]
    texts: list[str]
    names: list[str]
    classes: list[str]


@dataclass(frozen=True)
class TowerOutputs:
    """The method's outputs for a `GallerySet`, on the CPU."""

    step: int  # optimizer steps
    image: Tensor  # float32 [N, D], or the encoding of a `CustomSimilarity` method
    text: Tensor  # the same
    captions: list[str]  # generated for the first images; empty if the method does not caption
    similarity: Similarity


Log = Callable[[Any, GallerySet, TowerOutputs], None]


class ImageTextVisualizations(VisualizationCallback):
    """Writes to TensorBoard, at the start, every ``every_n_epochs`` epochs and at the end, for fixed validation images
    and the first text of each:

    - ``images/similarities``: a table of texts against images
    - ``images/text_to_image``, ``images/image_to_text``: the best and the worst retrievals among ``count`` pairs with
      the rank of the match
    - ``images/captions``: generated captions above a text of the image, if the method captions
    - in the projector, at the end: embeddings of all images and texts, if they are vectors

    Costs a forward pass of ``count`` images and texts. The images are kept in memory. An error is logged and does not
    end the run. Modes of modules and states of random number generators are restored afterwards.

    Args:
        count: number of image-text pairs to retrieve from.
        table: number of pairs in the table of similarities.
        rows: number of the best and of the worst retrievals.
        nearest: number of results a retrieval shows.
        captions: number of images to caption.
        every_n_epochs: epochs between two visualizations.
        projector: writes the embeddings at the end.

    Raises:
        SettingError: a number is too small.
    """

    def __init__(
        self,
        count: int = 128,
        table: int = 10,
        rows: int = 4,
        nearest: int = 5,
        captions: int = 8,
        every_n_epochs: int = 5,
        projector: bool = True,
    ) -> None:
        super().__init__(every_n_epochs)
        for name, value, least in (
            ("count", count, 2),
            ("table", table, 1),
            ("rows", rows, 1),
            ("nearest", nearest, 1),
            ("captions", captions, 1),
        ):
            if value < least:
                raise SettingError(f"callbacks.image_text_visualizations.{name} must be at least {least}, got {value}")
        self.count = count
        self.table = table
        self.rows = rows
        self.nearest = nearest
        self.captions = captions
        self.projector = projector
        self._gallery: GallerySet | None = None
        self._outputs: TowerOutputs | None = None
        self._warned = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.projector and not trainer.received_sigterm:
            self._attempt(trainer, pl_module, self._log_projector)

    def show(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._attempt(trainer, pl_module, self._log_sheets)

    def _attempt(self, trainer: L.Trainer, pl_module: L.LightningModule, write: Log) -> None:
        if not isinstance(pl_module, TwoTowers):
            return
        try:
            outputs = self._compute(trainer, pl_module)
            assert self._gallery is not None
            for writer in writers(trainer) if len(outputs.image) > 1 else ():
                write(writer, self._gallery, outputs)
                writer.flush()
        except Exception as problem:  # a visualization must not end a run
            # the next attempt is made all the same: if only this process stopped trying, the others would wait for it
            if not self._warned:
                log.warning("no images of image-text pairs: %s: %s", type(problem).__name__, problem)
            self._warned = True

    def _compute(self, trainer: L.Trainer, pl_module: L.LightningModule) -> TowerOutputs:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self._gallery is None:
            self._gallery = _gallery_set(datamodule, self.count)
        if self._outputs is None or self._outputs.step != trainer.global_step:
            self._outputs = _tower_outputs(pl_module, datamodule, self._gallery, self.captions)
        return self._outputs

    def _log_sheets(self, writer: Any, gallery: GallerySet, outputs: TowerOutputs) -> None:
        image, text, thumbnails, texts = outputs.image, outputs.text, gallery.thumbnails, gallery.texts
        count = min(self.table, len(image))
        table = [place * len(image) // count for place in range(count)]  # spread out: sources may be sorted by class
        sheets = {
            "similarities": similarity_sheet(
                [thumbnails[row] for row in table],
                [texts[row] for row in table],
                outputs.similarity(text[table], image[table]).numpy(),
            )
        }
        for name, draw, query, keys in (
            ("text_to_image", text_to_image_sheet, text, image),
            ("image_to_text", image_to_text_sheet, image, text),
        ):
            best, worst = extremes(query, keys, rows=self.rows, nearest=self.nearest, similarity=outputs.similarity)
            sheets[name] = draw(thumbnails, texts, {"best retrievals": best, "worst retrievals": worst})
        if outputs.captions:
            sheets["captions"] = caption_sheet(thumbnails, texts, outputs.captions)
        for name, sheet in sheets.items():
            writer.add_image(f"images/{name}", np.asarray(sheet), outputs.step, dataformats="HWC")

    def _log_projector(self, writer: Any, gallery: GallerySet, outputs: TowerOutputs) -> None:
        if outputs.similarity is not dot:
            return
        tiles = [tile(thumbnail, _TILE, text=text) for text in (False, True) for thumbnail in gallery.thumbnails]
        rows = zip(gallery.classes, gallery.texts, gallery.names, strict=True)
        columns = [[" ".join(value.split()) for value in row] for row in rows]  # a tab would start another column
        writer.add_embedding(
            torch.cat([outputs.image, outputs.text]),
            metadata=[[modality, *row] for modality in ("image", "text") for row in columns],
            metadata_header=["modality", "class", "text", "name"],
            label_img=torch.from_numpy(np.stack([np.asarray(point) for point in tiles])).permute(0, 3, 1, 2) / 255,
            global_step=outputs.step,
            tag="images_and_texts",
        )


def extremes(
    query: Tensor, keys: Tensor, *, rows: int, nearest: int, similarity: Similarity = dot
) -> tuple[list[Retrieval], list[Retrieval]]:
    """Finds the best and the worst retrievals by the rank of the match. Equal ranks are ordered by the margin between
    the match and the nearest other key.

    Args:
        query, keys: [N, D]; key i is the match of query i.
        rows: number of the best and of the worst retrievals, at most N / 2.
        nearest: number of results of each.
        similarity: of queries and keys.

    Returns:
        the best first, and the worst first.
    """
    match = torch.arange(len(query))
    scores = similarity(query, keys)
    rank = ranks(query, keys, match, match, similarity=similarity)
    others = scores.masked_fill(match[:, None] == match, -torch.inf).amax(dim=1)
    margin = scores.diagonal() - others
    order = np.lexsort((-margin.numpy(), rank.numpy()))  # lexsort sorts by its last key first
    count = min(rows, len(query) // 2)
    top = scores.topk(min(nearest, len(keys)), dim=1)

    def retrieval(row: int) -> Retrieval:
        return Retrieval(row, int(rank[row]), top.indices[row].tolist(), top.values[row].tolist())

    return [retrieval(row) for row in order[:count]], [retrieval(row) for row in order[::-1][:count]]


def _gallery_set(datamodule: Any, count: int) -> GallerySet:
    """The first readable validation samples, the same in every process: a sharded module computes with all of them."""
    dataset = datamodule.val_dataloader(count).dataset
    # read from the dataset itself: the loader would start workers and give each process other samples
    loaded = dataset[[SampleKey(0, position) for position in range(min(count, len(dataset)))]]
    readable = ~loaded["replaced"]
    image, labels = loaded["image"][readable], optional_labels(loaded)[readable].tolist()
    positions = loaded["index"][readable].tolist()
    texts = [dataset.source.captions(position)[0] for position in positions]
    ids, mask = datamodule.tokenizer(texts)
    classes = datamodule.classes
    return GallerySet(
        image=image,
        text=ids,
        mask=mask,
        thumbnails=[_thumbnail(pixels) for pixels in image],
        texts=texts,
        names=[dataset.source.name(position) for position in positions],
        classes=[classes[label] if 0 <= label < len(classes) else "" for label in labels],
    )


def _tower_outputs(pl_module: L.LightningModule, datamodule: Any, gallery: GallerySet, captions: int) -> TowerOutputs:
    device, size, tokenizer = pl_module.device, datamodule.eval_batch_size, datamodule.tokenizer
    images, texts, generated = [], [], []

    def normalized(image: Tensor) -> Tensor:
        return datamodule.on_after_batch_transfer({"image": image.to(device)}, 0)["image"]

    with (
        inference(pl_module),
        seeded_everywhere(0, device),
        pl_module.trainer.precision_plugin.forward_context(),
        unsharded(pl_module),
    ):
        parts = zip(gallery.image.split(size), gallery.text.split(size), gallery.mask.split(size), strict=True)
        for image, text, mask in parts:
            images.append(pl_module.encode_image(normalized(image)))  # type: ignore[operator]
            texts.append(pl_module.encode_text(text.to(device), mask.to(device)))  # type: ignore[operator]
        if isinstance(pl_module, Captioner) and None not in (tokenizer.start, tokenizer.end):
            ends = {"start": tokenizer.start, "end": tokenizer.end}
            ids = pl_module.caption(normalized(gallery.image[:captions]), **ends, length=tokenizer.length)
            generated = tokenizer.decode(ids.cpu())
    image, text = (torch.cat(parts).float().cpu() for parts in (images, texts))
    return TowerOutputs(pl_module.trainer.global_step, image, text, generated, similarity_of(pl_module))


def _thumbnail(image: Tensor) -> Image.Image:
    full = Image.fromarray(image.permute(1, 2, 0).numpy())
    return full.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR)
