"""Captions are judged as the formulas say, and as COCO's code does."""

import math
from types import SimpleNamespace

import lightning as L
import pytest
from omegaconf import OmegaConf, open_dict
from torch import Tensor, nn

from src import evaluate, trained
from src.callbacks.online_evaluation import OnlineEvaluation
from src.configuration import CONFIGS
from src.datamodules.datamodule import DataModule
from src.errors import UserError
from src.evaluation.captions import Captioner, CaptionEvaluation, bleu4, cider_d, words
from src.evaluation.errors import NotApplicable
from src.evaluation.zero_shot import ZeroShot
from src.train import compose
from tests.datamodules.test_image_text import NUMBERS
from tests.evaluation.test_image_text import Reader, data
from tests.evaluation.toy import towers

CANDIDATES = [
    "a red ring left of a blue star",
    "this is a photo of a photo of a photo of a heart",
    "two things, the largest a striped cyan cross",
    "",
]
REFERENCES = [
    ["A red hoop left of a blue star.", "there is a crimson ring to the left of a star", "a red ring"],
    ["a photo of a heart", "this is a purple heart"],
    ["three things, the largest a striped turquoise plus sign", "two things, the largest a striped cyan cross"],
    ["a four-sided tile", "one can see a square"],
]


def test_texts_are_cut_into_words():
    assert words("A four-sided tile's edge, left (of it).") == ["a", "four-sided", "tile's", "edge", "left", "of", "it"]


def test_bleu_at_a_hand_worked_point():
    """Over both texts 8 of 8 words, and 4 of 6, 2 of 4 and 1 of 3 runs of two, three and four."""
    candidates = ["A red ring, left of it.", "a star"]
    references = [["a red ring left it of", "there is a red ring left"], ["a star", "a blue star is there"]]
    expected = ((8 / 8) * (4 / 6) * (2 / 4) * (1 / 3)) ** 0.25
    assert bleu4(candidates, references) == pytest.approx(expected)
    # too short, and nothing else
    assert bleu4(["a red ring left"], [["a red ring left of it."]]) == pytest.approx(math.exp(1 - 6 / 4))


@pytest.mark.parametrize(
    ("candidates", "references", "expected"),
    [
        (CANDIDATES, REFERENCES, 0.6312199276443707),
        # of six words, as far from five as from seven: the shorter reference, so that nothing is taken off
        (
            ["a red ring left of it", "a blue star"],
            [["a red ring left of it today", "the red ring left of"], ["a star", "there is a star"]],
            0.8442136251087429,
        ),
        (["a red ring", "a star"], [["a red star", "one ring"], ["a blue star"]], 3.498330123231561e-06),  # no 4-gram
    ],
)
def test_bleu_is_what_coco_s_code_says(candidates, references, expected):
    """The numbers are those of the class BleuScorer of pycocoevalcap 1.2 ("closest"), on the same words."""
    assert bleu4(candidates, references) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="BLEU-4: one candidate and at least one reference"):
        bleu4(candidates, references[:1])


def test_cider_at_a_hand_worked_point():
    """Two images, each word and pair in the texts of one of them, but for "a", which says nothing: its weight is 0.

    In units of log 2, the first candidate's words are (2 red, 1 ring) against (1, 1), clipped to (1, 1): a product of
    2 over the norms sqrt(5) and sqrt(2). Two of its three pairs are the two of the reference. It shares no longer run,
    and is a word longer.
    """
    candidates, references = ["a red red ring", "nothing"], [["a red ring"], ["a star"]]
    of_words = 2 / math.sqrt(5 * 2)
    of_pairs = 2 / math.sqrt(3 * 2)
    expected = 10 * (of_words + of_pairs + 0 + 0) / 4 * math.exp(-1 / 72) / 2
    assert cider_d(candidates, references) == pytest.approx(expected)


def test_cider_is_what_coco_s_code_says():
    """The number is that of the class CiderScorer of pycocoevalcap 1.2, on the same words."""
    assert cider_d(CANDIDATES, REFERENCES) == pytest.approx(2.971378923612959, abs=1e-12)


def test_cider_of_perfect_captions_and_of_one_image():
    said = [each[0] for each in REFERENCES if len(words(each[0])) >= 4]  # with runs of every length
    assert cider_d(said, [[text] for text in said]) == pytest.approx(10)
    assert cider_d(said[:1], [said[:1]]) == 0  # words that every image's texts have say nothing
    for wrong in ([], REFERENCES[:1], [*REFERENCES[:-1], []]):
        with pytest.raises(ValueError, match="at least one reference are needed for every image"):
            cider_d(CANDIDATES, wrong)


class Teller(nn.Module):
    """Reads an image's grey value and says what such images are said to be."""

    def __init__(self, made: DataModule, mute: bool = False) -> None:
        super().__init__()
        self.made, self.mute = made, mute
        self.dropout = nn.Dropout()

    def caption(self, image: Tensor, *, start: int, end: int, length: int, beams: int = 1) -> Tensor:
        assert not self.training
        grey = (self.made.denormalize(image)[:, 0, 0, 0] * 255).round().long()
        texts = [f"{NUMBERS[0 if self.mute else value]} said once and twice" for value in grey.tolist()]
        ids, mask = self.made.tokenizer(texts)
        assert ids.shape[1] == length
        assert (ids[:, 0] == start).all()
        return ids.masked_fill(~mask, end)


def test_generated_captions_are_compared_with_the_image_s_references(tmp_path):
    made = data(tmp_path, broken=(3,))
    teller, mute = Teller(made).train(), Teller(made, mute=True)
    assert isinstance(teller, Captioner)
    found, less = (CaptionEvaluation()(towers(each, made)) for each in (teller, mute))
    assert teller.training
    said = [f"{name} said once and twice" for name in NUMBERS if name != "three"]
    texts = [[f"{name} said once", f"{name} said twice"] for name in NUMBERS if name != "three"]
    assert found == {"captions_bleu4": bleu4(said, texts), "captions_cider": cider_d(said, texts)}
    assert found["captions_cider"] > less["captions_cider"] + 1
    made.tokenizer.inner.bos_token = None
    try:
        with pytest.raises(NotApplicable, match=r"a start and an end token is needed \(data.tokenizer\)"):
            CaptionEvaluation()(towers(teller, made))
    finally:
        made.tokenizer.inner.bos_token = "<start>"


class Both(L.LightningModule):
    """Two towers, and one who tells."""

    def __init__(self, made: DataModule) -> None:
        super().__init__()
        self.reader, self.teller = Reader(made), Teller(made)
        self.encode_image, self.encode_text, self.caption = (
            self.reader.encode_image,
            self.reader.encode_text,
            self.teller.caption,
        )
        self.logged: dict[str, float] = {}

    def log_dict(self, dictionary, **options) -> None:
        self.logged |= dictionary


def test_online_evaluation_includes_captions_if_configured(tmp_path):
    made = data(tmp_path)
    trainer = SimpleNamespace(
        received_sigterm=False, current_epoch=0, global_step=1, datamodule=made, precision="32-true", callbacks=[]
    )
    names = {}
    for captions in (None, CaptionEvaluation()):
        module = Both(made)
        evaluations = {"zeroshot": ZeroShot(["{}"]), "captions": captions}
        OnlineEvaluation(evaluations, every_n_epochs=1).on_train_epoch_end(trainer, module)
        names[captions is not None] = set(module.logged)
        assert module.logged["eval/zeroshot_top1"] == 1
    assert names[True] - names[False] == {"eval/captions_bleu4", "eval/captions_cider"}
    assert module.logged["eval/captions_cider"] == CaptionEvaluation()(towers(module, made))["captions_cider"]


def test_make_evaluate_runs_captions_alone_or_with_others(tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "load", lambda config, checkpoint: trained.fresh(config))
    small = ["scale=tiny", "data.source.count={train: 16, val: 8, test: 8}", "data.source.cache_dir=null"]

    def asked(experiment: str, *names: str) -> dict[str, float]:
        words = [f"experiment={experiment}", *small, f"run.dir={tmp_path}", "image_size=16", "trainer.accelerator=cpu"]
        config = compose(words)
        with open_dict(config):
            config.evaluate = OmegaConf.load(CONFIGS / "evaluate.yaml")
        return evaluate.evaluate(trained.RunSubject.configured(config, tmp_path / "none.ckpt"), names)["pairs"]

    assert set(asked("coca_vitb32", "captions")) == {"captions_bleu4", "captions_cider"}
    assert {"captions_cider", "zeroshot_top1", "gap"} <= set(asked("coca_vitb32", "zeroshot", "captions", "geometry"))
    with pytest.raises(UserError, match=r"EVAL=captions is not applicable: .*generates captions is needed, which CLIP"):
        asked("clip_vitb32", "retrieval", "captions")
