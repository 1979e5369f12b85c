"""Generates texts token by token: greedy decoding and beam search."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from src.collectives import is_distributed


class NextTokenModel(Protocol):
    """Predicts the next token of R texts and remembers the tokens so far."""

    def __call__(self, last: Tensor) -> Tensor:
        """Appends the tokens ``last`` (ids int64 [R]) and returns the logits [R, V] of the next ones."""
        ...

    def reorder(self, rows: Tensor) -> None:
        """Replaces the text in row r by the one in row ``rows[r]``: int64 [R]."""
        ...


@torch.no_grad()
def greedy(model: NextTokenModel, start: Tensor, *, end: int, length: int) -> Tensor:
    """Appends the most probable token each time: ids int64 [R, length], padded with ``end``.

    Args:
        start: int64 [R], the first token of each text.
        end: id of the token that ends a text.
        length: greatest number of tokens in a text, the first one included.
    """
    text, finished = start[:, None], torch.zeros_like(start, dtype=torch.bool)
    while text.shape[1] < length and not _all_finished(finished):
        token = model(text[:, -1]).argmax(dim=1).masked_fill(finished, end)
        text, finished = torch.cat([text, token[:, None]], dim=1), finished | (token == end)
    return pad(text, (0, length - text.shape[1]), value=end)


@torch.no_grad()
def beam_search(
    model: NextTokenModel, start: Tensor, *, beams: int, end: int, length: int, length_penalty: float = 1.0
) -> Tensor:
    """Returns the best text of each image found by beam search: ids int64 [B, length], padded with ``end``.

    A text's score is the sum of its tokens' log-probabilities divided by their number to the power of
    ``length_penalty``. A finished text keeps its score, and its beam as long as it is among the best.

    Args:
        model: has ``beams`` rows an image, those of one image next to each other.
        start: int64 [B], the first token of each text.
        beams: texts that are followed for each image.
        end, length: as in `greedy`.
    """
    images = len(start)
    text = start.repeat_interleave(beams)[:, None]
    finished = torch.zeros(images, beams, dtype=torch.bool, device=start.device)
    tokens = torch.zeros(images, beams, device=start.device)
    # all beams begin with the same text: only the first one may be continued
    log_probability = torch.full((images, beams), -torch.inf, device=start.device)
    log_probability[:, 0] = 0
    first_row = beams * torch.arange(images, device=start.device)[:, None]
    while text.shape[1] < length and not _all_finished(finished):
        next_log_probability = model(text[:, -1]).float().log_softmax(dim=1).unflatten(0, (images, beams))
        only_end = torch.full_like(next_log_probability, -torch.inf)
        only_end[..., end] = 0
        total = log_probability[..., None] + torch.where(finished[..., None], only_end, next_log_probability)
        tokens = tokens + ~finished
        score = total / tokens[..., None] ** length_penalty
        best = score.flatten(1).topk(beams).indices
        parent, token = best // total.shape[2], best % total.shape[2]
        rows = (first_row + parent).flatten()
        log_probability, tokens = total.flatten(1).gather(1, best), tokens.gather(1, parent)
        finished = finished.gather(1, parent) | (token == end)
        text = torch.cat([text[rows], token.flatten()[:, None]], dim=1)
        model.reorder(rows)
    return pad(text[::beams], (0, length - text.shape[1]), value=end)


def _all_finished(finished: Tensor) -> bool:
    """Returns True once every text has ended. Over several processes it never does: they share a sharded network and
    must call it equally often."""
    return not is_distributed() and bool(finished.all())
