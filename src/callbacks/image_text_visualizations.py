"""What a method with an image tower and a text tower takes for alike, over the run."""

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
    Ranked,
    captions_of_pictures,
    pictures_of_texts,
    similarities,
    texts_of_pictures,
    tile,
)
from src.callbacks.visualizations import VisualizationCallback, seeded_everywhere, writers
from src.datamodules.dataset import SampleKey
from src.errors import SettingError
from src.evaluation.captions import Captioner
from src.evaluation.image_text import TwoTowers
from src.evaluation.retrieval import ranks
from src.evaluation.similarity import Similarity, dot, similarity_of
from src.models.functional import inference
from src.sharding import gathered

log = logging.getLogger(__name__)

_THUMBNAIL = 112  # pixels, the largest that is drawn
_POINT = 48  # pixels of a picture in the projector


Act = Callable[[Any, "GallerySet", "TowerOutputs"], None]


@dataclass(frozen=True)
class GallerySet:
    """Visualizations with a text each, the same every time."""

    image: Tensor  # uint8 [N, 3, H, W]
    text: Tensor  # token ids [N, L]
    mask: Tensor  # bool [N, L]
    pictures: list[Image.Image]
    texts: list[str]
    names: list[str]
    classes: list[str]


@dataclass(frozen=True)
class TowerOutputs:
    """What the method makes of a gallery, on the CPU."""

    step: int  # of the run
    image: Tensor  # float32 [N, D], or what a method that is `CustomSimilarity` has instead
    text: Tensor  # the same
    said: list[str]  # of the first pictures; of none where the method does not caption
    similarity: Similarity


class ImageTextVisualizations(VisualizationCallback):
    """Writes to TensorBoard what the towers make of a fixed choice of validation pictures, each with the first text
    that its source judges by: at the start, every so many epochs, and at the end.

    - ``pictures/similarities``: every text of a few against every picture of them
    - ``pictures/pictures_of_texts``, ``pictures/texts_of_pictures``: the surest and the worst retrievals among all
      ``count``, with the rank of what should have been found
    - ``pictures/captions``: what a method that captions says of some, and below the text they come with
    - at the end the projector: the vectors of all pictures and texts, with names, classes and sprites, where they are
      vectors

    Costs a forward pass of ``count`` pictures and texts; the pictures are kept in memory. What goes wrong here is
    logged, and never ends a run. Modes and generators are left as they were.

    Args:
        count: pictures that are searched.
        table: of them so many have their similarities shown.
        rows: of the best and of the worst retrievals, each.
        nearest: results of a retrieval that are shown.
        captions: pictures that are captioned, where the method can.
        every_n_epochs: how often.
        projector: whether the vectors are written at the end.
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
                raise SettingError(f"ImageTextVisualizations: {name} must be at least {least}, got {value}")
        self.count = count
        self.table = table
        self.rows = rows
        self.nearest = nearest
        self.captions = captions
        self.projector = projector
        self._gallery: GallerySet | None = None
        self._made: TowerOutputs | None = None
        self._warned = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.projector and not trainer.received_sigterm:
            self._attempt(trainer, pl_module, self._project)

    def show(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._attempt(trainer, pl_module, self._draw)

    def _attempt(self, trainer: L.Trainer, pl_module: L.LightningModule, act: Act) -> None:
        if not isinstance(pl_module, TwoTowers):
            return
        try:
            made = self._make(trainer, pl_module)
            assert self._gallery is not None
            for writer in writers(trainer) if len(made.image) > 1 else ():
                act(writer, self._gallery, made)
                writer.flush()
        except Exception as problem:  # a run of days must not end for want of something to look at
            # tried again next time: were it this process alone that stopped, the others would wait for it
            if not self._warned:
                log.warning("no pictures of images and texts: %s: %s", type(problem).__name__, problem)
            self._warned = True

    def _make(self, trainer: L.Trainer, pl_module: L.LightningModule) -> TowerOutputs:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self._gallery is None:
            self._gallery = _gallery(datamodule, self.count)
        if self._made is None or self._made.step != trainer.global_step:
            self._made = _make(pl_module, datamodule, self._gallery, self.captions)
        return self._made

    def _draw(self, writer: Any, gallery: GallerySet, made: TowerOutputs) -> None:
        image, text = made.image, made.text
        count = min(self.table, len(image))
        shown = [place * len(image) // count for place in range(count)]  # sources may be sorted by class
        sheets = {
            "similarities": similarities(
                [gallery.pictures[row] for row in shown],
                [gallery.texts[row] for row in shown],
                made.similarity(text[shown], image[shown]).numpy(),
            )
        }
        for name, draw, query, keys in (
            ("pictures_of_texts", pictures_of_texts, text, image),
            ("texts_of_pictures", texts_of_pictures, image, text),
        ):
            best, worst = extremes(query, keys, rows=self.rows, nearest=self.nearest, similarity=made.similarity)
            sheets[name] = draw(gallery.pictures, gallery.texts, {"found most clearly": best, "found last": worst})
        if made.said:
            sheets["captions"] = captions_of_pictures(gallery.pictures, gallery.texts, made.said)
        for name, sheet in sheets.items():
            writer.add_image(f"pictures/{name}", np.asarray(sheet), made.step, dataformats="HWC")

    def _project(self, writer: Any, gallery: GallerySet, made: TowerOutputs) -> None:
        if made.similarity is not dot:
            return
        tiles = [tile(picture, _POINT, text=each) for each in (False, True) for picture in gallery.pictures]
        rows = zip(gallery.classes, gallery.texts, gallery.names, strict=True)
        said = [[" ".join(word.split()) for word in row] for row in rows]  # a tab would begin another column
        writer.add_embedding(
            torch.cat([made.image, made.text]),
            metadata=[[kind, *row] for kind in ("picture", "text") for row in said],
            metadata_header=["is", "class", "text", "name"],
            label_img=torch.from_numpy(np.stack([np.asarray(each) for each in tiles])).permute(0, 3, 1, 2) / 255,
            global_step=made.step,
            tag="images_and_texts",
        )


def extremes(
    query: Tensor, keys: Tensor, *, rows: int, nearest: int, similarity: Similarity = dot
) -> tuple[list[Ranked], list[Ranked]]:
    """The queries that find their own most clearly, and those whose own comes last; of equal ranks the margin between
    the own and the nearest other decides: [N, D] each, row i of both belonging together."""
    own = torch.arange(len(query))
    scores = similarity(query, keys)
    rank = ranks(query, keys, own, own, similarity=similarity)
    others = scores.masked_fill(own[:, None] == own, -torch.inf).amax(dim=1)
    margin = scores.diagonal() - others
    order = np.lexsort((-margin.numpy(), rank.numpy()))  # the last key counts first
    count = min(rows, len(query) // 2)
    top = scores.topk(min(nearest, len(keys)), dim=1)

    def ranked(row: int) -> Ranked:
        return Ranked(int(rank[row]), top.indices[row].tolist(), top.values[row].tolist(), row)

    return [ranked(row) for row in order[:count]], [ranked(row) for row in order[::-1][:count]]


def _gallery(datamodule: Any, count: int) -> GallerySet:
    """The same in every process, which a sharded module's forward pass asks for."""
    dataset = datamodule.val_dataloader(count).dataset
    # straight from the data set: the loader would start workers, and deal the pictures out
    loaded = dataset[[SampleKey(0, position) for position in range(min(count, len(dataset)))]]
    batch = {name: loaded[name][~loaded["replaced"]] for name in ("image", "label", "index")}
    positions = batch["index"].tolist()
    texts = [dataset.source.captions(position)[0] for position in positions]
    ids, mask = datamodule.tokenizer(texts)
    classes = datamodule.classes
    return GallerySet(
        image=batch["image"],
        text=ids,
        mask=mask,
        pictures=[_thumbnail(image) for image in batch["image"]],
        texts=texts,
        names=[dataset.source.name(position) for position in positions],
        classes=[classes[label] if 0 <= label < len(classes) else "" for label in batch["label"].tolist()],
    )


def _make(pl_module: L.LightningModule, datamodule: Any, gallery: GallerySet, captions: int) -> TowerOutputs:
    device, size, tokenizer = pl_module.device, datamodule.eval_batch_size, datamodule.tokenizer
    images, texts, said = [], [], []

    def pictures(image: Tensor) -> Tensor:
        return datamodule.on_after_batch_transfer({"image": image.to(device)}, 0)["image"]

    with (
        inference(pl_module),
        seeded_everywhere(0, device),
        pl_module.trainer.precision_plugin.forward_context(),
        gathered(pl_module),
    ):
        parts = zip(*(each.split(size) for each in (gallery.image, gallery.text, gallery.mask)), strict=True)
        for image, text, mask in parts:
            images.append(pl_module.encode_image(pictures(image)))  # type: ignore[operator]
            texts.append(pl_module.encode_text(text.to(device), mask.to(device)))  # type: ignore[operator]
        if isinstance(pl_module, Captioner) and None not in (tokenizer.start, tokenizer.end):
            marks = {"start": tokenizer.start, "end": tokenizer.end}
            ids = pl_module.caption(pictures(gallery.image[:captions]), **marks, length=tokenizer.length)
            said = tokenizer.decode(ids.cpu())
    image, text = (torch.cat(parts).float().cpu() for parts in (images, texts))
    return TowerOutputs(pl_module.trainer.global_step, image, text, said, similarity_of(pl_module))


def _thumbnail(image: Tensor) -> Image.Image:
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    return picture.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR)
