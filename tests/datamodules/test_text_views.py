"""Further views of an image beside it, and augmented texts."""

import numpy as np
import pytest
import torch

from src.datamodules.batches.base import validate
from src.datamodules.batches.image_text import ImageTextViewsBatch
from src.datamodules.datamodule import DataModule
from src.datamodules.extras.augmented_captions import AugmentedCaptions
from src.datamodules.extras.captions import Captions
from src.datamodules.scenes.source import ScenesSource
from src.datamodules.text.augment import (
    delete_words,
    read_synonyms,
    remove_stop_words,
    replace_synonym,
    swap_words,
)
from src.datamodules.views.image import CenterCrop, RandomResizedCrop
from src.datamodules.views.multi import Augmented, ImageAndViews, MultiView

WEAK = Augmented(RandomResizedCrop(16, scale=(0.5, 1.0), flip=0.0))
STRONG = Augmented(RandomResizedCrop(24, scale=(0.1, 1.0)), count=2)
VIEW = ImageAndViews({"strong": STRONG}, {"small": Augmented(RandomResizedCrop(8))}, image=WEAK)


def test_image_and_views_are_those_of_each_view_alone():
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    numbers = np.random.default_rng(0).random((3, VIEW.num_uniforms), dtype=np.float32)
    batch = VIEW.from_decoded(images, numbers)
    first, *others = np.split(numbers, 4, axis=1)
    assert torch.equal(batch["image"], WEAK.from_decoded(images, first)["image"])
    together = MultiView({"strong": STRONG}, VIEW.local_views).from_decoded(images, np.concatenate(others, axis=1))
    assert torch.equal(batch["views"], together["views"])
    assert torch.equal(batch["local_views"], together["local_views"])
    small = ImageAndViews({}, VIEW.local_views, image=WEAK)
    assert set(small.from_decoded(images, numbers[:, : small.num_uniforms])) == {"image", "local_views"}
    with pytest.raises(ValueError, match="views must be views of one size, got none"):
        ImageAndViews({}, image=WEAK)
    with pytest.raises(ValueError, match="record_crops=true is for a MultiView"):
        ImageAndViews({"strong": STRONG}, image=WEAK, record_crops=True)


def data(tmp_path, extras, view=VIEW) -> DataModule:
    return DataModule(
        source=lambda split: ScenesSource(split, count=8, resolution=16),
        train_view=view,
        eval_view=CenterCrop(16),
        extras=extras,
        tokenizer_file=tmp_path / "tokenizer.json",
        text_length=40,
        batch_size=4,
        num_workers=0,
    )


def test_batches_hold_the_caption_and_its_augmentations(tmp_path):
    module = data(tmp_path, AugmentedCaptions(count=3))
    assert module.batch_type is ImageTextViewsBatch
    assert data(tmp_path, Captions()).batch_type is ImageTextViewsBatch
    batch = module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0)
    validate(batch, ImageTextViewsBatch)
    assert batch["text_views"].shape == (4, 3, 40)
    source, position = module.train_source, int(batch["index"][0])
    unchanged = AugmentedCaptions(stop_words=0.0, synonym=0.0, swap=0.0, deletion=0.0)
    caption = Captions().read(source, position, 0.3, 0)
    assert unchanged.read(source, position, 0.3, 0) == [caption] * 3
    assert len(set(AugmentedCaptions(several=True).read(source, position, 0.3, 0))) == 3
    assert AugmentedCaptions().read(source, position, 0.3, 0) == AugmentedCaptions().read(source, position, 0.3, 0)
    texts = {tuple(AugmentedCaptions().read(source, position, choice, 0)) for choice in (0.1, 0.2, 0.3)}
    assert len(texts) == 3


def test_operations_change_what_they_say(tmp_path):
    rng = np.random.default_rng(0)
    assert remove_stop_words("There is a red disc, and the ring") == "red disc , ring"
    assert remove_stop_words("it is what it is") == "it is what it is"
    assert sorted(swap_words("one red disc", rng).split()) == ["disc", "one", "red"]
    assert swap_words("one red disc", rng) != "one red disc"
    assert swap_words("disc", rng) == "disc"
    kept = [len(delete_words(" ".join("abcdefghij"), 0.1, rng).split()) for _ in range(500)]
    assert np.mean(kept) == pytest.approx(9, abs=0.1)
    assert delete_words("disc", 1.0, rng) == "disc"
    file = tmp_path / "synonyms.txt"
    file.write_text("disc, circle\n\nred, crimson, scarlet\n")
    synonyms = read_synonyms(file)
    assert synonyms == {
        "disc": ["circle"],
        "circle": ["disc"],
        **{k: v for k, v in synonyms.items() if k not in "disc circle"},
    }
    assert synonyms["red"] == ["crimson", "scarlet"]
    assert replace_synonym("a disc near a disc", synonyms, rng) == "a circle near a circle"
    assert replace_synonym("a star", synonyms, rng) == "a star"
    file.write_text("disc\n")
    with pytest.raises(ValueError, match="line 1 has one word"):
        AugmentedCaptions(synonyms=file)
    with pytest.raises(ValueError, match=r"data.extras.synonyms=/none cannot be read"):
        AugmentedCaptions(synonyms="/none")
    with pytest.raises(ValueError, match=r"data.extras.stop_words is a probability, got 2"):
        AugmentedCaptions(stop_words=2)
    with pytest.raises(ValueError, match=r"data.extras.count must be at least 1"):
        AugmentedCaptions(count=0)
    with pytest.raises(ValueError, match=r"weights synonym, swap and deletion"):
        AugmentedCaptions(swap=-1.0)
