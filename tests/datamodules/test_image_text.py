"""Captions stay with their images, also if samples are replaced."""

import io
import json
import logging
import tarfile
from collections import Counter
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from src import configuration, train
from src.datamodules.batches.base import validate
from src.datamodules.batches.image_text import ImageTextBatch
from src.datamodules.datamodule import DataModule
from src.datamodules.dataset import SampleKey, ViewedDataset
from src.datamodules.decoding import BadSample
from src.datamodules.extras.captions import CaptionedSource, Captions
from src.datamodules.scenes import captions
from src.datamodules.scenes.shapes import KINDS
from src.datamodules.scenes.source import ScenesSource, SceneTexts
from src.datamodules.sources.captioned_files import CaptionListSource
from src.datamodules.sources.source import Source
from src.datamodules.sources.text_filter import TextFilter
from src.datamodules.sources.texts import TextListSource
from src.datamodules.sources.webdataset import CaptionedWebDatasetSource
from src.datamodules.text.tokenizer import train_tokenizer
from src.datamodules.views.color import Color
from src.datamodules.views.image import CenterCrop, RandomResizedCrop
from src.datamodules.views.multi import Augmented, MultiView

WORDS = ["zero one two three four five six seven eight nine said once and twice"]
TOKENIZER = train_tokenizer(WORDS, vocabulary=300, length=12)
LONGER = train_tokenizer(WORDS, vocabulary=300, length=40)
NUMBERS = WORDS[0].split()[:10]


class Numbered(Source):
    """Images of one gray level each, with captions that name it."""

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


def dataset(**options) -> ViewedDataset:
    return ViewedDataset(Numbered(**options), CenterCrop(8, share=1.0), extras=Captions(), tokenizer=TOKENIZER, seed=3)


def read(batch, tokenizer=TOKENIZER) -> list[str]:
    return tokenizer.decode(batch["text"])


def test_captions_match_their_image_and_are_drawn_anew_in_every_epoch():
    data, seen = dataset(), set()
    for epoch in range(6):
        batch = data[[SampleKey(epoch, position) for position in (4, 0, 9)]]
        for number, text, grey in zip(("four", "zero", "nine"), read(batch), batch["image"][:, 0, 0, 0], strict=True):
            assert text.startswith(number)
            assert NUMBERS[int(grey)] == number
            seen.add((number, text.split()[-1]))
        alone = data[[SampleKey(epoch, 0)]]
        assert read(alone) == read(batch)[1:2]  # whatever comes with it
    assert len(seen) == 6


class Worded(Numbered):
    """Captions that contain the random number that selected them."""

    def caption(self, index: int, choice: float) -> str:
        if index == 3 and choice:
            return "three"  # one word
        return f"{NUMBERS[index]} said {'once' if choice == 0 else f'{choice:.6f}'}"


def test_rewrites_are_a_few_fixed_captions_of_an_image():
    def texts(rewrites: int, position: int, seed: int = 3) -> list[str]:
        extras = Captions(rewrites)
        data = ViewedDataset(Worded(), CenterCrop(8, share=1.0), extras=extras, tokenizer=LONGER, seed=seed)
        return [read(data[[SampleKey(epoch, position)]], LONGER)[0] for epoch in range(60)]

    counts = Counter(texts(3, 4))
    assert len(counts) == 4
    assert counts["four said once"] > 0
    assert min(counts.values()) > 5  # 15 are expected of each
    assert set(texts(3, 4)) == set(counts)
    assert set(texts(1, 4)) < set(counts)  # more rewrites are further ones
    assert set(texts(0, 4)) == {"four said once"}
    assert set(texts(3, 5)) != {text.replace("four", "five") for text in counts}  # each image has its own
    assert set(texts(3, 3)) == {"three said once"}  # a word is no rewrite


class Listed(TextListSource, Numbered):
    """Images with a list of texts: the first caption, four rewrites, one of them a single word, and a sixth text."""

    def raw_texts(self, index: int) -> list[str]:
        return [f"{NUMBERS[index]} first", "second it is", "third it is", "word", "fifth it is", "sixth"][
            : 6 - index % 2
        ]


def test_rewrites_that_a_source_lists_are_drawn_alike():
    """LaCLIP's file format: one of the original and four rewrites, each in a fifth of the epochs. Drawing any text for
    four of five numbers would return the original in 1/5 + 4/5 * 1/6 of them, and the sixth text too."""
    data = ViewedDataset(Listed(), CenterCrop(8, share=1.0), extras=Captions(4), tokenizer=LONGER, seed=3)
    counts = Counter(read(data[[SampleKey(epoch, 4)]], LONGER)[0] for epoch in range(500))
    assert set(counts) == {"four first", "second it is", "third it is", "fifth it is"}
    # "word" is discarded for the original
    expected = {"four first": 200, "second it is": 100, "third it is": 100, "fifth it is": 100}
    for text, count in expected.items():
        assert abs(counts[text] - count) < 4 * (500 * count / 500 * (1 - count / 500)) ** 0.5, text
    few = ViewedDataset(Listed(), CenterCrop(8, share=1.0), extras=Captions(9), tokenizer=LONGER, seed=3)
    assert len({read(few[[SampleKey(epoch, 5)]], LONGER)[0] for epoch in range(100)}) == 4


@pytest.mark.parametrize("bad", [{"silent": (2, 5)}, {"broken": (2, 5)}])
def test_an_image_and_its_caption_are_replaced_together(bad):
    batch = dataset(**bad)[[SampleKey(0, position) for position in range(10)]]
    assert batch["replaced"].nonzero().flatten().tolist() == [2, 5]
    for text, grey in zip(read(batch), batch["image"][:, 0, 0, 0], strict=True):
        assert text.startswith(NUMBERS[int(grey)])


def module(tmp_path, source=None, **options) -> DataModule:
    settings = {
        "source": source or partial(ScenesSource, count=12, resolution=16, texts=SceneTexts(wordings=(0, 1))),
        "train_view": RandomResizedCrop(16),
        "eval_view": CenterCrop(16),
        "batch_size": 4,
        "num_workers": 0,
        "tokenizer_file": tmp_path / "tokenizer.json",
        "text_length": 48,
        "vocabulary": 320,
    }
    return DataModule(extras=Captions(), **{**settings, **options})


def test_scenes_come_with_their_texts(tmp_path):
    data = module(tmp_path)
    data.prepare_data()
    batch = next(iter(data.train_dataloader()))
    batch = data.on_after_batch_transfer(batch, 0)
    validate(batch, data.batch_type)
    assert data.batch_type is ImageTextBatch
    assert (tmp_path / "tokenizer.json").exists()
    for index, text in zip(batch["index"].tolist(), data.tokenizer.decode(batch["text"]), strict=True):
        first, *others = data.train_source.scene(index).objects
        meant = captions._SYNONYMS
        assert any(f"{color} {kind}" in text for color in meant[first.color] for kind in meant[first.kind.name])
        named = {name for name, words in meant.items() if any(word in text for word in words)}
        assert {kind.name for kind in KINDS} & named <= {first.kind.name, *(other.kind.name for other in others)}
    again = module(tmp_path, tokenizer_file=tmp_path / "tokenizer.json")
    assert torch.equal(next(iter(again.train_dataloader()))["text"], batch["text"])


def test_evaluation_captions_are_true_different_and_fixed():
    source = ScenesSource("val", count=6, resolution=16, texts=SceneTexts(style="alt", mismatched=1.0))
    for index in range(6):
        texts = source.captions(index)
        assert texts == source.captions(index)
        assert len(set(texts)) == len(texts) == 5


def test_wordings_can_be_reserved_for_evaluation():
    texts = SceneTexts(wordings=(1,), judged_wordings=(5,))
    source = ScenesSource("val", count=20, resolution=16, texts=texts)
    for index in range(20):
        several = len(source.scene(index).objects) > 1
        assert source.captions(index) == source.captions(index)
        assert all((" and " in text) == several for text in source.captions(index))
        assert not any(" and " in source.caption(index, choice) for choice in (0.0, 0.3, 0.9))


def test_another_run_s_tokenizer_is_copied(tmp_path):
    first = module(tmp_path / "first", tokenizer_file=tmp_path / "first" / "tokenizer.json")
    first.prepare_data()
    checkpoint = tmp_path / "first" / "checkpoints" / "last.ckpt"
    for number, origin in enumerate((tmp_path / "first", checkpoint)):
        file = tmp_path / str(number) / "tokenizer.json"
        other = partial(ScenesSource, count=3, resolution=16, seed=9)  # would have taught it other words
        second = module(tmp_path, other, tokenizer_file=file, tokenizer_from=origin)
        second.prepare_data()
        assert file.read_text() == (tmp_path / "first" / "tokenizer.json").read_text()
        assert torch.equal(second.tokenizer(["a red star"])[0], first.tokenizer(["a red star"])[0])
        # once it is there, where it came from may be gone
        module(tmp_path, tokenizer_file=file, tokenizer_from=tmp_path / "gone").prepare_data()
    with pytest.raises(ValueError, match=r"data.tokenizer_from=.*gone: that run has no tokenizer.json"):
        module(
            tmp_path, tokenizer_file=tmp_path / "new.d" / "tokenizer.json", tokenizer_from=tmp_path / "gone"
        ).prepare_data()


def test_invalid_settings_are_refused_by_their_key(tmp_path):
    class Mute(Source):
        def __init__(self, split: str) -> None: ...

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int): ...

        def name(self, index: int) -> str:
            return ""

    with pytest.raises(ValueError, match=r"data.source: Mute has no captions"):
        module(tmp_path, source=Mute).train_dataloader()
    with pytest.raises(ValueError, match=r"data.vocabulary=100: the tokenizer has 2\d\d ids"):
        module(tmp_path, vocabulary=100).prepare_data()  # the bytes alone are more
    with pytest.raises(ValueError, match=r"data.tokenizer: name a tokenizer"):
        module(tmp_path, tokenizer_file=None)
    with pytest.raises(ValueError, match=r"data.extras.rewrites=-1"):
        Captions(rewrites=-1)
    views = MultiView({"one": Augmented(RandomResizedCrop(16), Color())})
    with pytest.raises(ValueError, match=r"data.train_view: captions go with a view that makes an ImageBatch"):
        _ = module(tmp_path, train_view=views).batch_type
    for wrong, said in (
        ({"style": "loud"}, "not 'loud'"),
        ({"wordings": (99,)}, "0 to 5"),
        ({"judged_wordings": ()}, "0 to 5"),
        ({"junk": 1.5}, "junk must be a share"),
        ({"judged": 0}, "judged must be at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            SceneTexts(**wrong)


def encoded(grey: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def pairs(tmp_path):
    """Twelve images of one gray level each with captions: one is missing, one truncated, one has no caption, one a
    text of another encoding, one a text that is too long."""
    for number in (0, *range(2, 12)):
        data = encoded(number)
        (tmp_path / f"{number}.png").write_bytes(data[:40] if number == 2 else data)
    texts = [f"number {number}".encode() for number in range(12)]
    texts[3], texts[4], texts[5] = b"", "fünf".encode("latin-1"), b"number 5 " + b"and more " * 200
    rows = [f"{number}.png,".encode() + text for number, text in enumerate(texts)]
    (tmp_path / "pairs.csv").write_bytes(b"\n".join([b"image,caption", *rows]))
    return partial(CaptionListSource, root=tmp_path, files="pairs.csv", val_share=0.0)


def test_bad_entries_of_a_list_are_replaced_and_logged(tmp_path, pairs, caplog):
    log = tmp_path / "bad.tsv"
    data = module(tmp_path, pairs, train_view=CenterCrop(8, share=1.0), batch_size=12, bad_log=log, text_length=24)
    with caplog.at_level(logging.WARNING):
        batch = next(iter(data.train_dataloader()))
    assert sorted(batch["index"][batch["replaced"]].tolist()) == [1, 2, 3, 4]
    for grey, text in zip(batch["image"][:, 0, 0, 0].tolist(), data.tokenizer.decode(batch["text"]), strict=True):
        assert text.startswith(f"number {grey}")
    listed = dict(line.split("\t") for line in log.read_text().splitlines())
    said = {1: "the file does not exist", 2: "not an image", 3: "it has no caption", 4: "its text is not valid UTF-8"}
    assert set(listed) == {str(tmp_path / f"{number}.png") for number in said}
    for number, reason in said.items():
        assert reason in listed[str(tmp_path / f"{number}.png")]
        assert f"replaced {tmp_path}/{number}.png" in caplog.text


def test_a_long_caption_is_truncated_before_its_end_token(tmp_path, pairs):
    data = module(tmp_path, pairs, train_view=CenterCrop(8, share=1.0), batch_size=12, text_length=16)
    batch = next(iter(data.train_dataloader()))
    (row,) = [row for row, index in enumerate(batch["index"].tolist()) if index == 5]
    ids, mask = batch["text"][row], batch["text_mask"][row]
    whole = data.tokenizer.inner("number 5 " + "and more " * 200)["input_ids"]
    assert len(whole) > 16
    assert ids.tolist() == [*whole[:15], data.tokenizer.end]
    assert mask.all()


def test_a_loader_of_captioned_shards_resumes(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as tar:
            for number in range(10 * shard, 10 * shard + 10):
                for name, content in ((f"{number}.jpg", encoded(10 * number)), (f"{number}.txt", b"is %d" % number)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    source = partial(CaptionedWebDatasetSource, shards=f"{tmp_path}/*.tar", val_share=0.0)
    data = module(tmp_path, source, train_view=CenterCrop(8, share=1.0), batch_size=4, text_length=24)
    loader = data.train_dataloader()
    batches, states = [], []
    for batch in loader:
        batches.append(batch)
        states.append(loader.state_dict())
    assert sorted(torch.cat([batch["index"] for batch in batches]).tolist()) == list(range(20))
    assert any(batch["index"].min() < 10 <= batch["index"].max() for batch in batches)  # of both shards
    for batch in batches:
        texts = data.tokenizer.decode(batch["text"])
        assert texts == [f"is {int(grey) // 10}" for grey in batch["image"][:, 0, 0, 0]]
    again = module(
        tmp_path, source, train_view=CenterCrop(8, share=1.0), batch_size=4, text_length=24
    ).train_dataloader()
    again.load_state_dict(states[1])
    rest = list(again)
    assert len(rest) == 3
    for mine, other in zip(rest, batches[2:], strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in other)


def test_the_text_filter_applies_to_training_alone(tmp_path):
    texts = SceneTexts(style="alt", dropped=0.8, variants=1)
    source = partial(ScenesSource, count=24, resolution=16, texts=texts)
    data = module(tmp_path, source, text_filter=TextFilter(max_images=None, min_words=2), batch_size=2)
    told = [source("train").all_texts(index)[0] for index in range(24)]
    expected = {text.lower() for text in told if len(text.split()) >= 2}
    assert 2 <= len(data.train_source) < 24
    seen = [text for batch in data.train_dataloader() for text in data.tokenizer.decode(batch["text"])]
    assert len(seen) == len(data.train_source) // 2 * 2
    assert set(seen) <= expected
    assert isinstance(data.val_source, ScenesSource)
    assert len(data.val_source) == 24


def test_every_captioned_data_set_fits_an_experiment(tmp_path):
    (tmp_path / "train2017").mkdir()
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    for folder in ("train2017", "val2017", "flickr30k-images", "train2014"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "1.png").write_bytes(encoded(1))
    coco = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"image_id": 1, "caption": "a thing"}]}
    for split in ("train", "val"):
        (tmp_path / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(coco))
    entry = {"filename": "1.png", "split": "train", "sentences": [{"raw": "a thing"}]}
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": [entry]}))
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": [{**entry, "filepath": "train2014"}]}))
    (tmp_path / "pairs.csv").write_text("image,caption\ntrain2017/1.png,a thing")
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, content in (("1.jpg", encoded(1)), ("1.txt", b"a thing")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "1.png").write_bytes(encoded(1))
    (tmp_path / "hub" / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a thing"}')
    settings = {
        "pairs": {"files": "pairs.csv", "val_share": 0.0},
        "coco": {},
        "coco_karpathy": {},
        "flickr30k": {},
        "img2dataset": {"cache_dir": None, "val_share": 0.0},
        "huggingface_text": {"path": str(tmp_path / "hub"), "text_key": "text", "val_share": 0.0},
    }
    words = [
        "experiment=clip_vitb32",
        "scale=tiny",
        "data=pairs",
        "data.source.files=a.csv",
        f"paths.data='{tmp_path}'",
    ]
    config = train.compose(words)
    configuration.check_complete(config)
    assert config.data._target_ == "src.datamodules.datamodule.DataModule"
    for name, chosen in settings.items():
        config.data.source = OmegaConf.load(configuration.CONFIGS / "data" / f"{name}.yaml").source
        config.data.source.update(chosen)
        source = configuration.instantiate(config.data).train_source
        assert isinstance(source, CaptionedSource), name
        assert [source.captions(index) for index in range(len(source))] == [["a thing"]], name
        assert "label" not in source[0]
