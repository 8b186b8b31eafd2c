"""Draws the documentation's pictures with the bundled toy subject model.

    make out/toy-held-out/contact-sheet.png
    sdd evaluate toyworld/weights/subject-diffusion --out out/evaluation
    python benchmarks/overview.py out/evaluation

docs/overview.jpg: the whole way of two held-out toy images. docs/train.jpg: the first samples of the evaluation.
docs/individuals.jpg: for each noun, the reference of one of four individuals, and a sample of each. The right choices
are printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from datapipe.inspect.draw import draw_sample
from datapipe.schema import Entity
from model import Subject, prepare_reference
from subject_diffusion import Labeler
from toyworld.render.web import render_web_image
from train.evaluation.cases import Case, find_cases
from train.sampling.trained import SHIPPED
from train.trainer.identities import Name
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
HELD_OUT = "out/toy-held-out"
CHOICES = "abcd"
"""Names of the individuals of a row to choose from."""
CHOICE_PX, CHOICE_COLUMNS = 96, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, help="folder of a report of `sdd evaluate`")
    evaluation = parser.parse_args().evaluation
    sheet, answers = individuals()
    samples(evaluation).save(DOCS / "train.jpg", quality=90)
    overview().save(DOCS / "overview.jpg", quality=88)
    sheet.save(DOCS / "individuals.jpg", quality=85)
    print("individuals.jpg:", " ".join(f"{row}{answer}" for row, answer in enumerate(answers, 1)))


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


def individuals() -> tuple[Image.Image, str]:
    """A row for every noun of which four held-out individuals are there, in three columns. A row's samples have one
    caption, one box and one noise, those of the image that shows its subject largest, and differ in their references
    alone. With the right choices, in the order of the rows."""
    shipped = DOCS.parent / SHIPPED
    pipeline, recipe = open_pipeline(shipped), read_recipe(shipped)
    by_noun: dict[str, dict[Name, Case]] = defaultdict(dict)
    for case in find_cases(HELD_OUT, HELD_OUT_IMAGES, recipe.examples, (1, 1)):
        by_noun[case.subjects[0].tag].setdefault(case.individuals[0], case)
    rng, answers, rows = np.random.default_rng(0), "", []
    for noun in sorted(by_noun):
        cases = list(by_noun[noun].values())[: len(CHOICES)]
        if len(cases) == len(CHOICES):
            right = int(rng.integers(len(CHOICES)))
            answers += CHOICES[right]
            scene = max(cases, key=_area)
            rows.append([_reference(cases[right])])
            for case in cases:
                shown = dataclasses.replace(scene.subjects[0], image=case.subjects[0].image, mask=case.subjects[0].mask)
                (drawn,) = draw_samples(pipeline, [dataclasses.replace(scene, subjects=(shown,))], recipe.validation)
                rows[-1].append(drawn.resize((CHOICE_PX,) * 2, Image.Resampling.LANCZOS))
    return _sheet_of_choices(rows), answers


def _area(case: Case) -> float:
    assert case.subjects[0].box is not None
    x1, y1, x2, y2 = case.subjects[0].box
    return (x2 - x1) * (y2 - y1)


def _reference(case: Case) -> Image.Image:
    subject = case.subjects[0]
    return prepare_reference(subject.picture, subject.mask_array(), CHOICE_PX)


def _sheet_of_choices(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    step, font = CHOICE_PX + GRID_GAP_PX, ImageFont.load_default(size=16)
    high = math.ceil(len(rows) / CHOICE_COLUMNS)
    wide = step * (1 + len(CHOICES)) + 3 * GAP_PX
    sheet = Image.new("RGB", (CHOICE_COLUMNS * wide, TITLE_PX + high * step), PAPER)
    pen = ImageDraw.Draw(sheet)
    for row, pictures in enumerate(rows):
        left, top = row // high * wide + 2 * GAP_PX, TITLE_PX + row % high * step
        pen.text((left - 2 * GAP_PX + 2, top + CHOICE_PX // 2), str(row + 1), font=font, fill=INK, anchor="lm")
        for column, (picture, title) in enumerate(zip(pictures, ("reference", *CHOICES), strict=True)):
            sheet.paste(picture, (left + column * step, top))
            if row % high == 0:
                pen.text((left + column * step, 10), title, font=font, fill=INK)
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
