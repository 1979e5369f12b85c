"""The text of an object stays with its box, whichever objects a view keeps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms import v2

from src import configuration
from src.datamodules.batches.base import validate
from src.datamodules.batches.dense import RegionTextBatch
from src.datamodules.datamodule import DataModule
from src.datamodules.dataset import SampleKey, ViewedDataset
from src.datamodules.decoding import BadSample
from src.datamodules.extras.region_texts import RegionTexts
from src.datamodules.scenes.captions import _SYNONYMS
from src.datamodules.sources.source import Split
from src.datamodules.text.tokenizer import train_tokenizer
from src.datamodules.views.detection import DetectionView, RegionView
from src.datamodules.views.transforms import PaddedCrop, RandomRescale
from src.errors import SettingError
from src.train import compose
from tests.datamodules.test_ground_truth import Encoded

WORDS = [f"a {word} {letter}" for letter in Encoded.mask_classes for word in ("large", "small")]
TOKENIZER = train_tokenizer(WORDS, vocabulary=400, length=8)
PART = RegionView((RandomRescale(32, 64, (0.5, 2.0)), PaddedCrop(16), v2.RandomHorizontalFlip()))


class Described(Encoded):
    """Each object is described by its class; its gray level is ten times the class."""

    def __init__(
        self, split: Split = "train", *, silent: tuple[int, ...] = (), broken: tuple[int, ...] = (), **options: Any
    ) -> None:
        super().__init__(split, **options)
        self.silent, self.broken = silent, broken

    def regions(self, index: int, choice: float) -> list[str]:
        if index in self.broken:
            raise BadSample("its texts are cut off")
        word = "large" if choice < 0.5 else "small"
        texts = [f"a {word} {self.mask_classes[kind]}" for kind in self[index]["fields"]["box_labels"]]
        return [*texts[:-1], " "] if index in self.silent else texts


class Empty(Described):
    """Images without objects."""

    def __getitem__(self, index: int) -> Any:
        sample = super().__getitem__(index)
        sample["fields"] = {"boxes": torch.zeros(0, 4), "box_labels": torch.zeros(0, dtype=torch.int64)}
        return sample


def batch(positions: range, epoch: int = 0, view: RegionView = PART, **options: Any) -> dict[str, Any]:
    data = ViewedDataset(Described(**options), view, extras=RegionTexts(), tokenizer=TOKENIZER, seed=5)
    return data[[SampleKey(epoch, position) for position in positions]]


def texts(batch: dict[str, Any]) -> list[list[str]]:
    return [TOKENIZER.decode(each) for each in batch["region_text"]]


def test_each_text_describes_the_object_of_its_box():
    found, whole = batch(range(12)), batch(range(12), view=RegionView())
    for boxes, labels, told in zip(found["boxes"], found["box_labels"], texts(found), strict=True):
        assert len(boxes) == len(told)
        assert [text.split()[-1] for text in told] == [Described.mask_classes[label] for label in labels]
    assert 0 < sum(map(len, found["boxes"])) < sum(map(len, whole["boxes"]))  # some things are outside of the parts
    for boxes, labels, things, every in zip(
        *(found[name] for name in ("boxes", "box_labels", "object_index")), whole["box_labels"], strict=True
    ):
        assert len(boxes) == len(things)
        assert torch.equal(every[things], labels)
    validate(
        {**whole, "image": whole["image"].float(), "boxes": [each.float() for each in whole["boxes"]]}, RegionTextBatch
    )


def test_texts_are_drawn_anew_in_every_epoch_and_masks_cover_them():
    seen = set()
    for epoch in range(6):
        found = batch(range(1), epoch)
        seen |= {text.split()[1] for text in texts(found)[0]}
        for ids, mask in zip(found["region_text"][0], found["region_text_mask"][0], strict=True):
            assert mask.sum() == 5  # start, three words, end
            assert (ids[mask] != 0).all()
            assert (ids[~mask] == 0).all()
    assert seen == {"large", "small"}


def test_an_image_with_an_object_without_text_is_replaced(caplog):
    found = batch(range(6), silent=(2,), broken=(4,), view=RegionView())
    assert found["replaced"].tolist() == [False, False, True, False, True, False]
    for labels, told in zip(found["box_labels"], texts(found), strict=True):
        assert [text.split()[-1] for text in told] == [Described.mask_classes[label] for label in labels]
    assert "replaced encoded/2: an object of it has no text" in caplog.text
    assert "replaced encoded/4: its texts are cut off" in caplog.text


def test_images_without_objects_have_no_texts():
    data = ViewedDataset(Empty(), RegionView(), extras=RegionTexts(), tokenizer=TOKENIZER, seed=5)
    found = data[[SampleKey(0, 0), SampleKey(0, 3)]]
    assert [tuple(each.shape) for each in found["region_text"]] == [(0, 8), (0, 8)]
    assert [tuple(each.shape) for each in found["region_text_mask"]] == [(0, 8), (0, 8)]


def module(folder: Path, **options: Any) -> DataModule:
    known: dict[str, Any] = {"source": Described, "train_view": PART, "eval_view": RegionView(), "batch_size": 6}
    return DataModule(
        extras=RegionTexts(),
        **{**known, "num_workers": 0, "text_length": 8, "tokenizer_file": folder / "tokenizer.json", **options},
    )


def test_the_number_of_workers_changes_nothing(tmp_path: Path):
    alone, shared = (list(module(tmp_path, num_workers=workers).train_dataloader()) for workers in (0, 2))
    assert len(alone) == len(shared) == 4
    for ours, theirs in zip(alone, shared, strict=True):
        for name in ("boxes", "region_text", "region_text_mask"):
            assert all(torch.equal(*pair) for pair in zip(ours[name], theirs[name], strict=True)), name


def test_data_without_texts_of_objects_is_refused(tmp_path: Path):
    with pytest.raises(SettingError, match="Encoded has no texts of the objects in its images"):
        module(tmp_path, source=Encoded).prepare_data()
    with pytest.raises(SettingError, match=r"data.eval_view: texts of objects need a RegionView, not a DetectionView"):
        module(tmp_path, eval_view=DetectionView()).batch_type  # noqa: B018
    plain = module(tmp_path, source=partial(_without_boxes, Described))
    with pytest.raises(SettingError, match="RegionView needs the ground truth boxes, box_labels"):
        plain.train_dataloader()


def _without_boxes(kind: type, split: Split) -> Any:
    source = kind(split)
    source.fields = ()
    return source


def test_scenes_describe_each_object(tmp_path: Path):
    views = [f"data.{name}._target_=src.datamodules.views.detection.RegionView" for name in ("train_view", "eval_view")]
    words = ["experiment=detection_vitb", "scale=tiny", "data=scenes_regions", "masks=false", *views]
    small = ["data.batch_size=8", "data.source.count=40", "data.source.cache_dir=null", f"run.dir='{tmp_path}'"]
    data: DataModule = configuration.instantiate(compose([*words, *small]).data)
    data.prepare_data()
    source: Any = data.train_source
    found = next(iter(data.train_dataloader()))
    assert sum(map(len, found["boxes"])) > 8
    for labels, ids in zip(found["box_labels"], found["region_text"], strict=True):
        for label, text in zip(labels, data.tokenizer.decode(ids), strict=True):
            kind = source.classes[label]
            assert any(text.endswith(f" {name}") for name in _SYNONYMS.get(kind, (kind,)))
    validate(data.on_after_batch_transfer(found, 0), RegionTextBatch)
