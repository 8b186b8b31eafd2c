"""Inputs written by other tools' libraries, and what they should be read as."""

from __future__ import annotations

import csv
import io
import json
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datapipe.schema import Sample
from datapipe.sources import InputRows, SourceSettings, open_source
from subject_diffusion.errors import SourceError

LAION = {
    "SAMPLE_ID": 7,
    "URL": "http://a.example/0.jpg",
    "TEXT": "a dog",
    "HEIGHT": 10,
    "WIDTH": 20,
    "LICENSE": "CC-BY",
    "similarity": 0.31,
    "punsafe": 0.01,
    "pwatermark": 0.2,
    "AESTHETIC_SCORE": 6.5,
    "hash": 123,
}


def records(count: int) -> list[dict[str, Any]]:
    return [
        {
            "url": f"http://a.example/{i}.jpg" if i % 7 else None,
            "caption": f'row {i}, "quoted"\nand ☕',
            "punsafe": i / 100 if i % 3 else None,
        }
        for i in range(count)
    ]


def expected(count: int) -> list[Sample]:
    return [
        Sample(
            row=i,
            url=r["url"] or "",
            alt_text=r["caption"],
            scores=(("punsafe", r["punsafe"]),) if r["punsafe"] is not None else (),
        )
        for i, r in enumerate(records(count))
    ]


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, **options)
    return path


def write_delimited(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def write_json(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(list(rows), indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def opened(path: Path | str, scratch: Path, **settings: Any) -> InputRows:
    return open_source(SourceSettings(path=str(path), **settings), str(scratch))


def whole(source: InputRows) -> list[Sample]:
    return source.read(0, source.rows)


def refusal(path: Path | str, scratch: Path, **settings: Any) -> str:
    with pytest.raises(SourceError) as caught:
        opened(path, scratch, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message, "every error says what to do"
    return message


def img2dataset_members(count: int) -> list[tuple[str, bytes]]:
    members = []
    for i in range(count):
        facts = {"url": f"http://x/{i}", "caption": f"row {i}", "LICENSE": "CC0", "punsafe": 0.5, "status": "success"}
        members.append((f"{i:09d}.jpg", f"image {i}".encode()))
        members.append((f"{i:09d}.json", json.dumps(facts).encode()))
        members.append((f"{i:09d}.txt", f"row {i}".encode()))
    return members


def image_folder(root: Path) -> Path:
    (root / "b").mkdir(parents=True)
    for name in ["b/2.png", "1.jpg", "b-side.JPG", "ü.webp"]:
        (root / name).write_bytes(name.encode())
    (root / "1.txt").write_text("the first\n")
    (root / "notes.md").write_text("none")
    return root


def tfrecord_of(**features: bytes) -> bytes:
    """One record of a TFRecord file: a tf.train.Example with these features, each of fewer than 100 bytes."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    told = [field(1, field(1, n.encode()) + field(2, field(1, field(1, v)))) for n, v in features.items()]
    example = field(1, b"".join(told))
    return struct.pack("<QI", len(example), 0) + example + bytes(4)
