"""Texts go with the picture they belong to, whatever had to be replaced."""

from functools import partial

import pytest
import torch

from src.datamodules.batch import ImageTextBatch, validate
from src.datamodules.dataset import Draw
from src.datamodules.image_text import ImageTextDataModule, ImageTextDataset
from src.datamodules.scenes import captions
from src.datamodules.scenes.shapes import KINDS
from src.datamodules.scenes.source import ScenesSource, SceneTexts
from src.datamodules.sources.source import BadSample
from src.datamodules.text.tokenizer import trained
from src.datamodules.views.colour import Colour
from src.datamodules.views.image import CentreCrop, RandomResizedCrop
from src.datamodules.views.multi import Augmented, MultiView

WORDS = ["zero one two three four five six seven eight nine said once and twice"]
TOKENIZER = trained(WORDS, vocabulary=300, length=12)
NUMBERS = WORDS[0].split()[:10]


class Numbered:
    """Pictures of one grey each, and texts that say which."""

    classes = ("odd", "even")

    def __init__(self, split: str = "train", silent: tuple[int, ...] = (), broken: tuple[int, ...] = ()) -> None:
        self.silent, self.broken = silent, broken

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int):
        if index in self.broken:
            raise BadSample("cut off")
        return {"image": torch.full((3, 8, 8), index, dtype=torch.uint8), "label": index % 2}

    def name(self, index: int) -> str:
        return f"number/{index}"

    def caption(self, index: int, choice: float) -> str:
        return "  " if index in self.silent else f"{NUMBERS[index]} said {'once' if choice < 0.5 else 'twice'}"

    def captions(self, index: int) -> list[str]:
        return [self.caption(index, 0.0), self.caption(index, 0.9)]


def dataset(**options) -> ImageTextDataset:
    return ImageTextDataset(Numbered(**options), CentreCrop(8, share=1.0), tokenizer=TOKENIZER, seed=3)


def read(batch) -> list[str]:
    return TOKENIZER.decode(batch["text"])


def test_a_text_says_what_its_picture_is_and_is_chosen_anew_in_every_epoch():
    data, seen = dataset(), set()
    for epoch in range(6):
        batch = data[[Draw(epoch, position) for position in (4, 0, 9)]]
        for number, text, grey in zip(("four", "zero", "nine"), read(batch), batch["image"][:, 0, 0, 0], strict=True):
            assert text.startswith(number)
            assert NUMBERS[int(grey)] == number
            seen.add((number, text.split()[-1]))
        alone = data[[Draw(epoch, 0)]]
        assert read(alone) == read(batch)[1:2]  # whatever comes with it
    assert len(seen) == 6


@pytest.mark.parametrize("bad", [{"silent": (2, 5)}, {"broken": (2, 5)}])
def test_a_picture_without_text_and_a_text_without_picture_are_replaced_together(bad):
    batch = dataset(**bad)[[Draw(0, position) for position in range(10)]]
    assert batch["replaced"].nonzero().flatten().tolist() == [2, 5]
    for text, grey in zip(read(batch), batch["image"][:, 0, 0, 0], strict=True):
        assert text.startswith(NUMBERS[int(grey)])


def module(tmp_path, source=None, **options) -> ImageTextDataModule:
    settings = {
        "source": source or partial(ScenesSource, count=12, resolution=16, texts=SceneTexts(wordings=(0, 1))),
        "train_view": RandomResizedCrop(16),
        "eval_view": CentreCrop(16),
        "batch_size": 4,
        "num_workers": 0,
        "tokenizer_file": tmp_path / "tokenizer.json",
        "text_length": 48,
        "vocabulary": 320,
    }
    return ImageTextDataModule(**{**settings, **options})


def test_scenes_come_with_their_texts(tmp_path):
    data = module(tmp_path)
    data.prepare_data()
    batch = next(iter(data.train_dataloader()))
    batch = data.on_after_batch_transfer(batch, 0)
    validate(batch, data.batch_type)
    assert data.batch_type is ImageTextBatch
    assert (tmp_path / "tokenizer.json").exists()
    for index, text in zip(batch["index"].tolist(), data.tokenizer.decode(batch["text"]), strict=True):
        first, *others = data.train_source.scene(index).things
        meant = captions._SYNONYMS
        assert any(f"{colour} {kind}" in text for colour in meant[first.colour] for kind in meant[first.kind.name])
        named = {name for name, words in meant.items() if any(word in text for word in words)}
        assert {kind.name for kind in KINDS} & named <= {first.kind.name, *(other.kind.name for other in others)}
    again = module(tmp_path, tokenizer_file=tmp_path / "tokenizer.json")
    assert torch.equal(next(iter(again.train_dataloader()))["text"], batch["text"])


def test_judged_texts_are_true_differ_and_stay():
    source = ScenesSource("val", count=6, resolution=16, texts=SceneTexts(style="alt", mismatched=1.0))
    for index in range(6):
        texts = source.captions(index)
        assert texts == source.captions(index)
        assert len(set(texts)) == len(texts) == 5


def test_what_cannot_be_is_refused_by_its_key(tmp_path):
    class Mute:
        classes = ()

        def __init__(self, split: str) -> None: ...

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int): ...

        def name(self, index: int) -> str:
            return ""

    with pytest.raises(ValueError, match=r"data.source: Mute has no texts"):
        module(tmp_path, source=Mute).train_dataloader()
    with pytest.raises(ValueError, match=r"data.vocabulary=100: the tokenizer has 2\d\d ids"):
        module(tmp_path, vocabulary=100).prepare_data()  # the bytes alone are more
    with pytest.raises(ValueError, match=r"data.tokenizer: name one"):
        module(tmp_path, tokenizer_file=None)
    views = MultiView({"one": Augmented(RandomResizedCrop(16), Colour())})
    with pytest.raises(ValueError, match=r"data.train_view: a text goes with one view"):
        _ = module(tmp_path, train_view=views).batch_type
    for wrong, said in (
        ({"style": "loud"}, "not 'loud'"),
        ({"wordings": (99,)}, "wordings 0 to 5"),
        ({"junk": 1.5}, "junk=1.5"),
        ({"judged": 0}, "at least one text"),
    ):
        with pytest.raises(ValueError, match=said):
            SceneTexts(**wrong)
