"""Whatever is written into any kind of input is read back equal, and conserved through a shard."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.schema import Slice, clean_text, slice_from_ipc, slice_to_ipc
from datapipe.shards import Provenance, Store, read_manifest, read_slice, write_shard
from datapipe.sources.columns import is_place
from tests.sources.inputs import opened, whole, write_tar


@dataclass(frozen=True)
class Given:
    """A row before it is written. `image`: None where the format brings none."""

    text: str
    image: bytes


def _table(folder: Path, rows: list[Given], name: str) -> None:
    delimiter = "\t" if name.endswith("tsv") else ","
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(
            [("url", "caption"), *((_url(i), r.text) for i, r in enumerate(rows))]
        )


def _json(folder: Path, rows: list[Given], name: str) -> None:
    records = [{"url": _url(i), "caption": row.text} for i, row in enumerate(rows)]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / name).write_text(lines if name.endswith("l") else json.dumps({"data": records}), encoding="utf-8")


def _parquet(folder: Path, rows: list[Given], name: str) -> None:
    images = [{"bytes": row.image, "path": None} for row in rows]
    pq.write_table(pa.table({"image": images, "caption": [row.text for row in rows]}), folder / name, row_group_size=3)


def _arrow(folder: Path, rows: list[Given], name: str) -> None:
    table = pa.table({"image": [row.image for row in rows], "caption": [row.text for row in rows]})
    with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def _tar(folder: Path, rows: list[Given], name: str) -> None:
    texts = [(f"{i:03d}.json", json.dumps({"caption": row.text}).encode()) for i, row in enumerate(rows)]
    images = [(f"{i:03d}.jpg", row.image) for i, row in enumerate(rows)]
    write_tar(folder / name, images + texts)


def _image_folder(folder: Path, rows: list[Given], name: str) -> None:
    for number, row in enumerate(rows):
        (folder / f"{number:03d}.jpg").write_bytes(row.image)
    lines = [json.dumps({"file_name": f"{i:03d}.jpg", "text": row.text}) for i, row in enumerate(rows)]
    (folder / name).write_text("\n".join(lines))


def _url(number: int) -> str:
    return f"http://x.example/{number}.jpg"


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda text: not text.startswith("\ufeff")
)
# Bytes that spell a path are taken for one.
IMAGES = st.binary(max_size=12).filter(lambda data: not is_place(data.decode("latin-1")))
ROWS = st.lists(st.builds(Given, TEXTS, IMAGES), min_size=1, max_size=8)
FETCHED: list[tuple[str, Callable[[Path, list[Given], str], None]]] = [
    ("t.csv", _table), ("t.tsv", _table), ("t.jsonl", _json), ("t.json", _json),
]  # fmt: skip
BROUGHT: list[tuple[str, Callable[[Path, list[Given], str], None]]] = [
    ("t.parquet", _parquet), ("t.arrow", _arrow), ("t.tar", _tar), ("metadata.jsonl", _image_folder),
]  # fmt: skip


@pytest.mark.parametrize(("name", "write"), [*FETCHED, *BROUGHT], ids=[name for name, _ in (*FETCHED, *BROUGHT)])
@settings(max_examples=10, deadline=None)
@given(rows=ROWS)
def test_what_is_written_is_read_back_equal_and_goes_through_a_shard(
    tmp_path_factory: pytest.TempPathFactory, name: str, write: Callable[..., None], rows: list[Given]
) -> None:
    folder = tmp_path_factory.mktemp("in")
    write(folder, rows, name)
    samples = whole(opened(folder, tmp_path_factory.mktemp("scratch")))
    assert [sample.alt_text for sample in samples] == [row.text for row in rows]
    if name in dict(BROUGHT):
        assert [sample.image for sample in samples] == [row.image for row in rows]
    else:
        assert [sample.url for sample in samples] == [_url(i) for i in range(len(rows))]
    # The schema is the one gate: control characters become spaces there, and nothing else changes.
    cleaned = tuple(sample.replace(alt_text=clean_text(sample.alt_text)) for sample in samples)
    assert slice_from_ipc(slice_to_ipc(Slice(0, tuple(samples)))).samples == cleaned
    store = Store(str(tmp_path_factory.mktemp("out")))
    write_shard(store, "raw", Slice(0, tuple(samples)), Provenance("r", "c", "i", {}))
    stored = read_slice(store, read_manifest(store, "raw", 0)).samples
    assert [(s.row, s.url, s.alt_text) for s in stored] == [(s.row, s.url, s.alt_text) for s in cleaned]
