"""Texts that are said a token at a time, by whatever tells what may come next."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from src.collectives import is_distributed


class CaptioningMethod(Protocol):
    """Knows what was said so far in each row, and what may come next."""

    def __call__(self, last: Tensor) -> Tensor:
        """Logits [R, V] of the next token, ``last`` (ids int64 [R]) having been said just now."""
        ...

    def reorder(self, rows: Tensor) -> None:
        """From now on row r goes on with what was said in row ``rows[r]``: int64 [R]."""
        ...


@torch.no_grad()
def greedy(speaker: CaptioningMethod, start: Tensor, *, end: int, length: int) -> Tensor:
    """The likeliest token each time: ids int64 [R, length], the start included, filled up with ``end``.

    Args:
        start: int64 [R], the first token of each text.
        end: the token that ends a text.
        length: tokens of a text at most.
    """
    said, over = start[:, None], torch.zeros_like(start, dtype=torch.bool)
    while said.shape[1] < length and not _finished(over):
        token = speaker(said[:, -1]).argmax(dim=1).masked_fill(over, end)
        said, over = torch.cat([said, token[:, None]], dim=1), over | (token == end)
    return pad(said, (0, length - said.shape[1]), value=end)


@torch.no_grad()
def beam_search(
    speaker: CaptioningMethod, start: Tensor, *, beams: int, end: int, length: int, length_penalty: float = 1.0
) -> Tensor:
    """The best text of each image among the ``beams`` that are followed: ids int64 [B, length], as `greedy`.

    A text's rank is the sum of its tokens' log-probabilities over their number to the power of ``length_penalty``.
    Finished texts keep theirs, and their place as long as it is among the best.

    Args:
        speaker: has ``beams`` rows an image, those of one image beside each other.
        start: int64 [B].
    """
    images = len(start)
    said = start.repeat_interleave(beams)[:, None]
    over = torch.zeros(images, beams, dtype=torch.bool, device=start.device)
    tokens = torch.zeros(images, beams, device=start.device)
    # one of the beams, which say the same as yet
    score = torch.full((images, beams), -torch.inf, device=start.device)
    score[:, 0] = 0
    first = beams * torch.arange(images, device=start.device)[:, None]
    while said.shape[1] < length and not _finished(over):
        following = speaker(said[:, -1]).float().log_softmax(dim=1).unflatten(0, (images, beams))
        silence = torch.full_like(following, -torch.inf)
        silence[..., end] = 0
        total = score[..., None] + torch.where(over[..., None], silence, following)
        tokens = tokens + ~over
        rank = total / tokens[..., None] ** length_penalty
        best = rank.flatten(1).topk(beams).indices
        parent, token = best // total.shape[2], best % total.shape[2]
        rows = (first + parent).flatten()
        score, tokens = total.flatten(1).gather(1, best), tokens.gather(1, parent)
        over = over.gather(1, parent) | (token == end)
        said = torch.cat([said[rows], token.flatten()[:, None]], dim=1)
        speaker.reorder(rows)
    return pad(said[::beams], (0, length - said.shape[1]), value=end)


def _finished(over: Tensor) -> bool:
    """Whether nothing is left to say. Processes that share a network must ask it equally often."""
    return not is_distributed() and bool(over.all())
