"""A sample survives every form in which it is kept or sent."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.schema import (
    RLE,
    SCHEMA,
    SCORES,
    Entity,
    Outcome,
    Reason,
    Rejection,
    Sample,
    Slice,
    StageName,
    Tag,
    Verdict,
    clean_text,
    current,
    decisive,
    from_json,
    from_table,
    sample_problems,
    slice_from_ipc,
    slice_to_ipc,
    to_json,
    to_parquet,
    to_table,
)
from subject_diffusion.errors import ShardError
from tests.conftest import kept_sample

numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
spans = st.tuples(st.integers(0, 99), st.integers(0, 99))
words = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)
masks = st.builds(RLE, st.tuples(st.integers(1, 999), st.integers(1, 999)), st.text("0123abcXYZ", max_size=9))
entities = st.builds(
    Entity, words, spans, st.tuples(numbers, numbers, numbers, numbers), numbers, numbers, st.none() | masks,
    st.none() | numbers, st.none() | numbers, st.none() | st.sampled_from(Rejection), st.none() | numbers,
    st.none() | words,
)  # fmt: skip
verdicts = st.builds(
    Verdict,
    st.sampled_from(Outcome),
    st.sampled_from(StageName),
    st.none() | st.sampled_from(Reason),
    words,
    st.booleans(),
)
samples = st.builds(
    Sample,
    row=st.integers(0, 2**40),
    url=words,
    alt_text=words,
    licence=words,
    scores=st.dictionaries(st.sampled_from(SCORES), numbers).map(lambda d: tuple(sorted(d.items()))),
    image=st.none() | st.binary(max_size=9),
    thumbnail=st.none() | st.binary(max_size=9),
    http_status=st.none() | st.integers(100, 599),
    width=st.integers(0, 9999),
    phash=st.none() | st.integers(0, 2**64 - 1),
    caption=words,
    tags=st.lists(st.builds(Tag, words, spans, st.booleans(), st.none() | st.integers(2, 6)), max_size=2).map(tuple),
    candidates=st.lists(entities, max_size=3).map(tuple),
    verdict=st.none() | verdicts,
)


@st.composite
def kept(draw: st.DrawFn) -> Sample:
    """A kept sample with nothing to object to, and candidates that were refused."""
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    caption = draw(words.filter(bool))
    span = st.integers(0, len(caption) - 1).flatmap(lambda a: st.tuples(st.just(a), st.integers(a + 1, len(caption))))

    def sides(side: int) -> st.SearchStrategy[list[float]]:
        return st.tuples(*[st.floats(0, side)] * 2).map(sorted).filter(lambda pair: pair[0] < pair[1])

    drawn = []
    for seed in draw(st.lists(st.integers(0, 99), max_size=2)):
        (x1, x2), (y1, y2) = draw(sides(width)), draw(sides(height))
        mask = RLE.of(np.random.default_rng(seed).random((height, width)) < 0.5)
        drawn.append(Entity(draw(words), draw(span), (x1, y1, x2, y2), 0.5, 0.25, draw(st.sampled_from([None, mask]))))
    refused = [c for c in draw(st.lists(entities, max_size=2)) if c.rejected is not None]
    tags = draw(st.lists(st.builds(Tag, words, span), max_size=2))
    return (
        draw(samples)
        .replace(width=width, height=height, caption=caption, tags=tuple(tags), candidates=(*drawn, *refused))
        .kept()
    )


@given(st.lists(samples, max_size=3))
def test_a_slice_sent_between_workers_arrives_as_it_was(members):
    work = Slice(7, tuple(members))
    assert slice_from_ipc(slice_to_ipc(work)) == work


@given(st.lists(samples, max_size=3))
def test_a_sidecar_holds_everything_but_the_image(members):
    table = to_table(members)
    assert table.schema.equals(SCHEMA, check_metadata=True)
    assert from_table(table) == [s.replace(image=None) for s in members]


@given(kept())
def test_the_json_holds_the_accepted_entities_and_nothing_of_the_refused(sample):
    assert not list(sample_problems(sample))
    again = from_json(to_json(sample))
    assert again.candidates == again.entities == sample.entities
    assert (again.caption, again.tags, again.scores, again.phash) == (
        sample.caption,
        sample.tags,
        sample.scores,
        sample.phash,
    )
    assert to_json(again) == to_json(sample)


@given(st.text(st.characters(exclude_categories=()), max_size=20))
def test_hostile_text_is_made_storable(text):
    entity = Entity(text, (0, 1), (0.0, 0.0, 1.0, 1.0), 0.5, 0.5, desc=text)
    dirty = Sample(
        row=0, url=text, alt_text=text, licence=text, opt_out=text, caption=text, caption_model=text,
        tags=(Tag(text, (0, 1)),), candidates=(entity,),
    ).failed(StageName.FETCH, Reason.ERROR, text)  # fmt: skip
    (stored,) = from_table(to_table([dirty]))
    assert stored.alt_text == stored.caption == stored.tags[0].text == clean_text(text)
    assert len(stored.caption) == len(text)  # spans stay right
    assert slice_from_ipc(slice_to_ipc(Slice(0, (dirty,)))).samples == (stored,)
    assert json.loads(to_json(dirty))["alt_text"] == stored.alt_text
    assert to_json(dirty) == to_json(stored)


def test_the_json_is_the_same_before_and_after_a_way_between_workers():
    entity = Entity("mug", (2, 5), (4, 4, 20, 24), 1, 0, None, 1, 0)
    sample = kept_sample(0).replace(candidates=(entity,), scores=(("punsafe", 0),))
    (sent,) = slice_from_ipc(slice_to_ipc(Slice(0, (sample,)))).samples
    assert to_json(sent) == to_json(sample)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'{"schema_version":2}'])
def test_what_is_no_sample_is_refused(data):
    with pytest.raises(ShardError, match="not a sample"):
        from_json(data)


def test_a_json_of_another_schema_version_is_refused():
    tree = json.loads(to_json(kept_sample(0))) | {"schema_version": 99}
    with pytest.raises(ShardError, match="99"):
        from_json(json.dumps(tree).encode())


@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(*[st.floats(-3, 15, allow_nan=False)] * 4),
)
def test_the_area_of_a_mask_inside_a_box_is_that_of_its_pixels_there(seed, size, box):
    mask = np.random.default_rng(seed).random(size) < 0.5
    x1, y1, x2, y2 = (max(int(v), 0) for v in box)
    assert RLE.of(mask).area_within(box) == mask[y1:y2, x1:x2].sum()


@pytest.mark.parametrize(
    ("value", "limit", "text"),
    [
        (0.9, 0.5, "0.900"),
        (0.4996, 0.5, "0.4996"),
        (0.50001, 0.5, "0.50001"),
        (0.5, 0.5, "0.500"),
        (2.9996, 3, "2.9996"),
    ],
)
def test_a_number_is_told_with_the_digits_that_decide(value, limit, text):
    assert decisive(value, limit) == text


@given(numbers, numbers)
def test_a_decisive_number_lies_on_its_own_side_of_the_limit(value, limit):
    told = float(decisive(value, limit))
    assert (told > limit, told < limit) == (value > limit, value < limit)


def without(table: pa.Table, column: str, *fields: str) -> pa.Table:
    """The column, of structs or of lists of them, as it was before it had these fields."""
    kind = table.schema.field(column).type
    rest = pa.struct([f for f in (kind.value_type if pa.types.is_list(kind) else kind) if f.name not in fields])
    earlier = table[column].cast(pa.list_(rest) if pa.types.is_list(kind) else rest)
    return table.set_column(table.column_names.index(column), column, earlier)


def test_a_sidecar_from_before_classifiers_and_descriptions_is_read_and_one_of_other_columns_is_not():
    today = to_table([kept_sample(0).replace(scores=(("punsafe", 0.5),))])
    before = without(without(today, "scores", "nsfw", "watermark"), "candidates", "desc")
    before = pq.ParquetFile(io.BytesIO(to_parquet(before, 100))).read()  # which calls the elements of lists otherwise
    assert not before.schema.equals(SCHEMA)
    assert from_table(current(before)) == from_table(today)
    later = today.set_column(0, "row", today["row"].cast(pa.int32()))
    for other in (today.drop_columns(["scores"]), today.rename_columns({"row": "rows"}), later):
        with pytest.raises(ShardError, match="other columns"):
            current(other)
