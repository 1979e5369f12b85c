"""Greedy decoding and beam search with a model of random but reproducible probabilities."""

import itertools

import pytest
import torch
from torch import Tensor

from src.models.text.generation import beam_search, greedy

END, VOCABULARY, LENGTH = 0, 4, 5


class RandomModel:
    """Logits of the next token are random numbers seeded by all tokens so far."""

    def __init__(self, start: Tensor, sharpness: float = 2.0) -> None:
        self.texts: list[tuple[int, ...]] = [() for _ in start]
        self.sharpness, self.calls = sharpness, 0

    def logits(self, text: tuple[int, ...]) -> Tensor:
        seed = sum((token + 1) * 17**position for position, token in enumerate(text))
        return self.sharpness * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))

    def __call__(self, last: Tensor) -> Tensor:
        self.calls += 1
        self.texts = [(*text, token) for text, token in zip(self.texts, last.tolist(), strict=True)]
        return torch.stack([self.logits(text) for text in self.texts])

    def reorder(self, rows: Tensor) -> None:
        self.texts = [self.texts[row] for row in rows.tolist()]


def texts(start: int) -> list[tuple[int, ...]]:
    """Returns all possible texts."""
    possible = []
    for tokens in itertools.product(range(VOCABULARY), repeat=LENGTH - 1):
        end = tokens.index(END) if END in tokens else len(tokens) - 1
        if all(token == END for token in tokens[end + 1 :]):
            possible.append((start, *tokens))
    return possible


def score(text: tuple[int, ...], penalty: float) -> float:
    model, total, count = RandomModel(torch.zeros(1)), 0.0, 0
    for position in range(1, LENGTH):
        total += model.logits(text[:position]).log_softmax(dim=0)[text[position]].item()
        count += 1
        if text[position] == END:
            break
    return total / count**penalty


STARTS = torch.tensor([1, 2, 3, 5, 8])


def beams(count: int, start: Tensor = STARTS, **options: float) -> Tensor:
    model = RandomModel(start.repeat_interleave(count))
    return beam_search(model, start, beams=count, end=END, length=LENGTH, **options)  # type: ignore[arg-type]


def test_greedy_takes_the_most_probable_token_and_equals_one_beam():
    generated = greedy(RandomModel(STARTS), STARTS, end=END, length=LENGTH)
    for text in generated.tolist():
        model, finished = RandomModel(torch.zeros(1)), False
        for position in range(1, LENGTH):
            assert text[position] == (END if finished else int(model.logits(tuple(text[:position])).argmax()))
            finished = finished or text[position] == END
    assert torch.equal(beams(1), generated)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0])
def test_with_enough_beams_the_best_of_all_texts_is_found(penalty):
    generated = beams(200, length_penalty=penalty)
    for start, text in zip(STARTS.tolist(), generated.tolist(), strict=True):
        assert tuple(text) == max(texts(start), key=lambda candidate: score(candidate, penalty))


def test_more_beams_find_better_texts():
    one, three = ([score(tuple(text), 0.0) for text in beams(count, length_penalty=0.0).tolist()] for count in (1, 3))
    assert sum(three) > sum(one) + 0.3


def test_images_of_a_batch_are_independent():
    batch = beams(3)
    for row, start in enumerate(STARTS):
        assert torch.equal(beams(3, start[None]), batch[row : row + 1])


def test_generation_stops_when_all_texts_are_finished():
    class Short(RandomModel):
        def logits(self, text: tuple[int, ...]) -> Tensor:
            return torch.tensor([5.0, 0.0, 0.0, 0.0]) if len(text) > 1 else torch.tensor([-99.0, 0.0, 1.0, 2.0])

    model = Short(STARTS)
    generated = greedy(model, STARTS, end=END, length=50)
    assert (model.calls, generated.shape) == (2, (5, 50))
    assert generated[:, 1:3].tolist() == [[3, END]] * 5
    assert (generated[:, 2:] == END).all()
