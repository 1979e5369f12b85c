"""A pair of towers that reads numbers off images and texts is judged perfect, one that says nothing at chance."""

import hashlib
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import one_hot

from src import configuration
from src.configuration import CONFIGS
from src.datamodules.datamodule import DataModule
from src.datamodules.extras.captions import Captions
from src.datamodules.sources.source import HardNegative, Prompts, Source
from src.datamodules.views.image import CenterCrop
from src.errors import SettingError
from src.evaluation.errors import BadFeatures, NotApplicable
from src.evaluation.evaluation import Evaluation
from src.evaluation.geometry import Geometry
from src.evaluation.hard_negatives import HardNegatives
from src.evaluation.retrieval import Retrieval
from src.evaluation.zero_shot import ZeroShot
from tests.datamodules.test_image_text import NUMBERS, TOKENIZER, Numbered
from tests.evaluation.toy import towers


class Reader(nn.Module):
    """Counts: an image's grey value, and the number that a text names."""

    def __init__(self, data: DataModule, blind: bool = False) -> None:
        super().__init__()
        self.data, self.blind = data, blind
        self.dropout = nn.Dropout()

    def encode_image(self, image: Tensor) -> Tensor:
        assert not self.training
        grey = (self.data.denormalize(image)[:, 0, 0, 0] * 255).round().long()
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


class JudgedSource(Named):
    """Says how its classes are named, and what they are not."""

    prompts = Prompts(templates=("{} once", "{} twice"), single="once or twice")

    def mistakes(self, index: int) -> list[HardNegative]:
        other = NUMBERS[(index + 1) % 10]
        named = HardNegative("number", f"{NUMBERS[index]} said", f"{other} said")
        # the reader does not know what is said, so that both texts are the same to it
        return [named, HardNegative("saying", f"{NUMBERS[index]} said once", f"{NUMBERS[index]} said twice")]


def data(tmp_path, source: type = Named, **options) -> DataModule:
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


def everything(module: nn.Module, made: DataModule, *, negatives: int | None = 1000, **prompts) -> dict[str, float]:
    """The numbers of all evaluations that are applicable, of one subject."""
    evaluations: list[Evaluation] = [ZeroShot(**prompts), Retrieval(), HardNegatives(negatives), Geometry()]
    subject, scores = towers(module, made), {}
    for evaluation in evaluations:
        with suppress(NotApplicable):
            scores |= evaluation(subject)
    return scores


def test_towers_that_agree_are_perfect(tmp_path):
    made = data(tmp_path)
    reader = Reader(made).train()
    scores = everything(reader, made, templates=["{}", "once {}"])
    assert reader.training
    for name in ("zeroshot_top1", "zeroshot_top5", "retrieval_i2t_r1", "retrieval_t2i_r1", "retrieval_t2i_r10"):
        assert scores[name] == 1, name
    assert scores["gap"] < 1e-6


def test_constant_towers_are_at_chance(tmp_path):
    made = data(tmp_path)
    scores = everything(Reader(made, blind=True), made, templates=["{}"])
    assert scores["zeroshot_top1"] == 0.1
    assert (scores["retrieval_i2t_r1"], scores["retrieval_t2i_r1"]) == (0.1, 0.1)


class Untaught(Source):
    """Numbers without texts; training has gone without zero and one."""

    classes, held_out = tuple(NUMBERS), (0, 1)

    def __init__(self, split: str) -> None:
        self.split = split

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int):
        return {"image": torch.full((3, 8, 8), index, dtype=torch.uint8), "label": index}

    def name(self, index: int) -> str:
        return f"number/{index}"


def test_labelled_images_without_captions_are_enough(tmp_path):
    """A method that was trained on captions is evaluated on images in folders of classes."""
    view = CenterCrop(8, share=1.0)
    made, options = data(tmp_path), {"source": Untaught, "train_view": view, "eval_view": view, "batch_size": 2}
    bare = DataModule(extras=Captions(), tokenizer_file=tmp_path / "tokenizer.json", num_workers=0, **options)
    bare.tokenizer = TOKENIZER
    scores = ZeroShot(["{}"], name="mine")(towers(Reader(made), bare))
    assert (scores["mine_top1"], scores["mine_per_class_top1"]) == (1, 1)
    with pytest.raises(SettingError, match=r"Untaught has no captions"):
        bare.train_dataloader()
    # the names of the file are wrong for half of the classes: the reader takes these for "zero"
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"{name} it is" if number < 5 else "eleven" for number, name in enumerate(NUMBERS)))
    bare = DataModule(
        source=Untaught,
        train_view=view,
        eval_view=view,
        batch_size=2,
        num_workers=0,
        tokenizer="none",
        class_names=names,
    )
    bare.tokenizer = TOKENIZER
    assert ZeroShot(["{}"])(towers(Reader(made), bare))["zeroshot_top1"] == 0.5
    names.write_text("\n".join(NUMBERS[:9]))
    del bare.train_source
    with pytest.raises(SettingError, match="has 9 names; the data has 10 classes"):
        bare.train_source  # noqa: B018


def test_the_eighty_templates_are_those_of_the_authors_notebook():
    """SHA-256 of the sorted list in openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb, commit d05afc4."""
    config = OmegaConf.load(CONFIGS / "evaluation" / "zeroshot80.yaml")
    templates = configuration.instantiate(config).templates
    digest = hashlib.sha256("\n".join(sorted(templates)).encode()).hexdigest()
    assert digest == "a8a4822f2921936e2ef07cf2e7a5df69be9532aab2f3f4880156bb03563e2467"


class Prejudiced(Reader):
    """Takes every number for two before it takes it for itself, and one for zero as well."""

    def encode_image(self, image: Tensor) -> Tensor:
        found = super().encode_image(image)
        found[:, 0] += 2 * found[:, 1]
        found[:, 2] += 3.0
        return found


def test_unseen_classes_are_evaluated_among_themselves(tmp_path):
    view = CenterCrop(8, share=1.0)
    made = DataModule(source=Untaught, train_view=view, eval_view=view, batch_size=2, num_workers=0, tokenizer="none")
    made.tokenizer = TOKENIZER
    scores = everything(Prejudiced(made), made, templates=["{}"])
    assert scores["zeroshot_top1"] == pytest.approx(1 / 10)  # two alone
    assert scores["zeroshot_seen_top1"] == pytest.approx(1 / 8)  # of two to nine the same
    assert scores["zeroshot_unseen_top1"] == 0.5  # of zero and one zero, now that two is no answer
    assert not any(name.startswith(("retrieval", "gap", "geometry")) for name in scores)


class TokenReader(Reader):
    """Two rows each, of which one says nothing; what is compared is the greatest of both."""

    def encode_image(self, image: Tensor) -> Tensor:
        return torch.stack([super().encode_image(image), -torch.ones(len(image), 12)], dim=1)

    def encode_text(self, text: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([-torch.ones(len(text), 12), super().encode_text(text, mask)], dim=1)

    def similarity(self, query: Tensor, keys: Tensor) -> Tensor:
        return query.amax(dim=1) @ keys.amax(dim=1).T


def test_custom_similarity_is_used(tmp_path):
    made = data(tmp_path)
    scores = everything(TokenReader(made), made, templates=["{}", "once {}"])
    for name in ("zeroshot_top1", "zeroshot_top5", "retrieval_i2t_r1", "retrieval_t2i_r1", "retrieval_t2i_r10"):
        assert scores[name] == 1, name
    assert "gap" not in scores


def test_unreadable_images_are_left_out(tmp_path):
    made = data(tmp_path, broken=(3, 7))
    scores = everything(Reader(made), made, templates=["{}"])
    assert scores["retrieval_i2t_r1"] == 1
    assert scores["retrieval_rsum"] == 600


def test_hard_negatives_are_compared_with_right_texts(tmp_path):
    made = data(tmp_path, JudgedSource)
    scores = everything(Reader(made), made, single="{}")
    assert (scores["hardnegatives_number"], scores["hardnegatives_saying"]) == (1, 0.5)
    blind = everything(Reader(made, blind=True), made, single="{}", negatives=3)
    assert (blind["hardnegatives_number"], blind["hardnegatives_saying"]) == (0.5, 0.5)
    plain = data(tmp_path)
    assert not any(name.startswith("hardnegatives") for name in everything(Reader(plain), plain))


def test_images_of_hard_negatives_are_evenly_spaced(tmp_path):
    made, asked = data(tmp_path, JudgedSource), []
    mistakes = JudgedSource.mistakes
    made.val_source.mistakes = lambda index: asked.append(index) or mistakes(made.val_source, index)
    everything(Reader(made), made, single="{}", negatives=4)
    assert asked == [0, 2, 5, 7]


def test_prompts_of_the_data_are_the_default(tmp_path):
    """The source's single prompt has no place for the name: it is used, and refused."""
    made = data(tmp_path, JudgedSource)
    with pytest.raises(ValueError, match="got 'once or twice'"):
        everything(Reader(made), made)
    scores = everything(Reader(made), made, single="{} and nothing")
    assert (scores["zeroshot_top1"], scores["zeroshot_single_top1"]) == (1, 1)
    with pytest.raises(ValueError, match="got 'nothing'"):
        everything(Reader(made), made, single="{}", templates=["nothing"])


def test_an_ensemble_that_disagrees_with_the_single_prompt_is_reported_beside_it(tmp_path):
    """The reader takes every class for a three; of equal classes the first one counts."""
    made = data(tmp_path)
    scores = everything(Reader(made), made, templates=["{}"], single="three or {}")
    assert (scores["zeroshot_top1"], scores["zeroshot_single_top1"]) == (1, 0.1)


def test_geometry_pairs_each_image_with_its_first_caption(tmp_path):
    class Two(JudgedSource):
        def captions(self, index: int) -> list[str]:
            return [f"{NUMBERS[index]} said", "nothing"][: 1 + index % 2]

    made = data(tmp_path, Two)
    scores = everything(Reader(made), made, single="{}")
    assert scores["geometry_alignment"] == 0
    assert scores["gap"] < 1e-6  # of first captions alone: with "nothing" the mean caption would be another
    assert scores["geometry_positive_cosine"] == 1
    assert scores["geometry_uniformity_image"] == pytest.approx(-4)  # ten numbers, all at right angles
    assert scores["geometry_cross_uniformity"] == pytest.approx(-4)


def test_images_and_texts_are_encoded_once_for_all_evaluations(tmp_path):
    made, batches = data(tmp_path, JudgedSource), []

    class Counted(Reader):
        def encode_image(self, image: Tensor) -> Tensor:
            batches.append(len(image))
            return super().encode_image(image)

    everything(Counted(made), made, single="{}")
    assert sum(batches) == 10


def test_the_split_and_the_limit_are_the_subject_s(tmp_path):
    made = data(tmp_path)
    few = Retrieval()(towers(Reader(made, blind=True), made, query_samples=4, split="test"))
    assert few["retrieval_i2t_r1"] == 1 / 4
    with pytest.raises(SettingError, match=r"evaluate.split is val or test"):
        Retrieval()(towers(Reader(made), made, split="train"))


@pytest.mark.parametrize("evaluation", [ZeroShot(["{}"], "{}"), Retrieval(), HardNegatives(), Geometry()])
@pytest.mark.parametrize("tower", ["encode_image", "encode_text"])
def test_non_finite_vectors_are_refused_by_name(tmp_path, evaluation, tower):
    made = data(tmp_path, JudgedSource)
    reader = Reader(made)
    encode = getattr(reader, tower)
    setattr(reader, tower, lambda *inputs: encode(*inputs) * torch.nan)
    with pytest.raises(BadFeatures, match=f"{tower} gives NaN or infinite values for"):
        evaluation(towers(reader, made))


class Pair(NamedTuple):
    """A vector of an image, and context that the text sees."""

    vector: Tensor
    context: Tensor


class ContextReader(Reader):
    """Images are a vector and a row of their own, which the similarity adds up."""

    def encode_image(self, image: Tensor) -> Pair:
        vector = super().encode_image(image)
        return Pair(vector / 2, vector[:, None] / 2)

    def similarity(self, query: Pair | Tensor, keys: Pair | Tensor) -> Tensor:
        if isinstance(query, Tensor):
            return self.similarity(keys, query).T
        assert query.context.shape == (len(query.vector), 1, 12)
        return (query.vector + query.context.sum(dim=1)) @ keys.T


def test_rows_may_be_several_tensors(tmp_path):
    made = data(tmp_path, JudgedSource)
    scores = everything(ContextReader(made), made, templates=["{}", "once {}"], single="{}")
    for name in ("zeroshot_top1", "zeroshot_top5", "retrieval_i2t_r1", "retrieval_t2i_r1", "hardnegatives_number"):
        assert scores[name] == 1, name
    assert scores["hardnegatives_saying"] == 0.5
    assert "gap" not in scores


def test_not_applicable_says_what_is_missing(tmp_path):
    made = data(tmp_path)
    with pytest.raises(NotApplicable, match="an image tower and a text tower is needed, which Linear is not"):
        Retrieval()(towers(nn.Linear(1, 1), made))
    with pytest.raises(NotApplicable, match=r"captions with a mistake are needed, .*Named \(data.source\) does not"):
        HardNegatives()(towers(Reader(made), made))
    with pytest.raises(NotApplicable, match="geometry needs images and texts as vectors, which TokenReader lacks"):
        Geometry()(towers(TokenReader(made), made))
    view = CenterCrop(8, share=1.0)
    bare = DataModule(source=Untaught, train_view=view, eval_view=view, batch_size=2, num_workers=0, tokenizer="none")
    bare.tokenizer = TOKENIZER
    with pytest.raises(NotApplicable, match=r"captions are needed, which Untaught \(data.source\) does not have"):
        Retrieval()(towers(Reader(bare), bare))
