"""Draws docs/overview.jpg, the whole way of two held-out toy images: `python benchmarks/overview.py`.

The references and the drawn pictures are two of the six rows of docs/train.jpg, which `make train` made; their images
are rows 0 and 3 of the held-out toy web, and their entities are what the toy recipe finds in them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from datapipe.inspect.draw import draw_sample
from subject_diffusion import Labeler
from toyworld.render.web import render_web_image

DOCS = Path(__file__).parents[1] / "docs"
HELD_OUT_IMAGES, HELD_OUT_SEED = 300, 1
SHOWN = ((0, (0, 24)), (4, (704, 160)))
"""Row of the held-out web, and the corner of its row in train.jpg."""
COLUMNS = ("1  image", "2  caption, tags, boxes, masks", "3  reference, cut out", "4  where to draw it", "5  drawn")
TILE_PX, TRAIN_PX, TRAIN_STEP_PX = 224, 128, 136
GAP_PX, TITLE_PX, CAPTION_PX = 14, 34, 76
INK, PAPER = (24, 24, 28), (255, 255, 255)


def main() -> None:
    title = ImageFont.load_default(size=16)
    size = (len(COLUMNS) * (TILE_PX + GAP_PX) + GAP_PX, TITLE_PX + len(SHOWN) * (TILE_PX + CAPTION_PX))
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, text in enumerate(COLUMNS):
        pen.text((_left(column), 10), text, font=title, fill=INK)
    for place, tiles in enumerate(_rows()):
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (_left(column), TITLE_PX + place * (TILE_PX + CAPTION_PX)))
    sheet.save(DOCS / "overview.jpg", quality=88)


def _rows() -> Iterator[list[Image.Image]]:
    train = Image.open(DOCS / "train.jpg")
    jpegs = [render_web_image(row, HELD_OUT_IMAGES, HELD_OUT_SEED).jpeg or b"" for row, _ in SHOWN]
    for jpeg, sample, (_, (x, y)) in zip(jpegs, Labeler("toy")(jpegs), SHOWN, strict=True):
        image = Image.open(io.BytesIO(jpeg))
        # Reference, box and drawn picture are the first three of a row in train.jpg.
        corners = [x + step * TRAIN_STEP_PX for step in range(3)]
        drawn = [train.crop((left, y, left + TRAIN_PX, y + TRAIN_PX)) for left in corners]
        yield [
            ImageOps.contain(image, (TILE_PX, TILE_PX), Image.Resampling.LANCZOS),
            draw_sample(sample, (TILE_PX, TILE_PX)),
            *(tile.resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS) for tile in drawn),
        ]


def _left(column: int) -> int:
    return GAP_PX + column * (TILE_PX + GAP_PX)


if __name__ == "__main__":
    main()
