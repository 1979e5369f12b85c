"""Sheets of images and texts for the dashboard, drawn with what is installed anyway."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from src.models.downstream.colormaps import Color, ramp

INK, FAINT, PAPER = (33, 37, 41), (120, 126, 134), (255, 255, 255)
RIGHT, WRONG = (22, 140, 70), (200, 60, 50)
_MARGIN = 12
_LINE = 1.3  # of a font's size


@dataclass(frozen=True)
class Ranked:
    """What a query has found.

    Args:
        rank: how many others came before its own, 0 where none did.
        found: the nearest, as positions.
        scores: of these.
        own: where its own stands.
    """

    rank: int
    found: Sequence[int]
    scores: Sequence[float]
    own: int


def animation(frames: Sequence[Image.Image], *, seconds: float) -> bytes:
    """A GIF that plays over and over. A frame of at most 256 colors keeps them; frames that are equal become one that
    stays longer.

    Args:
        frames: RGB, of one size.
        seconds: from one to the next; kept to hundredths, of which players want two at least.
    """
    file = io.BytesIO()
    milliseconds = max(20, round(100 * seconds) * 10)
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return file.getvalue()


def similarities(pictures: Sequence[Image.Image], texts: Sequence[str], values: np.ndarray) -> Image.Image:
    """A table with a image above each column and a text beside each row; [rows, columns] values in its cells. What
    belongs together stands on the diagonal; the image nearest to a text has a thick frame, green where it is its own.
    """
    side, beside = 64, 300
    sheet = _Sheet(2 * _MARGIN + beside + side * len(pictures), 3 * _MARGIN + 50 + side * (1 + len(texts)))
    right = int((values.argmax(axis=1) == np.arange(len(texts))).sum())
    sheet.write(_MARGIN, _MARGIN, f"similarity of texts and pictures: {right} of {len(texts)} find their own", 16)
    sheet.write(
        _MARGIN,
        _MARGIN + 24,
        "on the diagonal what belongs together; in a thick frame what a text is nearest to",
        12,
        FAINT,
    )
    top, left = 2 * _MARGIN + 40, _MARGIN + beside
    for column, picture in enumerate(pictures):
        sheet.paste(picture, left + column * side + 2, top, side - 4)
    low, high = float(values.min()), float(values.max())
    for row, text in enumerate(texts):
        y = top + side * (row + 1)
        sheet.write(_MARGIN, y, text, 13, width=beside - _MARGIN, height=side, centered=True)
        for column in range(len(pictures)):
            share = (float(values[row, column]) - low) / max(high - low, 1e-9)
            sheet.cell(left + column * side, y, side, share, _two_places(values[row, column]))
        best = int(values[row].argmax())
        sheet.frame(left + row * side, y, side, RIGHT, edge=2)
        sheet.frame(left + best * side, y, side, RIGHT if best == row else WRONG)
    return sheet.image


def pictures_of_texts(
    pictures: Sequence[Image.Image], texts: Sequence[str], sections: dict[str, Sequence[Ranked]]
) -> Image.Image:
    """Under the title of each section a row a text: the text, its own image and rank, then the images it is nearest
    to, its own in a green frame."""
    side, beside = 96, 280
    columns = max(len(each.found) for rows in sections.values() for each in rows)
    width = 3 * _MARGIN + beside + (side + _MARGIN) * (columns + 1) + _MARGIN
    step = side + 22
    sheet = _Sheet(width, _MARGIN + sum(34 + step * len(rows) for rows in sections.values()))
    y = _MARGIN
    for title, rows in sections.items():
        sheet.write(_MARGIN, y, title, 16)
        left = 2 * _MARGIN + beside
        sheet.write(left, y + 4, "its own", 12, FAINT)
        sheet.write(left + side + 3 * _MARGIN, y + 4, "nearest, from the left, with their cosine", 12, FAINT)
        y += 30
        for each in rows:
            sheet.write(_MARGIN, y, texts[each.own], 13, width=beside, height=side - 20)
            sheet.write(_MARGIN, y + side - 18, _place(each, len(pictures)), 13, RIGHT if each.rank == 0 else WRONG)
            sheet.paste(pictures[each.own], left, y, side)
            for number, (position, score) in enumerate(zip(each.found, each.scores, strict=True)):
                x = left + side + 3 * _MARGIN + number * (side + _MARGIN)
                sheet.paste(pictures[position], x, y, side)
                if position == each.own:
                    sheet.frame(x, y, side, RIGHT)
                sheet.write(x, y + side + 1, _two_places(score), 12, RIGHT if position == each.own else FAINT)
            y += step
        y += 4
    return sheet.image


def texts_of_pictures(
    pictures: Sequence[Image.Image], texts: Sequence[str], sections: dict[str, Sequence[Ranked]]
) -> Image.Image:
    """Under the title of each section a row a image: the image, its own text and rank, then the texts it is nearest
    to, its own in green."""
    side, beside, line = 112, 560, 18
    step = side + 14
    sheet = _Sheet(3 * _MARGIN + side + beside, _MARGIN + sum(34 + step * len(rows) for rows in sections.values()))
    y, left = _MARGIN, 2 * _MARGIN + side
    for title, rows in sections.items():
        sheet.write(_MARGIN, y, title, 16)
        y += 30
        for each in rows:
            sheet.paste(pictures[each.own], _MARGIN, y, side)
            said = f"its own, {_place(each, len(texts))}: {texts[each.own]}"
            sheet.write(left, y, said, 13, RIGHT if each.rank == 0 else WRONG, width=beside, height=line)
            for number, (position, score) in enumerate(zip(each.found, each.scores, strict=True)):
                ink = RIGHT if position == each.own else INK
                at = y + line * (number + 1)
                sheet.write(left, at, _two_places(score), 13, FAINT)
                sheet.write(left + 44, at, texts[position], 13, ink, width=beside - 44, height=line)
            y += step
        y += 4
    return sheet.image


def captions_of_pictures(pictures: Sequence[Image.Image], texts: Sequence[str], said: Sequence[str]) -> Image.Image:
    """A row a image: what is said of it, and below one of the texts that it comes with."""
    side, beside = 96, 560
    sheet = _Sheet(3 * _MARGIN + side + beside, _MARGIN + (side + _MARGIN) * len(said))
    for row, (picture, text, words) in enumerate(zip(pictures, texts, said, strict=False)):
        y, left = _MARGIN + (side + _MARGIN) * row, 2 * _MARGIN + side
        sheet.paste(picture, _MARGIN, y, side)
        sheet.write(left, y, words or "(nothing)", 15, INK, width=beside, height=60)
        sheet.write(left, y + side - 34, text, 13, FAINT, width=beside, height=34)
    return sheet.image


def tile(picture: Image.Image, side: int, *, text: bool) -> Image.Image:
    """A point of the projector: a image with a blue edge, or, of its text, the faded image with an orange one."""
    made = picture.resize((side, side), Image.Resampling.BILINEAR)
    if text:
        made = Image.blend(made, Image.new("RGB", made.size, PAPER), 0.6)
    ImageDraw.Draw(made).rectangle(
        (0, 0, side - 1, side - 1), outline=(230, 120, 20) if text else (30, 90, 200), width=3
    )
    return made


def wrapped(text: str, size: int, width: float, lines: int) -> list[str]:
    """``text`` in at most so many lines of ``width`` pixels; what does not fit is left out, and three dots say so."""
    font, rest = _font(size), " ".join(text.split())
    made: list[str] = []
    while rest and len(made) < lines:
        fits = len(rest)
        while fits > 1 and font.getlength(rest[:fits]) > width:
            fits -= 1
        if fits < len(rest):  # at a space where there is one; other scripts have none
            fits = max(rest.rfind(" ", 0, fits + 1), 0) or fits
        made.append(rest[:fits])
        rest = rest[fits:].lstrip()
    if rest:
        last = made[-1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        made[-1] = f"{last.rstrip()}…"
    return made


class _Sheet:
    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def write(
        self,
        x: int,
        y: int,
        text: str,
        size: int,
        ink: Color = INK,
        *,
        width: int = 10**6,
        height: int = 0,
        centered: bool = False,
    ) -> None:
        """Lines of ``width`` pixels, as many as fit into ``height``, one at least, from the top or in the middle."""
        step = round(size * _LINE)
        lines = wrapped(text, size, width, max(1, height // step))
        y += (height - step * len(lines)) // 2 if centered else 0
        for number, line in enumerate(lines):
            self.draw.text((x, y + number * step), line, fill=ink, font=_font(size))

    def paste(self, picture: Image.Image, x: int, y: int, side: int) -> None:
        self.image.paste(picture.resize((side, side), Image.Resampling.BILINEAR), (x, y))

    def frame(self, x: int, y: int, side: int, ink: Color, edge: int = 4) -> None:
        self.draw.rectangle((x, y, x + side - 1, y + side - 1), outline=ink, width=edge)

    def cell(self, x: int, y: int, side: int, share: float, text: str) -> None:
        self.draw.rectangle((x, y, x + side - 2, y + side - 2), fill=ramp(share))
        ink = PAPER if share > 0.5 else INK
        self.draw.text((x + side / 2, y + side / 2), text, fill=ink, font=_font(13), anchor="mm")


def _place(each: Ranked, count: int) -> str:
    return f"rank {each.rank + 1} of {count}"


def _two_places(value: float) -> str:
    return f"{round(float(value), 2) + 0.0:.2f}"  # no "-0.00"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
