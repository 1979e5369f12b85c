"""A pair of towers that reads numbers off pictures and texts is judged perfect, one that says nothing at chance."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from src.datamodules.image_text import ImageTextDataModule
from src.datamodules.views.image import CentreCrop
from src.evaluation.image_text import ImageTextEvaluation
from tests.datamodules.test_image_text import NUMBERS, TOKENIZER, Numbered


class Reader(nn.Module):
    """Counts: a picture's grey value, and the number that a text names."""

    def __init__(self, data: ImageTextDataModule, blind: bool = False) -> None:
        super().__init__()
        self.data, self.blind = data, blind
        self.dropout = nn.Dropout()

    def encode_image(self, image: Tensor) -> Tensor:
        assert not self.training
        grey = (self.data.denormalise(image)[:, 0, 0, 0] * 255).round().long()
        return one_hot(grey, 12).float() if not self.blind else torch.ones(len(image), 12)

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor:
        numbers = []
        for words in self.data.tokenizer.decode(text):
            named = [NUMBERS.index(word) for word in words.split() if word in NUMBERS]
            numbers.append(named[0] if named else 11)
        return one_hot(torch.tensor(numbers), 12).float() if not self.blind else torch.ones(len(text), 12)


class Named(Numbered):
    """Classes are the numbers themselves."""

    classes = tuple(NUMBERS)

    def __getitem__(self, index: int):
        return {**super().__getitem__(index), "label": index}


def data(tmp_path, **options) -> ImageTextDataModule:
    view = CentreCrop(8, share=1.0)
    made = ImageTextDataModule(
        source=partial(Named, **options),
        train_view=view,
        eval_view=view,
        batch_size=2,
        eval_batch_size=4,
        num_workers=0,
        tokenizer_file=tmp_path / "tokenizer.json",
        text_length=12,
    )
    made._tokenizer = TOKENIZER
    return made


def test_towers_that_agree_find_everything(tmp_path):
    made = data(tmp_path)
    reader = Reader(made).train()
    scores = ImageTextEvaluation(templates=["{}", "once {}"])(reader, made, torch.device("cpu"))
    assert reader.training
    for name in ("zeroshot_top1", "zeroshot_top5", "retrieval_i2t_r1", "retrieval_t2i_r1", "retrieval_t2i_r10"):
        assert scores[name] == 1, name
    assert scores["gap"] < 1e-6


def test_towers_that_say_nothing_are_at_chance(tmp_path):
    made = data(tmp_path)
    scores = ImageTextEvaluation(templates=["{}"])(Reader(made, blind=True), made, torch.device("cpu"))
    assert scores["zeroshot_top1"] == 0.1
    assert (scores["retrieval_i2t_r1"], scores["retrieval_t2i_r1"]) == (0.1, 0.1)


def test_pictures_that_cannot_be_read_are_not_judged(tmp_path):
    made = data(tmp_path, broken=(3, 7))
    scores = ImageTextEvaluation(templates=["{}"])(Reader(made), made, torch.device("cpu"))
    assert scores["retrieval_i2t_r1"] == 1
    assert scores["retrieval_rsum"] == 600
