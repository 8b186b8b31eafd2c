"""An opened input: how many rows it has, what tells it from another, and any slice of its rows."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import fsspec

from datapipe.errors import SourceError
from datapipe.schema import Reason, Sample, StageName
from datapipe.sources.images import IMAGE_SUFFIXES, image_files, rows_of_folder, rows_of_tars
from datapipe.sources.index import INDEX_VERSION, IndexRow, build_index
from datapipe.sources.settings import Kind, SourceSettings
from datapipe.sources.storage import Listing, explained, list_files, with_content_versions
from datapipe.sources.tables import PARQUET, TABLE_SUFFIXES, count_parquet, read_parquet, rows_of_tables

PLACE_COLUMNS = ("image_file", "image_offset", "image_size")

IMAGE_LIMIT = 512 << 20
"""Bytes of an image that came with its row beyond which it is not read into memory at all."""


@dataclass(frozen=True)
class Source:
    """An input, as parquet files: its own, or the index of it. Small; sent to every worker, who opens the files anew.

    `tables`: (URL of a parquet file, its rows), in order. `image_root`: the folder that the index's image files are
    relative to; none when images are to be fetched.
    """

    rows: int
    """Rows in all."""
    fingerprint: str
    """Changes with the input's files (names, sizes, ETags or times of change) and its number of rows."""
    tables: tuple[tuple[str, int], ...]
    settings: SourceSettings
    image_root: str | None = None

    @cached_property
    def _starts(self) -> list[int]:
        return list(itertools.accumulate((rows for _, rows in self.tables), initial=0))

    def read(self, start: int, stop: int) -> list[Sample]:
        """Rows `start` to `stop - 1` of the whole input; images that came along are read, the others left to fetch."""
        if not 0 <= start <= stop <= self.rows:
            raise ValueError(f"rows {start} to {stop} of {self.rows}")
        samples = list(itertools.chain.from_iterable(self._parts(start, stop)))
        if len(samples) != stop - start:
            raise SourceError(
                f"input {self.settings.path} has lost rows since it was opened; start again with another OUT"
            )
        return samples

    def _parts(self, start: int, stop: int) -> Iterator[list[Sample]]:
        table = max(bisect.bisect_right(self._starts, start) - 1, 0)
        while start < stop:
            url, rows = self.tables[table]
            first = self._starts[table]
            end = min(stop, first + rows)
            extra = PLACE_COLUMNS if self.image_root is not None else ()
            records = []
            samples = []
            with explained(url):
                for row, (facts, record) in enumerate(
                    read_parquet(url, self.fingerprint, start - first, end - first, self.settings, extra), start
                ):
                    samples.append(
                        Sample(row, url=facts.url, alt_text=facts.alt_text, licence=facts.licence, scores=facts.scores)
                    )
                    records.append(record)
            yield _with_images(samples, records, self.image_root) if self.image_root is not None else samples
            start, table = end, table + 1


def open_source(settings: SourceSettings, scratch: str) -> Source:
    """Opens the input of `settings.path`. What is not parquet is read through once, and an index of it is kept in
    `scratch/input` (local or a bucket; every worker must be able to read it). Raises SourceError.
    """
    if not settings.path:
        raise SourceError(
            "no input is named; give a URL table, img2dataset tars or an image folder with INPUT=… (--input)"
        )
    with explained(settings.path):
        listing = list_files(settings.path)
        kind = _kind_of(listing) if settings.kind == "auto" else settings.kind
        source = {"table": _open_table, "img2dataset": _open_tars, "folder": _open_folder}[kind](
            listing, settings, scratch
        )
    if not source.rows:
        raise SourceError(
            f"input {settings.path}: holds no rows; check that it is the right table and was written whole"
        )
    return source


def _kind_of(listing: Listing) -> Kind:
    suffixes = {file.suffix for file in listing.files}
    if ".tar" in suffixes:
        return "img2dataset"  # which puts a parquet and a json of its own beside every tar
    has_images = not suffixes.isdisjoint(IMAGE_SUFFIXES)
    if suffixes.isdisjoint(TABLE_SUFFIXES):
        if listing.is_folder:
            return "folder"
        if has_images:
            raise SourceError(f"input {listing.path}: images; name the folder that holds them")
        raise SourceError(
            f"input {listing.path}: neither a table ({', '.join(TABLE_SUFFIXES)}) nor a .tar nor a folder of images; "
            "rename it by what it is"
        )
    if has_images:
        raise SourceError(f"input {listing.path}: holds tables and images; set source.kind to table or folder")
    return "table"


def _open_table(listing: Listing, settings: SourceSettings, scratch: str) -> Source:
    files = tuple(file for file in listing.files if file.suffix in TABLE_SUFFIXES)
    formats = sorted({"json" if f.suffix.startswith((".json", ".ndjson")) else f.suffix[1:] for f in files})
    if not files:
        raise SourceError(f"input {listing.path}: no table in it ({', '.join(TABLE_SUFFIXES)}); check the path")
    if len(formats) > 1:
        raise SourceError(
            f"input {listing.path}: holds {' and '.join(formats)}; choose by a glob such as '*.{formats[0]}'"
        )
    identity = _identity("table", ((f.name, f.size, f.version) for f in with_content_versions(files)), settings)
    if files[0].suffix not in PARQUET:
        return _indexed(listing.path, scratch, identity, lambda: rows_of_tables(files, settings), None)
    counts = count_parquet(files, settings)
    tables = tuple((f.url, rows) for f, rows in zip(files, counts, strict=True))
    return Source(sum(counts), _fingerprint(identity, sum(counts)), tables, settings)


def _open_tars(listing: Listing, settings: SourceSettings, scratch: str) -> Source:
    tars = tuple(file for file in listing.files if file.suffix == ".tar")
    if not tars:
        raise SourceError(f"input {listing.path}: no .tar in it; name the folder that img2dataset wrote")
    identity = _identity("img2dataset", ((f.name, f.size, f.version) for f in tars), settings)
    source = _indexed(listing.path, scratch, identity, lambda: rows_of_tars(tars, settings), listing.root)
    if source.rows and not any(s.image for s in source.read(0, min(source.rows, 100))):
        raise SourceError(f"input {listing.path}: no images in the tars' first samples; give the URL table instead")
    return source


def _open_folder(listing: Listing, settings: SourceSettings, scratch: str) -> Source:
    if not listing.is_folder:
        raise SourceError(f"input {listing.path}: source.kind is folder, and this is none; name a folder")
    images = ((os.fsdecode(i.name), i.size, i.version, i.text_version) for i in image_files(listing.root))
    first = next(images, None)
    if first is None:
        raise SourceError(
            f"input {listing.path}: no images in this folder ({', '.join(IMAGE_SUFFIXES)}); check the path"
        )
    identity = _identity("folder", itertools.chain([first], images), settings)
    return _indexed(listing.path, scratch, identity, lambda: rows_of_folder(listing.root), listing.root)


def _indexed(
    path: str, scratch: str, identity: str, rows: Callable[[], Iterable[IndexRow]], image_root: str | None
) -> Source:
    url, count = build_index(scratch, identity[:24], rows)
    # The index has names of its own: the recipe's column names do not apply to it.
    return Source(count, _fingerprint(identity, count), ((url, count),), SourceSettings(path=path), image_root)


def _identity(kind: str, files: Iterable[tuple[object, ...]], settings: SourceSettings) -> str:
    columns = settings.model_dump(include={"url_column", "alt_text_column", "licence_column"})
    digest = hashlib.sha256(json.dumps([INDEX_VERSION, kind, columns]).encode())
    for file in files:
        digest.update(json.dumps(file).encode())
    return digest.hexdigest()


def _fingerprint(identity: str, rows: int) -> str:
    return hashlib.sha256(f"{identity} {rows}".encode()).hexdigest()


def _with_images(samples: list[Sample], records: Sequence[dict[str, Any]], root: str) -> list[Sample]:
    """The samples with their images, where the index knows of one; one that is gone fails its row alone."""
    fs, inner = fsspec.url_to_fs(root)
    placed = [i for i, record in enumerate(records) if record["image_file"] is not None]
    wanted = [i for i in placed if records[i]["image_size"] <= IMAGE_LIMIT]
    paths = [f"{inner.rstrip('/')}/{os.fsdecode(records[i]['image_file'])}" for i in wanted]
    starts = [records[i]["image_offset"] for i in wanted]
    ends = [records[i]["image_offset"] + records[i]["image_size"] for i in wanted]
    # A range of no bytes is an error to a bucket; it needs no asking either.
    read = iter(fs.cat_ranges(*_of_some_length(paths, starts, ends), on_error="return"))
    for i in sorted(set(placed) - set(wanted)):
        samples[i] = samples[i].failed(StageName.FETCH, Reason.TOO_LARGE, f"{records[i]['image_size']} bytes")
    for i in wanted:
        size = records[i]["image_size"]
        data = next(read) if size else b""
        if isinstance(data, bytes) and len(data) == size:
            samples[i] = samples[i].replace(image=data)
        else:
            what = f"{len(data)} of {size} bytes" if isinstance(data, bytes) else type(data).__name__
            samples[i] = samples[i].failed(StageName.FETCH, Reason.UNREADABLE, what, retryable=True)
    return samples


def _of_some_length(paths: list[str], starts: list[int], ends: list[int]) -> tuple[list[str], list[int], list[int]]:
    some = [i for i in range(len(paths)) if ends[i] > starts[i]]
    return [paths[i] for i in some], [starts[i] for i in some], [ends[i] for i in some]
