"""Ranks by hand, ties, several texts an image."""

import pytest
import torch
from torch.nn.functional import normalize

from src.evaluation.errors import BadFeatures
from src.evaluation.retrieval import ranks, retrieval
from src.evaluation.zero_shot import class_scores, classifier, mean_per_class, within


def test_ranks_by_hand():
    keys = torch.eye(3)
    query = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    # the first query owns key 1: one is before it; the second owns keys 0 and 2, of which the better is first
    assert ranks(query, keys, torch.tensor([1, 0]), torch.tensor([0, 1, 0])).tolist() == [1, 0]


def test_an_earlier_tied_key_comes_before():
    same = torch.ones(4, 2)
    rows = torch.arange(4)
    assert ranks(same, same, rows, rows).tolist() == [0, 1, 2, 3]
    assert retrieval(same, same, rows, ks=(1,))["i2t_r1"] == 0.25


def test_any_of_an_image_s_texts_counts_and_each_text_on_its_own():
    image = torch.eye(2)
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 0.9], [0.6, 0.8]])
    found = retrieval(image, text, torch.tensor([0, 0, 1, 1]), ks=(1, 2))
    # image 0's own first text is best; image 1's best is of image 0 (1.0), its own 0.9 comes second
    assert (found["i2t_r1"], found["i2t_r2"]) == (0.5, 1.0)
    # texts 0, 2 and 3 find their image, text 1 finds the other
    assert (found["t2i_r1"], found["t2i_r2"]) == (0.75, 1.0)
    assert found["rsum"] == pytest.approx(325)


def test_chunks_change_nothing():
    generator = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(n, 6, generator=generator, dtype=torch.float64), dim=1) for n in (20, 60))
    owner = torch.arange(60) % 20
    assert retrieval(image, text, owner, chunk=7) == retrieval(image, text, owner)


def test_what_belongs_nowhere_is_refused():
    for owner in ([0, 0], [0, 2]):
        with pytest.raises(ValueError, match="every image needs a text"):
            retrieval(torch.eye(2), torch.eye(2), torch.tensor(owner))


def test_prompts_are_normalized_before_and_after_their_mean():
    vectors = {"a cat": [3.0, 0.0], "the cat": [0.0, 1.0], "a dog": [-1.0, 0.0], "the dog": [-1.0, 0.0]}
    weights = classifier(["cat", "dog"], lambda texts: torch.tensor([vectors[t] for t in texts]), ["a {}", "the {}"])
    torch.testing.assert_close(weights, torch.tensor([[0.5**0.5, 0.5**0.5], [-1.0, 0.0]]))
    image, labels = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    assert within(image @ weights.T, labels) == pytest.approx(1 / 3)
    assert within(image @ weights.T, labels, k=2) == 1
    assert within(torch.zeros(3, 2), labels) == pytest.approx(2 / 3)  # ties: class 0 is nearer
    with pytest.raises(ValueError, match=r"one \{\} for the name"):
        classifier(["cat"], lambda texts: torch.eye(1), ["a cat"])


def test_accuracy_per_class_weighs_classes_alike():
    """Of three images of class 0 two are right, of one of class 2 none: (2/3 + 0) / 2."""
    scores = torch.eye(3)[[0, 0, 1, 1]]
    assert mean_per_class(scores, torch.tensor([0, 0, 0, 2])) == pytest.approx(1 / 3)
    assert within(scores, torch.tensor([0, 0, 0, 2])) == 0.5


def test_prompts_are_encoded_in_parts_that_change_nothing():
    vector_of = lambda text: torch.tensor([len(text), text.count("a"), 1.0])  # noqa: E731
    asked: list[int] = []

    def encode(texts):
        asked.append(len(texts))
        return torch.stack([vector_of(text) for text in texts])

    templates, names = ["a {}"] * 99 + ["the {}"], [f"{'ab' * number}" for number in range(1, 6)]
    found = classifier(names, encode, templates)
    one_by_one = [normalize(torch.stack([vector_of(t.format(name)) for t in templates]), dim=1) for name in names]
    expected = normalize(torch.stack([vectors.mean(dim=0) for vectors in one_by_one]), dim=1)
    torch.testing.assert_close(found, expected)
    assert asked == [200, 200, 100]


def test_templates_may_be_averaged_as_scores():
    """Two prompts of each class and a similarity that is no product: the greatest share. The mean vector of "cat" would
    be (0.5, 0.5), with 0.5 for the first image; its scores are 1 and 0.2."""
    vectors = {"a cat": [1.0, 0.0], "the cat": [0.0, 1.0], "a dog": [0.7, 0.0], "the dog": [0.7, 0.0]}

    def similarity(query, keys):
        return (query[:, None] * keys).amax(dim=2)

    image = torch.tensor([[1.0, 0.2], [0.4, 0.1]])
    encode = lambda texts: torch.tensor([vectors[t] for t in texts])  # noqa: E731
    scores = class_scores(image, ["cat", "dog"], encode, similarity, ["a {}", "the {}"])
    torch.testing.assert_close(scores, torch.tensor([[0.6, 0.7], [0.25, 0.28]]))
    assert within(scores, torch.tensor([1, 0])) == 0.5
    with pytest.raises(ValueError, match=r"one \{\} for the name"):
        class_scores(image, ["cat"], encode, similarity, ["a cat"])


def test_ranks_by_another_similarity():
    keys = torch.eye(3)
    query = torch.tensor([[0.9, 0.5, 0.1]])
    opposite = ranks(query, keys, torch.tensor([0]), torch.arange(3), similarity=lambda q, k: -(q @ k.T))
    assert opposite.tolist() == [2]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_scores_are_refused(value):
    """Comparisons with NaN are false, so that counting what is greater would find nothing before the right answer."""
    scores, labels = torch.full((3, 4), value), torch.tensor([0, 1, 2])
    with pytest.raises(BadFeatures, match="the class scores of 3 of 3 images are NaN or infinite"):
        within(scores, labels)
    rows = torch.full((3, 4), value)
    with pytest.raises(BadFeatures, match="similarities of images and texts are NaN or infinite"):
        ranks(rows, rows, torch.arange(3), torch.arange(3))
