"""A sample as a picture: its image with masks, boxes, tags and scores, and its caption below."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from datapipe.decoding import decode_rgb
from datapipe.schema import RLE, Entity, Sample
from subject_diffusion.errors import ShardError

LONG_SIDE_PX = 384
"""Samples are drawn at least this large: labels must be readable on thumbnails too."""

_INK = (24, 24, 28)
_QUIET = (96, 96, 104)
_PAPER = (250, 249, 246)
_MASK_OPACITY = 0.25
_MARGIN = 8
_LEAST_WIDTH_PX = 160
"""The least width of a picture with its caption; narrower images get paper beside them."""
_TALLEST = 4 / 3
"""Height / width of a place in the contact sheet: one tall image must not stretch its whole row."""
_FONT_PX = 15
_TITLE_PX = 24
_HEAD_PX = 64
"""For the title of a contact sheet and its line of counts."""

RGB = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_sample(sample: Sample, room: tuple[int, int] | None = None) -> Image.Image:
    """Draws the entities of a kept sample, and every candidate box of a lost one, with the reason why it is no entity.

    room: width and height in pixels that the image fills as far as its shape lets it; default: such that its long side
    has at least `LONG_SIDE_PX`. The caption comes below. Raises ShardError when the sample has no image.
    """
    lost = sample.verdict is not None and not sample.is_kept
    if sample.picture is None:
        raise ShardError(f"sample {sample.key} has no image in the folder; it was {outcome_text(sample)}")
    pixels = decode_rgb(sample.picture)
    height, width = pixels.shape[:2]
    scale = min(room[0] / width, room[1] / height) if room else max(1.0, LONG_SIDE_PX / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    canvas = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)).copy()
    entities = sample.candidates if lost else sample.entities
    colors = [_color(i) for i in range(len(entities))]
    for entity, color in zip(entities, colors, strict=True):
        if entity.mask is not None:
            _paint_mask(canvas, entity.mask, color)
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    for entity, color in zip(entities, colors, strict=True):
        pen.rectangle([v * scale for v in entity.box], outline=color, width=2)
    for entity, color in zip(entities, colors, strict=True):
        _label(pen, entity, color, scale, size)
    return _with_caption(picture, f"{outcome_text(sample)} — {sample.caption}" if lost else sample.caption)


def outcome_text(sample: Sample) -> str:
    """The verdict in words."""
    verdict = sample.verdict
    if verdict is None:
        return "no verdict"
    reason = f": {verdict.reason.value} {verdict.detail}".rstrip() if verdict.reason else ""
    return f"{verdict.outcome.value} at {verdict.stage.value}{reason}"


def contact_sheet(
    samples: Sequence[Sample], title: str, counts: str, columns: int = 4, column_px: int = 360
) -> Image.Image:
    """Samples side by side, row by row, each `column_px` wide, under a title and a line that counts what is shown."""
    pictures = [draw_sample(s, (column_px, round(_TALLEST * column_px))) for s in samples]
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    heights = [max(p.height for p in row) for row in rows]
    sheet_width = columns * (column_px + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (sheet_width, _HEAD_PX + sum(heights) + _MARGIN * (len(rows) + 1)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for text, size, top, ink in ((title, _TITLE_PX, 10, _INK), (counts, _FONT_PX, 42, _QUIET)):
        font = ImageFont.load_default(size=size)
        line = _shortened(" ".join(text.split()), "", font, sheet_width - 4 * _MARGIN)
        pen.text((2 * _MARGIN, top), line, font=font, fill=ink)
    y = _HEAD_PX + _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for i, picture in enumerate(row):
            sheet.paste(picture, (_MARGIN + i * (column_px + _MARGIN) + (column_px - picture.width) // 2, y))
        y += height + _MARGIN
    return sheet


def _color(index: int) -> RGB:
    """Hues a golden angle apart: neighbors differ, however many there are."""
    hue = (0.02 + index * (math.sqrt(5) - 1) / 2) % 1
    r, g, b = (round(255 * c) for c in colorsys.hls_to_rgb(hue, 0.5, 0.95))
    return r, g, b


def _paint_mask(canvas: NDArray[np.uint8], mask: RLE, color: RGB) -> None:
    full = cv2.resize(mask.array().view(np.uint8), (canvas.shape[1], canvas.shape[0]), interpolation=cv2.INTER_LINEAR)
    inside = full > 0
    canvas[inside] = (canvas[inside] * (1 - _MASK_OPACITY) + np.array(color) * _MASK_OPACITY).astype(np.uint8)
    outlines, _ = cv2.findContours(full, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, outlines, -1, color, 2, cv2.LINE_AA)


def _label(pen: ImageDraw.ImageDraw, entity: Entity, color: RGB, scale: float, size: tuple[int, int]) -> None:
    font = ImageFont.load_default(size=_FONT_PX)
    ending = f" {entity.score:.2f}" + (f" {entity.rejected.value}" if entity.rejected else "")
    text = _shortened(entity.tag, ending, font, size[0] - 8)
    x1, y1, x2, y2 = pen.textbbox((0, 0), text, font=font)
    width, height = round(x2 - x1) + 8, round(y2 - y1) + 8
    left = max(0, min(round(entity.box[0] * scale), size[0] - width))
    top = max(0, min(round(entity.box[1] * scale) - height, size[1] - height))
    pen.rectangle([left, top, left + width, top + height], fill=color)
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    pen.text((left + 4 - x1, top + 4 - y1), text, font=font, fill=_INK if luminance > 130 else (255, 255, 255))


def _with_caption(picture: Image.Image, caption: str) -> Image.Image:
    font = ImageFont.load_default(size=_FONT_PX)
    width = max(picture.width, _LEAST_WIDTH_PX)
    lines = _wrapped(caption, font, width - 2 * _MARGIN)
    line_height = round(_FONT_PX * 1.35)
    framed = Image.new("RGB", (width, picture.height + line_height * len(lines) + _MARGIN), _PAPER)
    framed.paste(picture, ((width - picture.width) // 2, 0))
    pen = ImageDraw.Draw(framed)
    for i, line in enumerate(lines):
        pen.text((_MARGIN, picture.height + 4 + i * line_height), line, font=font, fill=_INK)
    return framed


def _shortened(text: str, ending: str, font: Font, width: int) -> str:
    """`text` and `ending`, with as much of `text` as fits into `width` pixels."""
    if font.getlength(text + ending) <= width:
        return text + ending
    while text and font.getlength(f"{text}…{ending}") > width:
        text = text[:-1]
    return f"{text}…{ending}"


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """Lines of at most `width` pixels; a word longer than that is broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append("")
            longer = word
        while font.getlength(longer) > width and len(longer) > 1:
            fitting = next(n for n in range(len(longer) - 1, 0, -1) if n == 1 or font.getlength(longer[:n]) <= width)
            lines[-1] = longer[:fitting]
            lines.append("")
            longer = longer[fitting:]
        lines[-1] = longer
    return lines
