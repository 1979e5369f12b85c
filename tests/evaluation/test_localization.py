"""The pointing game on maps by hand, and on a world in which a tower sees exactly what is named."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.datamodules.datamodule import DataModule
from src.datamodules.extras.captions import Captions
from src.datamodules.scenes import captions
from src.datamodules.scenes.source import ScenesSource
from src.datamodules.sources.source import Grounding
from src.datamodules.views.image import CenterCrop
from src.errors import SettingError
from src.evaluation.errors import BadFeatures, NotApplicable
from src.evaluation.localization import Localization
from tests.datamodules.test_image_text import TOKENIZER, Numbered
from tests.evaluation.toy import towers

CPU = torch.device("cpu")
TEXT = "zero one said two"  # the things: "one" fills a quarter, "two" an eighth, "zero" is not to be seen


class Grounded(Numbered):
    """Images of 8 x 8: a quarter is 1, in one of two corners, half of the opposite quarter is 2, elsewhere is 0."""

    def __getitem__(self, index: int):
        if index in self.broken:
            return super().__getitem__(index)
        masks = self.grounding(index).masks
        return {"image": (masks[1] * 1 + masks[2] * 2).to(torch.uint8).expand(3, -1, -1).contiguous(), "label": 0}

    def grounding(self, index: int) -> Grounding:
        masks = torch.zeros(3, 8, 8, dtype=torch.bool)
        masks[1, :4, :4] = True
        masks[2, 4:, 4:6] = True
        if index % 2:
            masks = masks.flip(1)
        spans = tuple(
            (TEXT.index(word), TEXT.index(word) + len(word), i) for i, word in enumerate(("zero", "one", "two"))
        )
        return Grounding(TEXT, spans, masks)


class Pixels(nn.Module):
    """Patches of 2 x 2 by what they show, one axis each; phrases by what they name."""

    def __init__(self, data: DataModule, wrong: bool = False) -> None:
        super().__init__()
        self.data, self.wrong = data, wrong

    def encode_patches(self, image: Tensor) -> Tensor:
        assert not self.training
        shown = (self.data.denormalize(image)[:, 0] * 255).round().long()
        return F.avg_pool2d(F.one_hot(shown, 3).permute(0, 3, 1, 2).float(), 2).permute(0, 2, 3, 1)

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor:
        named = [["zero", "one", "two"].index(words) for words in self.data.tokenizer.decode(text)]
        return F.one_hot(torch.tensor(named), 3).float() * (-1 if self.wrong else 1)


class Words(Pixels):
    """Reads the whole text, word by word."""

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor:
        raise AssertionError("words are read in their text")

    def encode_words(self, text: Tensor, mask: Tensor) -> Tensor:
        assert self.data.tokenizer.decode(text)[0] == TEXT
        vectors = torch.zeros(*text.shape, 3)
        for row, ids in enumerate(text):
            for place, token in enumerate(ids.tolist()):
                word = self.data.tokenizer.inner.decode([token]).strip()
                if word in ("zero", "one", "two"):
                    vectors[row, place, ["zero", "one", "two"].index(word)] = 1
        return vectors


def data(tmp_path, source=Grounded, **options) -> DataModule:
    view = CenterCrop(8, share=1.0)
    made = DataModule(
        extras=Captions(),
        source=partial(source, **options),
        train_view=view,
        eval_view=view,
        batch_size=2,
        eval_batch_size=4,
        num_workers=0,
        tokenizer_file=tmp_path / "tokenizer.json",
        text_length=12,
    )
    made.tokenizer = TOKENIZER
    return made


@pytest.mark.parametrize("tower", [Pixels, Words])
def test_a_perfect_map_points_at_the_named_object(tmp_path, tower):
    made = data(tmp_path, broken=(3,))
    module = tower(made).train()
    scores = Localization()(towers(module, made))
    assert module.training
    assert scores["localization_pointing"] == 1
    assert scores["localization_chance"] == pytest.approx((4 / 16 + 2 / 16) / 2)  # of the things that are seen
    assert scores["localization_iou"] == 1  # interpolation is at the half where a thing ends


def test_an_inverted_map_does_not_point_at_the_object(tmp_path):
    made = data(tmp_path)
    scores = Localization(threshold=1.0)(towers(Pixels(made, wrong=True), made))
    assert scores["localization_pointing"] == 0


def test_maps_by_hand():
    """A thing in the left half of 4 x 4; the second map's highest value is on the right, and its left column is above
    the middle too. Halves are compared at the size of the image, where a quarter of each half is in between."""
    masks = torch.zeros(2, 4, 4)
    masks[:, :, :2] = 1
    maps = torch.tensor([[[1.0, -1.0], [1.0, -1.0]], [[0.6, 1.0], [0.0, 0.0]]])
    rows = Localization()._scores(maps, masks)
    assert rows[:, 0].tolist() == [1, 0]
    assert rows[:, 1].tolist() == [0.5, 0.5]
    assert rows[0, 2] == 1
    # along the first and second row 0.6 0.7 0.9 1 times 1 and 3/4: all said but 0.45; below a quarter of it: none
    assert rows[1, 2].item() == pytest.approx(3 / (8 + 4))


def test_scenes_know_which_words_name_an_object(tmp_path):
    source = ScenesSource("val", count=12, resolution=16, fields=("instance_masks",))
    several = 0
    for index in range(12):
        text, spans, masks = source.grounding(index)
        assert text == source.captions(index)[0]
        assert torch.equal(masks, source[index]["fields"]["instance_masks"])
        objects = captions.facts(source.scene(index)).objects
        several += len(spans) > 1
        for begin, end, thing in spans:
            assert text[begin - 1] == " "
            assert text[:begin].split()[-1] in ("a", "an")
            named = text[begin:end]
            kind = captions._SYNONYMS.get(objects[thing].kind, (objects[thing].kind,))
            assert named.endswith(kind), (named, kind)
    assert several > 3


def test_a_token_s_place_is_found_in_its_text():
    texts = ["zero one", "two"]
    places = TOKENIZER.character_spans(texts)
    ids, mask = TOKENIZER(texts)
    assert places.shape == (2, 12, 2)
    for row, text in enumerate(texts):
        pieces = [text[begin:end] for begin, end in places[row].tolist()]
        assert "".join(pieces) == text
        assert not any(pieces[place] for place in range(12) if not mask[row, place])
        for place, piece in enumerate(pieces):
            if piece:
                assert TOKENIZER.inner.decode([int(ids[row, place])]) == piece


def test_not_applicable_evaluations_are_refused(tmp_path):
    made = data(tmp_path)
    with pytest.raises(NotApplicable, match="a method that encodes patches and texts is needed, which Linear is not"):
        Localization()(towers(nn.Linear(1, 1), made))
    unknown = data(tmp_path, source=Numbered)
    with pytest.raises(
        NotApplicable, match=r"whose words name objects with masks are needed, .*Numbered \(data.source\) does not"
    ):
        Localization()(towers(Pixels(unknown), unknown))
    with pytest.raises(SettingError, match="threshold must be in"):
        Localization(threshold=0.0)


def test_non_finite_maps_are_refused(tmp_path):
    made = data(tmp_path)

    class Broken(Pixels):
        def encode_patches(self, image):
            return super().encode_patches(image) * torch.nan

    with pytest.raises(BadFeatures, match="similarities of patches and words are NaN or infinite"):
        Localization()(towers(Broken(made), made))
