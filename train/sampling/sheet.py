"""Several pictures as one, with what varies written beside them."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from train.sampling.settings import Axis

_GAP = 4
_FONT_PX = (9, 22)
"""Least and most; between them, a twentieth of a picture's width."""


def sheet(pictures: Sequence[Image.Image], axes: Sequence[Axis]) -> Image.Image:
    """pictures: row by row, of one size. axes: of the columns and, if there are two, of the rows."""
    columns, rows = axes[0][1], axes[1][1] if len(axes) > 1 else (None,)
    width, height = pictures[0].size
    font_px = min(max(width // 20, _FONT_PX[0]), _FONT_PX[1])
    font, line = ImageFont.load_default(font_px), round(1.6 * font_px)
    texts = ["" if value is None else f"{value:g}" for value in rows]
    left = max(map(font.getlength, texts)) + 2 * _GAP if len(axes) > 1 else 0
    titles = [axes[0][0]] if len(axes) == 1 else [f"columns: {axes[0][0]}", f"rows: {axes[1][0]}"]
    left, top = round(left), line * (len(titles) + 1)
    across = left + (width + _GAP) * len(columns) - _GAP
    whole = max(across, round(max(map(font.getlength, titles)) + 2 * _GAP))
    canvas = Image.new("RGB", (whole, top + (height + _GAP) * len(rows) - _GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for number, title in enumerate(titles):
        pen.text((_GAP, line * number + line // 2), title, font=font, fill="black", anchor="lm")
    for c, value in enumerate(columns):
        middle = left + (width + _GAP) * c + width // 2
        pen.text((middle, top - line // 2), f"{value:g}", font=font, fill="black", anchor="mm")
    for r, text in enumerate(texts):
        pen.text((_GAP, top + (height + _GAP) * r + height // 2), text, font=font, fill="black", anchor="lm")
    for i, picture in enumerate(pictures):
        row, column = divmod(i, len(columns))
        canvas.paste(picture, (left + (width + _GAP) * column, top + (height + _GAP) * row))
    return canvas
