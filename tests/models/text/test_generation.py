"""Texts said by one who answers at random, but always the same."""

import itertools

import pytest
import torch
from torch import Tensor

from src.models.text.generation import beam_search, greedy

END, WORDS, LENGTH = 0, 4, 5


class Whim:
    """What comes next depends on all that was said, in no simple way."""

    def __init__(self, start: Tensor, sharpness: float = 2.0) -> None:
        self.said: list[tuple[int, ...]] = [() for _ in start]
        self.sharpness, self.asked = sharpness, 0

    def odds(self, said: tuple[int, ...]) -> Tensor:
        seed = sum((word + 1) * 17**place for place, word in enumerate(said))
        return self.sharpness * torch.randn(WORDS, generator=torch.Generator().manual_seed(seed))

    def __call__(self, last: Tensor) -> Tensor:
        self.asked += 1
        self.said = [(*said, word) for said, word in zip(self.said, last.tolist(), strict=True)]
        return torch.stack([self.odds(said) for said in self.said])

    def reorder(self, rows: Tensor) -> None:
        self.said = [self.said[row] for row in rows.tolist()]


def texts(start: int) -> list[tuple[int, ...]]:
    """All that can be said."""
    found = []
    for words in itertools.product(range(WORDS), repeat=LENGTH - 1):
        ends = words.index(END) if END in words else len(words) - 1
        if all(word == END for word in words[ends + 1 :]):
            found.append((start, *words))
    return found


def rank(text: tuple[int, ...], penalty: float) -> float:
    whim, total, count = Whim(torch.zeros(1)), 0.0, 0
    for place in range(1, LENGTH):
        total += whim.odds(text[:place]).log_softmax(dim=0)[text[place]].item()
        count += 1
        if text[place] == END:
            break
    return total / count**penalty


STARTS = torch.tensor([1, 2, 3, 5, 8])


def beams(count: int, start: Tensor = STARTS, **options: float) -> Tensor:
    speaker = Whim(start.repeat_interleave(count))
    return beam_search(speaker, start, beams=count, end=END, length=LENGTH, **options)  # type: ignore[arg-type]


def test_greedy_takes_the_likeliest_word_each_time_and_is_a_beam_of_one():
    said = greedy(Whim(STARTS), STARTS, end=END, length=LENGTH)
    for text in said.tolist():
        whim, over = Whim(torch.zeros(1)), False
        for place in range(1, LENGTH):
            assert text[place] == (END if over else int(whim.odds(tuple(text[:place])).argmax()))
            over = over or text[place] == END
    assert torch.equal(beams(1), said)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0])
def test_with_room_for_everything_the_best_text_of_all_is_found(penalty):
    found = beams(200, length_penalty=penalty)
    for start, text in zip(STARTS.tolist(), found.tolist(), strict=True):
        assert tuple(text) == max(texts(start), key=lambda each: rank(each, penalty))


def test_more_beams_find_what_greed_misses():
    one, three = ([rank(tuple(text), 0.0) for text in beams(count, length_penalty=0.0).tolist()] for count in (1, 3))
    assert sum(three) > sum(one) + 0.3


def test_images_of_a_batch_do_not_meet():
    together = beams(3)
    for row, start in enumerate(STARTS):
        assert torch.equal(beams(3, start[None]), together[row : row + 1])


def test_nobody_is_asked_once_all_is_said():
    class Short(Whim):
        def odds(self, said: tuple[int, ...]) -> Tensor:
            return torch.tensor([5.0, 0.0, 0.0, 0.0]) if len(said) > 1 else torch.tensor([-99.0, 0.0, 1.0, 2.0])

    speaker = Short(STARTS)
    said = greedy(speaker, STARTS, end=END, length=50)
    assert (speaker.asked, said.shape) == (2, (5, 50))
    assert said[:, 1:3].tolist() == [[3, END]] * 5
    assert (said[:, 2:] == END).all()
