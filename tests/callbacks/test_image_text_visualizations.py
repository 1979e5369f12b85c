"""Tests the sheets of image-text pairs, and that drawing them does not affect the run."""

from __future__ import annotations

import io
import logging
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.functional import one_hot

from src.callbacks.drawing import Retrieval, image_to_text_sheet, similarity_sheet, text_to_image_sheet, tile, wrapped
from src.callbacks.image_text_visualizations import ImageTextVisualizations, extremes
from src.loggers import OrderedTensorBoardLogger
from src.models.backbones.encoder import Encoder
from src.models.downstream.colormaps import ramp
from src.models.pretrain_module import PretrainModule
from src.optim import OptimizerRecipe
from tests.callbacks.small_runs import fit
from tests.datamodules.test_image_text import NUMBERS
from tests.evaluation.test_image_text import data

GREEN, RED = (22, 140, 70), (200, 60, 50)


class Counting(PretrainModule):
    """Encodes the numbers of images and texts as one-hot vectors, and confuses the texts of 8 and 9."""

    def __init__(self, datamodule: Any) -> None:
        super().__init__(OptimizerRecipe(partial(torch.optim.SGD), lr=0.1))
        self.datamodule = datamodule
        self.layer = nn.Linear(3, 1)
        self.calls = 0

    def encoders(self) -> dict[str, Encoder]:
        return {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.layer(batch["image"].mean((2, 3))).square().mean()}

    def encode_image(self, image: Tensor) -> Tensor:
        assert not self.training
        self.calls += 1
        return one_hot((self.datamodule.denormalize(image)[:, 0, 0, 0] * 255).round().long(), 12).float()

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor:
        torch.rand(3)
        named = [NUMBERS.index(words.split()[0]) for words in self.datamodule.tokenizer.decode(text)]
        return one_hot(torch.tensor([{8: 9, 9: 8}.get(number, number) for number in named]), 12).float()


def train(folder: Path, module: L.LightningModule, callback: L.Callback, **options: Any) -> EventAccumulator:
    fit(folder, callback, module=module, data=module.datamodule, loggers=[OrderedTensorBoardLogger(folder)], **options)
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return events


def pixels(sheet: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == color).all(axis=-1).sum())


def test_sheets_are_written_at_the_start_at_epochs_and_at_the_end(tmp_path: Path) -> None:
    module = Counting(data(tmp_path))
    events = train(tmp_path, module, ImageTextVisualizations(table=10, rows=2, every_n_epochs=2), max_epochs=3)
    names = {f"images/{name}" for name in ("similarities", "text_to_image", "image_to_text")}
    assert set(events.Tags()["images"]) == names
    for name in names:
        shown = events.Images(name)
        assert [event.step for event in shown] == [0, 10, 15]
        drawn = Image.open(io.BytesIO(shown[0].encoded_image_string)).convert("RGB")
        assert pixels(drawn, GREEN) > 50  # correct retrievals
        assert pixels(drawn, RED) > 50  # wrong retrievals
    assert module.calls == 3 * 3  # ten images in batches of four, three times; the projector reuses the last outputs


def test_the_projector_holds_a_point_for_each_image_and_text(tmp_path: Path) -> None:
    train(tmp_path, Counting(data(tmp_path)), ImageTextVisualizations(), max_epochs=1)
    [folder] = (tmp_path / "00005").iterdir()
    vectors = np.loadtxt(folder / "tensors.tsv")
    header, *rows = (folder / "metadata.tsv").read_text().splitlines()
    assert vectors.shape == (20, 12)
    assert header.split("\t") == ["modality", "class", "text", "name"]
    assert rows[3].split("\t") == ["image", "three", "three said once", "number/3"]
    assert rows[13].split("\t") == ["text", "three", "three said once", "number/3"]
    assert (vectors[3] == vectors[13]).all()
    assert (vectors[8] == vectors[19]).all()
    assert Image.open(folder / "sprite.png").size == (5 * 48, 5 * 48)
    assert folder.name in (tmp_path / "projector_config.pbtxt").read_text()


def test_a_custom_similarity_is_drawn_and_has_no_projector(tmp_path: Path) -> None:
    class Late(Counting):
        """Encodes each number as two equal tokens and compares by late interaction."""

        def encode_image(self, image: Tensor) -> Tensor:
            return super().encode_image(image)[:, None].repeat(1, 2, 1)

        def encode_text(self, text: Tensor, mask: Tensor) -> Tensor:
            return super().encode_text(text, mask)[:, None].repeat(1, 2, 1)

        def similarity(self, query: Tensor, keys: Tensor) -> Tensor:
            return torch.einsum("qid,kjd->qkij", query, keys).amax(dim=3).mean(dim=2)

    drawn = [
        train(tmp_path / kind.__name__, kind(data(tmp_path)), ImageTextVisualizations(), max_epochs=1)
        for kind in (Counting, Late)
    ]
    for name in ("similarities", "text_to_image", "image_to_text"):
        vectors, late = (events.Images(f"images/{name}")[-1].encoded_image_string for events in drawn)
        assert vectors == late
    assert (tmp_path / "Counting" / "projector_config.pbtxt").exists()
    assert not (tmp_path / "Late" / "projector_config.pbtxt").exists()


def test_generated_captions_are_drawn_beside_their_images(tmp_path: Path) -> None:
    class Captioning(Counting):
        """Captions an image with its number, and records the requested lengths."""

        lengths: list[int] = []

        def caption(self, image: Tensor, *, start: int, end: int, length: int, beams: int = 1) -> Tensor:
            self.lengths.append(length)
            ids, _ = self.datamodule.tokenizer([NUMBERS[number] for number in self.encode_image(image).argmax(dim=1)])
            assert (ids[:, 0] == start).all()
            assert (ids == end).any(dim=1).all()
            return ids

    module = Captioning(data(tmp_path))
    callback = ImageTextVisualizations(captions=3)
    events = train(tmp_path, module, callback, max_epochs=1)
    [first, last] = events.Images("images/captions")
    assert (first.step, last.step) == (0, 5)
    assert callback._outputs is not None
    assert callback._outputs.captions == ["zero", "one", "two"]
    assert module.lengths == [12, 12]
    drawn = Image.open(io.BytesIO(last.encoded_image_string)).convert("RGB")
    assert drawn.size == (3 * 12 + 96 + 560, 12 + 3 * (96 + 12))
    assert pixels(drawn, (2, 2, 2)) == 96**2  # the third image


def test_an_error_is_logged_once_and_training_continues(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Counting):
        def encode_text(self, text: Tensor, mask: Tensor) -> Tensor:
            raise RuntimeError("no words")

    module = Broken(data(tmp_path))
    with caplog.at_level(logging.WARNING):
        events = train(tmp_path, module, ImageTextVisualizations(every_n_epochs=1), max_epochs=2)
    warnings = [record.getMessage() for record in caplog.records if "no images of" in record.getMessage()]
    assert warnings == ["no images of image-text pairs: RuntimeError: no words"]
    assert events.Tags()["images"] == []
    assert module.trainer.global_step == 10
    assert module.training


def test_generators_are_restored(tmp_path: Path) -> None:
    states = []

    class Around(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            states.append(torch.get_rng_state())

    class Plain(Counting):
        encode_text = None  # type: ignore[assignment]

    around = Around()
    module = Counting(data(tmp_path))
    fit(tmp_path, around, ImageTextVisualizations(), around, module=module, data=module.datamodule, max_epochs=1)
    assert torch.equal(states[0], states[1])
    assert module.calls > 0


def test_best_and_worst_retrievals_by_hand() -> None:
    keys = torch.eye(4)
    query = torch.tensor([[0.9, 0.1, 0, 0], [0.5, 0.4, 0.3, 0], [0, 0, 0.6, 0.5], [0.9, 0.8, 0.7, 0.6]])
    best, worst = extremes(query, keys, rows=2, nearest=2)
    assert [(retrieval.query, retrieval.rank) for retrieval in best] == [(0, 0), (2, 0)]  # margins 0.8 and 0.1
    assert [(retrieval.query, retrieval.rank) for retrieval in worst] == [(3, 3), (1, 1)]
    assert (worst[0].results, worst[0].scores) == ([0, 1], pytest.approx([0.9, 0.8]))
    best, worst = extremes(query[:3], keys[:3], rows=5, nearest=9)
    assert (len(best), len(worst)) == (1, 1)  # no query is in both
    assert len(best[0].results) == 3


def test_lines_break_between_words_and_an_ellipsis_marks_omitted_text() -> None:
    text = "a photo of a red disc to the left of a green square"
    lines = wrapped(text, 13, 120, 9)
    assert " ".join(lines) == text
    assert len(lines) > 2
    short = wrapped(text, 13, 120, 2)
    assert short[0] == lines[0]
    assert short[1].endswith("…")
    assert text.startswith(" ".join(short).removesuffix("…"))
    assert "".join(wrapped("x" * 50, 13, 60, 99)) == "x" * 50  # a script without spaces breaks anywhere
    assert wrapped("", 13, 60, 3) == []
    assert wrapped("a\n b\tc", 13, 60, 3) == ["a b c"]


def test_the_table_is_dark_where_similar_and_frames_the_nearest() -> None:
    images = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (10, 20, 30)]
    values = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.5]])
    sheet = similarity_sheet(images, ["one", "two", "three"], values)
    assert (ramp(0), ramp(0.5), ramp(1)) == ((247, 251, 255), (107, 174, 214), (8, 48, 107))
    assert pixels(sheet, ramp(1)) > 2 * pixels(sheet, ramp(0.5)) > 0
    thick, thin = 64**2 - 56**2, 64**2 - 60**2
    assert (pixels(sheet, GREEN), pixels(sheet, RED)) == (2 * thick + thin, thick)
    assert similarity_sheet(images, ["one", "two", "three"], np.zeros((3, 3))).size == sheet.size  # no range of values


def test_retrieval_sheets_show_the_match_and_the_results() -> None:
    images = [Image.new("RGB", (8, 8), (level, 1, 2)) for level in (10, 20, 30)]
    sections = {"best": [Retrieval(0, 0, [0, 1], [0.9, 0.1])], "worst": [Retrieval(2, 2, [0, 1], [0.5, 0.4])]}
    sheet = text_to_image_sheet(images, ["one", "two", "three"], sections)
    shown = [pixels(sheet, (level, 1, 2)) for level in (10, 20, 30)]
    # 0: match and twice a result (once framed); 1: twice a result; 2: match
    assert shown[0] == pytest.approx(3 * 96**2, rel=0.06)
    assert shown[1:] == [2 * 96**2, 96**2]
    other = image_to_text_sheet(images, ["one", "two", "three"], sections)
    assert [pixels(other, (level, 1, 2)) for level in (10, 20, 30)] == [112**2, 0, 112**2]
    assert pixels(tile(images[0], 48, text=False), (10, 1, 2)) == 42**2
    assert pixels(tile(images[0], 48, text=True), (10, 1, 2)) == 0


@pytest.mark.parametrize("name", ["count", "table", "rows", "nearest", "captions", "every_n_epochs"])
def test_values_that_are_too_small_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        ImageTextVisualizations(**{name: 0})
