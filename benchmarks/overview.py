"""Draws the documentation's pictures with the toy subject model that comes along.

    sdd evaluate toyworld/weights/subject-diffusion --out out/evaluation
    python benchmarks/overview.py out/evaluation

docs/overview.jpg: the whole way of two held-out toy images. docs/train.jpg: the first samples of the evaluation.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from datapipe.inspect.draw import draw_sample
from datapipe.schema import Entity
from model import Subject
from subject_diffusion import Labeler
from toyworld.render.web import render_web_image
from train.evaluation.cases import Case
from train.sampling.trained import SHIPPED
from train.trainer.pipeline import open_pipeline, read_recipe
from train.trainer.validation import GAP_PX as GRID_GAP_PX
from train.trainer.validation import draw_samples, grid

DOCS = Path(__file__).parents[1] / "docs"
HELD_OUT_IMAGES, HELD_OUT_SEED, HELD_OUT_IDENTITIES = 400, 1, 10
SHOWN = (0, 3)
"""Rows of the held-out web, as the Makefile has it."""
COLUMNS = ("1  image", "2  caption, tags, boxes, masks", "3  references, cut out", "4  where to draw it", "5  drawn")
TILE_PX = 224
GAP_PX, TITLE_PX, CAPTION_PX = 14, 34, 76
INK, PAPER = (24, 24, 28), (255, 255, 255)
ROWS = 6
"""Of the evaluation's samples, in two columns."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, help="folder of a report of `sdd evaluate`")
    samples(parser.parse_args().evaluation).save(DOCS / "train.jpg", quality=90)
    overview().save(DOCS / "overview.jpg", quality=88)


def samples(evaluation: Path) -> Image.Image:
    """The first rows of its samples, twice as large."""
    sheet = Image.open(evaluation / "samples.png").convert("RGB")
    side = 64
    head = sheet.height % (side + GRID_GAP_PX) + GRID_GAP_PX
    half = (side + GRID_GAP_PX) * ROWS // 2
    columns = [sheet.crop((0, 0, sheet.width, head + half)), sheet.crop((0, head + half, sheet.width, head + 2 * half))]
    both = Image.new("RGB", (2 * sheet.width + 4 * GRID_GAP_PX, head + half), PAPER)
    both.paste(columns[0], (0, 0))
    both.paste(sheet.crop((0, 0, sheet.width, head)), (sheet.width + 4 * GRID_GAP_PX, 0))
    both.paste(columns[1], (sheet.width + 4 * GRID_GAP_PX, head))
    return both.resize((2 * both.width, 2 * both.height), Image.Resampling.LANCZOS)


def overview() -> Image.Image:
    title = ImageFont.load_default(size=16)
    size = (len(COLUMNS) * (TILE_PX + GAP_PX) + GAP_PX, TITLE_PX + len(SHOWN) * (TILE_PX + CAPTION_PX))
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, text in enumerate(COLUMNS):
        pen.text((_left(column), 10), text, font=title, fill=INK)
    for place, tiles in enumerate(_rows()):
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (_left(column), TITLE_PX + place * (TILE_PX + CAPTION_PX)))
    return sheet


def _rows() -> Iterator[list[Image.Image]]:
    shipped = DOCS.parent / SHIPPED
    pipeline, settings = open_pipeline(shipped), read_recipe(shipped).validation
    for row in SHOWN:
        jpeg = render_web_image(row, HELD_OUT_IMAGES, HELD_OUT_SEED, HELD_OUT_IDENTITIES).jpeg or b""
        (sample,) = Labeler("toy")([jpeg])
        image = Image.open(io.BytesIO(jpeg)).convert("RGB")
        subjects = tuple(_subject(image, entity) for entity in sample.entities)
        names = tuple((SHIPPED, str(row), number) for number in range(len(subjects)))
        case = Case(image.resize((64, 64)), sample.caption, subjects, names)
        (drawn,) = draw_samples(pipeline, [case], settings)
        large = dataclasses.replace(case, image=image.resize((TILE_PX,) * 2))
        tiles = grid([large], {"drawn": [drawn.resize((TILE_PX,) * 2, Image.Resampling.LANCZOS)]})
        corners = [column * (TILE_PX + GRID_GAP_PX) for column in range(len(subjects) + 2)]
        *references, where, sampled = (
            tiles.crop((x, tiles.height - TILE_PX, x + TILE_PX, tiles.height)) for x in corners
        )
        yield [
            ImageOps.contain(image, (TILE_PX, TILE_PX), Image.Resampling.LANCZOS),
            draw_sample(sample, (TILE_PX, TILE_PX)),
            _in_one_tile(references),
            where,
            sampled,
        ]


def _subject(image: Image.Image, entity: Entity) -> Subject:
    assert entity.mask is not None
    x1, y1, x2, y2 = (v / side for v, side in zip(entity.box, image.size * 2, strict=True))
    return Subject(image, entity.tag, mask=entity.mask.array(), box=(x1, y1, x2, y2))


def _in_one_tile(pictures: Sequence[Image.Image]) -> Image.Image:
    """Square pictures in the cells of a grid, row by row."""
    across = math.ceil(math.sqrt(len(pictures)))
    tile, side = Image.new("RGB", (TILE_PX, TILE_PX), PAPER), TILE_PX // across
    for place, picture in enumerate(pictures):
        cell = place % across * side, place // across * side
        tile.paste(picture.resize((side, side), Image.Resampling.LANCZOS), cell)
    return tile


def _left(column: int) -> int:
    return GAP_PX + column * (TILE_PX + GAP_PX)


if __name__ == "__main__":
    main()
