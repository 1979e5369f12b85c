"""Sheets of images and texts for TensorBoard, drawn with Pillow."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from src.models.downstream.colormaps import Color, ramp

INK, FAINT, PAPER = (33, 37, 41), (120, 126, 134), (255, 255, 255)
RIGHT, WRONG = (22, 140, 70), (200, 60, 50)
_MARGIN = 12
_LINE = 1.3  # height of a line over the font size


@dataclass(frozen=True)
class Retrieval:
    """The results of one query.

    Args:
        query: its position, which is also that of its match.
        rank: number of results before the match; 0 if the match is the nearest.
        results: positions of the nearest results, nearest first.
        scores: their similarities.
    """

    query: int
    rank: int
    results: Sequence[int]
    scores: Sequence[float]


def animation(frames: Sequence[Image.Image], *, seconds: float) -> bytes:
    """Encodes a GIF that loops forever. Frames of at most 256 colors keep them; equal frames in a row are merged.

    Args:
        frames: RGB images of one size.
        seconds: time from one frame to the next, rounded to 1/100 s, at least 2/100 because players ignore less.
    """
    file = io.BytesIO()
    milliseconds = max(20, round(100 * seconds) * 10)
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return file.getvalue()


def similarity_sheet(images: Sequence[Image.Image], texts: Sequence[str], similarity: np.ndarray) -> Image.Image:
    """Draws a table of similarities [texts, images] with an image above each column and a text beside each row.

    Matches lie on the diagonal. A thick frame marks the image nearest to each text: green if it is the match, else red.
    """
    side, beside = 64, 300
    sheet = _Sheet(2 * _MARGIN + beside + side * len(images), 3 * _MARGIN + 50 + side * (1 + len(texts)))
    right = int((similarity.argmax(axis=1) == np.arange(len(texts))).sum())
    sheet.write(
        _MARGIN,
        _MARGIN,
        f"similarity of texts and images: {right} of {len(texts)} texts are nearest to their image",
        16,
    )
    sheet.write(_MARGIN, _MARGIN + 24, "diagonal: matching pairs; thick frame: the nearest image of a text", 12, FAINT)
    top, left = 2 * _MARGIN + 40, _MARGIN + beside
    for column, image in enumerate(images):
        sheet.paste(image, left + column * side + 2, top, side - 4)
    low, high = float(similarity.min()), float(similarity.max())
    for row, text in enumerate(texts):
        y = top + side * (row + 1)
        sheet.write(_MARGIN, y, text, 13, width=beside - _MARGIN, height=side, centered=True)
        for column in range(len(images)):
            share = (float(similarity[row, column]) - low) / max(high - low, 1e-9)
            sheet.cell(left + column * side, y, side, share, _two_places(similarity[row, column]))
        nearest = int(similarity[row].argmax())
        sheet.frame(left + row * side, y, side, RIGHT, edge=2)
        sheet.frame(left + nearest * side, y, side, RIGHT if nearest == row else WRONG)
    return sheet.image


def text_to_image_sheet(
    images: Sequence[Image.Image], texts: Sequence[str], sections: Mapping[str, Sequence[Retrieval]]
) -> Image.Image:
    """Draws text-to-image retrievals in titled sections, one text a row: the text, its matching image and the rank of
    the match, then the nearest images. A green frame marks the match.

    Args:
        images, texts: pairs in the same order.
        sections: retrievals by title.
    """
    side, beside = 96, 280
    columns = max(len(retrieval.results) for rows in sections.values() for retrieval in rows)
    width = 3 * _MARGIN + beside + (side + _MARGIN) * (columns + 1) + _MARGIN
    step = side + 22
    sheet = _Sheet(width, _MARGIN + sum(34 + step * len(rows) for rows in sections.values()))
    y = _MARGIN
    for title, rows in sections.items():
        sheet.write(_MARGIN, y, title, 16)
        left = 2 * _MARGIN + beside
        sheet.write(left, y + 4, "matching image", 12, FAINT)
        sheet.write(left + side + 3 * _MARGIN, y + 4, "nearest images and their similarity", 12, FAINT)
        y += 30
        for retrieval in rows:
            query, ink = retrieval.query, RIGHT if retrieval.rank == 0 else WRONG
            sheet.write(_MARGIN, y, texts[query], 13, width=beside, height=side - 20)
            sheet.write(_MARGIN, y + side - 18, _rank(retrieval, len(images)), 13, ink)
            sheet.paste(images[query], left, y, side)
            for number, (position, score) in enumerate(zip(retrieval.results, retrieval.scores, strict=True)):
                x = left + side + 3 * _MARGIN + number * (side + _MARGIN)
                sheet.paste(images[position], x, y, side)
                if position == query:
                    sheet.frame(x, y, side, RIGHT)
                sheet.write(x, y + side + 1, _two_places(score), 12, RIGHT if position == query else FAINT)
            y += step
        y += 4
    return sheet.image


def image_to_text_sheet(
    images: Sequence[Image.Image], texts: Sequence[str], sections: Mapping[str, Sequence[Retrieval]]
) -> Image.Image:
    """Draws image-to-text retrievals in titled sections, one image a row: the image, its matching text and the rank of
    the match, then the nearest texts. The match is green.

    Args:
        images, texts: pairs in the same order.
        sections: retrievals by title.
    """
    side, beside, line = 112, 560, 18
    step = side + 14
    sheet = _Sheet(3 * _MARGIN + side + beside, _MARGIN + sum(34 + step * len(rows) for rows in sections.values()))
    y, left = _MARGIN, 2 * _MARGIN + side
    for title, rows in sections.items():
        sheet.write(_MARGIN, y, title, 16)
        y += 30
        for retrieval in rows:
            query, ink = retrieval.query, RIGHT if retrieval.rank == 0 else WRONG
            sheet.paste(images[query], _MARGIN, y, side)
            match = f"matching text, {_rank(retrieval, len(texts))}: {texts[query]}"
            sheet.write(left, y, match, 13, ink, width=beside, height=line)
            for number, (position, score) in enumerate(zip(retrieval.results, retrieval.scores, strict=True)):
                ink = RIGHT if position == query else INK
                top = y + line * (number + 1)
                sheet.write(left, top, _two_places(score), 13, FAINT)
                sheet.write(left + 44, top, texts[position], 13, ink, width=beside - 44, height=line)
            y += step
        y += 4
    return sheet.image


def caption_sheet(images: Sequence[Image.Image], texts: Sequence[str], captions: Sequence[str]) -> Image.Image:
    """Draws an image a row with its generated caption, and below it a reference text of the image.

    Args:
        images: in the order of ``captions``; further ones are not drawn.
        texts: a reference text of each image.
        captions: the generated captions.
    """
    side, beside = 96, 560
    sheet = _Sheet(3 * _MARGIN + side + beside, _MARGIN + (side + _MARGIN) * len(captions))
    for row, (image, text, caption) in enumerate(zip(images, texts, captions, strict=False)):
        y, left = _MARGIN + (side + _MARGIN) * row, 2 * _MARGIN + side
        sheet.paste(image, _MARGIN, y, side)
        sheet.write(left, y, caption or "(empty caption)", 15, INK, width=beside, height=60)
        sheet.write(left, y + side - 34, text, 13, FAINT, width=beside, height=34)
    return sheet.image


def tile(image: Image.Image, side: int, *, text: bool) -> Image.Image:
    """Draws a point of TensorBoard's projector: the image with a blue edge, or for its text the faded image with an
    orange edge."""
    square = image.resize((side, side), Image.Resampling.BILINEAR)
    if text:
        square = Image.blend(square, Image.new("RGB", square.size, PAPER), 0.6)
    ImageDraw.Draw(square).rectangle(
        (0, 0, side - 1, side - 1), outline=(230, 120, 20) if text else (30, 90, 200), width=3
    )
    return square


def wrapped(text: str, size: int, width: float, lines: int) -> list[str]:
    """Splits ``text`` into lines. The last line ends with an ellipsis if the text does not fit.

    Args:
        text: any text; line breaks and tabs count as spaces.
        size: of the font.
        width: of a line in pixels.
        lines: the largest number of lines.
    """
    font, rest = _font(size), " ".join(text.split())
    result: list[str] = []
    while rest and len(result) < lines:
        fits = len(rest)
        while fits > 1 and font.getlength(rest[:fits]) > width:
            fits -= 1
        if fits < len(rest):  # break at a space; scripts without spaces break anywhere
            fits = max(rest.rfind(" ", 0, fits + 1), 0) or fits
        result.append(rest[:fits])
        rest = rest[fits:].lstrip()
    if rest:
        last = result[-1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        result[-1] = f"{last.rstrip()}…"
    return result


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
        """Writes at least one line, and as many lines of ``width`` pixels as fit into ``height``; ``centered`` between
        top and bottom."""
        step = round(size * _LINE)
        lines = wrapped(text, size, width, max(1, height // step))
        y += (height - step * len(lines)) // 2 if centered else 0
        for number, line in enumerate(lines):
            self.draw.text((x, y + number * step), line, fill=ink, font=_font(size))

    def paste(self, image: Image.Image, x: int, y: int, side: int) -> None:
        self.image.paste(image.resize((side, side), Image.Resampling.BILINEAR), (x, y))

    def frame(self, x: int, y: int, side: int, ink: Color, edge: int = 4) -> None:
        self.draw.rectangle((x, y, x + side - 1, y + side - 1), outline=ink, width=edge)

    def cell(self, x: int, y: int, side: int, share: float, text: str) -> None:
        self.draw.rectangle((x, y, x + side - 2, y + side - 2), fill=ramp(share))
        ink = PAPER if share > 0.5 else INK
        self.draw.text((x + side / 2, y + side / 2), text, fill=ink, font=_font(13), anchor="mm")


def _rank(retrieval: Retrieval, count: int) -> str:
    return f"rank {retrieval.rank + 1} of {count}"


def _two_places(value: float) -> str:
    return f"{round(float(value), 2) + 0.0:.2f}"  # + 0.0 turns -0.0 into 0.0


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
