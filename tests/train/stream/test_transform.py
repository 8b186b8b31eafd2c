"""Where the square that is learned is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datapipe.schema import Entity, Sample, Slice
from datapipe.shards import Store, write_shard
from tests.conftest import jpeg, rle
from tests.train.datasets import PROVENANCE, TAGS
from train import Stream, SubjectTransform

WIDTH, SIDE = 80, 32


def wide(row: int, lefts: tuple[int, ...]) -> Sample:
    """The picture of 80 x 32 pixels with a subject of 16 x 20 at each of `lefts`: a mug, a fish, a robot."""
    entities = [
        Entity(tag, (2, 5), (left, 4.0, left + 16.0, 24.0), 0.9, 0.8, rle(SIDE, WIDTH, (left, 4, left + 16, 24)),
               1.0, 1.0)
        for tag, left in zip(TAGS, lefts, strict=False)
    ]  # fmt: skip
    return Sample(
        row=row, caption="a mug", image=jpeg(WIDTH, SIDE, 0), width=WIDTH, height=SIDE, original_width=WIDTH,
        original_height=SIDE, sha256="ab" * 32, phash=row, candidates=tuple(entities),
    ).kept()  # fmt: skip


def squares(folder: Path, lefts: tuple[int, ...], drop_subjects: float = 0.0) -> list[dict[str, Any]]:
    """What is cut from 40 such pictures."""
    samples = tuple(wide(row, lefts) for row in range(40))
    write_shard(Store(str(folder)), "shard", Slice(0, samples), PROVENANCE)
    transform = SubjectTransform(size_px=SIDE, max_subjects=3, drop_subjects=drop_subjects)
    stream = Stream(str(folder), 1, transform, cache=folder / "cache")
    return [dict(batch) for batch in stream]


def test_the_square_lies_anywhere_as_long_as_it_holds_every_subject(tmp_path: Path) -> None:
    cut = squares(tmp_path, (30, 34))
    boxes = np.array([square["boxes"][0, :2].numpy() * SIDE for square in cut])
    assert np.allclose(boxes[:, :, 2] - boxes[:, :, 0], 16) and np.allclose(boxes[:, :, 3] - boxes[:, :, 1], 20)
    lefts = boxes[:, 0, 0]
    assert lefts.min() >= 0 and lefts.max() <= SIDE - 20, "the two together are 20 pixels wide"
    assert len(set(lefts)) > 6
    masks = np.array([square["masks"][0, 0].numpy() for square in cut])
    assert (masks.sum((1, 2)) == 16 * 20).all() and (masks.any(1).argmax(1) == lefts).all()


def test_where_no_square_holds_every_subject_it_is_the_middle_one(tmp_path: Path) -> None:
    for square in squares(tmp_path, (0, 30, 64)):
        assert square["present"].tolist() == [[True, False, False]] and square["tags"][0][0] == "fish"
        assert square["boxes"][0, 0].numpy() * SIDE == pytest.approx([6, 4, 22, 24])


def test_without_subjects_the_square_lies_anywhere(tmp_path: Path) -> None:
    cut = squares(tmp_path, ())
    assert not any(square["present"].any() for square in cut)
    assert len({square["image"].numpy().tobytes() for square in cut}) > 20


def test_as_often_as_asked_some_of_the_subjects_are_left_out(tmp_path: Path) -> None:
    lefts = (28, 30, 34)
    counts = {
        share: [int(square["present"].sum()) for square in squares(tmp_path / str(share), lefts, share)]
        for share in (0.0, 0.5, 1.0)
    }
    assert set(counts[0.0]) == {3} and set(counts[1.0]) == {1, 2} and set(counts[0.5]) == {1, 2, 3}
    assert 10 <= counts[0.5].count(3) <= 30
    alone = squares(tmp_path / "alone", (30,), 1.0)
    assert all(square["present"].tolist() == [[True, False, False]] for square in alone)
    cut = squares(tmp_path / "tags", lefts, 1.0)
    assert len({tuple(square["tags"][0]) for square in cut}) == 6, "any of them, in the caption's order"
