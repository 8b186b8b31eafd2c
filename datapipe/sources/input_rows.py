"""An opened input: how many rows it has, what tells it from another, and any slice of its rows."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import IO

from datapipe.schema import Sample
from datapipe.sources.arrow_tables import read_arrow
from datapipe.sources.columns import is_in_bucket
from datapipe.sources.compression import decompressed
from datapipe.sources.delimited import read_delimited
from datapipe.sources.failed_downloads import failed_downloads
from datapipe.sources.folders import image_files, rows_of_folder
from datapipe.sources.hugging_face import dataset_identity, pinned, write_rows
from datapipe.sources.input_files import InputFile, explained, opened_as_it_is, url_of, with_content_versions
from datapipe.sources.json_tables import read_json
from datapipe.sources.kinds import (
    ARROW,
    DELIMITED_SUFFIXES,
    PARQUET,
    TFRECORD,
    Recognized,
    counted,
    format_of,
    recognize_kind,
)
from datapipe.sources.listing import Listing, list_files
from datapipe.sources.parquet_tables import Table, open_parquet, read_parquet
from datapipe.sources.row_images import samples_of
from datapipe.sources.row_index import (
    INDEX_FOLDER,
    INDEX_VERSION,
    DamagedError,
    Found,
    ImagePlace,
    InputRow,
    NothingReadableError,
    RowFacts,
    build_index,
    rows_of_index,
)
from datapipe.sources.scanning import shown
from datapipe.sources.settings import SourceSettings
from datapipe.sources.tar_keys import IMAGE_ENDINGS
from datapipe.sources.tars import rows_of_tars
from datapipe.sources.temporary_database import temporary_database
from datapipe.sources.tfrecords import read_tfrecords
from datapipe.sources.videos import VIDEO_SUFFIXES, rows_of_videos, video_files
from subject_diffusion.errors import RunError, SourceError
from subject_diffusion.storage import file_system, named_errors, whole_file

_OF_KIND = {"frame_spacing_s": "video", "subset": "hf", "split": "hf", "revision": "hf"}
"""Settings that say something of one kind of input alone."""
FIRST_ROWS = 100
"""Rows of which at least one image must be there, where images should have come along."""


@dataclass(frozen=True)
class InputRows:
    """An input, as parquet files: its own, or the index of it. Small; sent to every worker, who opens the files anew.

    `tables`: the parquet files, in order. `root`: the folder that paths of images are relative to. `indexed`: the one
    table is an index. `found`: what was recognized, for the user.
    """

    rows: int
    """Rows in all."""
    fingerprint: str
    """Changes with the input's files (names, sizes, ETags or times of change) and its number of rows."""
    tables: tuple[Table, ...]
    settings: SourceSettings
    root: str = ""
    indexed: bool = False
    found: Found | None = None

    @cached_property
    def _starts(self) -> list[int]:
        return list(itertools.accumulate((table.rows for table in self.tables), initial=0))

    def read(
        self, start: int, stop: int, first_row: int | None = None, hold: Callable[[bytes], bytes] = bytes
    ) -> list[Sample]:
        """Rows `start` to `stop - 1` of the whole input; images that came along are read, the others left to fetch. A
        row that could not be read has a verdict. `first_row`: the number of the first one in the dataset; default:
        `start`. `hold`: is given each image, and gives back what the sample has of it."""
        rows = self._rows(start, stop, hold)
        return samples_of(rows, start if first_row is None else first_row, self.root, hold)

    def facts(self, start: int, stop: int) -> list[RowFacts]:
        """What the input says about rows `start` to `stop - 1`, without their images."""
        return [row.facts for row in self._rows(start, stop)]

    def _rows(self, start: int, stop: int, hold: Callable[[bytes], bytes] = bytes) -> list[InputRow]:
        if not 0 <= start <= stop <= self.rows:
            raise ValueError(f"rows {start} to {stop} of {self.rows}")
        read = itertools.chain.from_iterable(self._parts(start, stop))
        rows = [replace(row, image=hold(row.image)) if isinstance(row.image, bytes) else row for row in read]
        if len(rows) != stop - start:
            raise SourceError(
                f"input {self.settings.path} has lost rows since it was opened; start again with another OUT"
            )
        return rows

    def _parts(self, start: int, stop: int) -> Iterator[Iterable[InputRow]]:
        at = max(bisect.bisect_right(self._starts, start) - 1, 0)
        while start < stop:
            table, first = self.tables[at], self._starts[at]
            end = min(stop, first + table.rows)
            if self.indexed:
                yield rows_of_index(table.url, self.fingerprint, start - first, end - first)
            else:
                rows = read_parquet(table, self.fingerprint, start - first, end - first, self.settings)
                yield map(_without_place, rows) if self.settings.kind == "hf" else rows
            start, at = end, at + 1

    def only(self, numbers: Iterable[int], scratch: str) -> InputRows:
        """An input of these rows alone, which is kept in a folder."""
        numbers = tuple(numbers)
        name = f"rows-{hashlib.sha256(f'{self.fingerprint} {numbers}'.encode()).hexdigest()[:12]}"
        rows = itertools.chain.from_iterable(self._rows(number, number + 1) for number in numbers)
        return replace(rows_as_input(scratch, name, lambda: rows), root=self.root)

    def described(self) -> list[str]:
        """What was recognized, in lines for the user: first the rows and columns, then what could not be read."""
        found = self.found or Found()
        lost = f"; {found.lost:,} of them cannot be read, and will fail" if found.lost else ""
        lost += f"; {found.not_downloaded:,} that img2dataset could not download will fail" * (found.not_downloaded > 0)
        words = f": {found.words}" if found.words else ""
        more = found.lost > len(found.problems)
        return [
            f"input {self.settings.path}: {counted(self.rows, 'row')}{words}{lost}",
            *(f"note: {note}" for note in found.notes),
            *(f"not read: {problem}" for problem in found.problems),
            *(["not read: …"] if more and found.problems else []),
        ]


def _without_place(row: InputRow) -> InputRow:
    """A row of a dataset that anybody may have put on the hub: a path in it could name any file of this machine, or of
    the user's buckets."""
    if not isinstance(row.image, ImagePlace):
        return row
    return InputRow(row.facts, problem="names a file or an object of a bucket, and not an image within the dataset")


def open_source(settings: SourceSettings, scratch: str, glance: int | None = None) -> InputRows:
    """Opens the input of `settings.path`. What is not parquet is read through once, and an index of it is kept in
    `scratch/input` (local or a bucket; every worker must be able to read it). Raises SourceError.

    glance: of a Hugging Face dataset, which is copied there with its images, so many first rows suffice; others are
    opened whole.
    """
    if not settings.path:
        raise SourceError(
            "no input is named; give a URL table, img2dataset tars or an image folder with INPUT=… (--input)"
        )
    if settings.kind == "hf":
        rows, root = _open_hugging_face(settings, scratch, glance), settings.path
    else:
        rows, root = _open_files(settings, scratch)
    if not rows.rows:
        raise SourceError(
            f"input {settings.path}: holds no rows; check that it is the right table and was written whole"
        )
    if settings.strict and rows.found is not None and rows.found.lost:
        raise SourceError(f"input {root}/{rows.found.problems[0]}")
    _check_images(rows)
    return rows


def _open_files(settings: SourceSettings, scratch: str) -> tuple[InputRows, str]:
    """The rows, and the folder that they are of."""
    with explained(settings.path), list_files(settings.path) as listing:
        recognized = recognize_kind(listing, settings.kind)
        opens = {"table": _open_table, "img2dataset": _open_tars, "folder": _open_folder, "video": _open_videos}
        root = listing.root.rstrip("/")
        try:
            return opens[recognized.kind](listing, recognized, settings, scratch), root
        except NothingReadableError as error:
            raise SourceError(f"input {root}/{error}") from None


def _open_hugging_face(settings: SourceSettings, scratch: str, glance: int | None) -> InputRows:
    settings = pinned(settings)
    part = [] if glance is None else [("first rows", glance)]
    identity = _identity("hf", itertools.chain(dataset_identity(settings), part), settings)
    with named_errors(scratch, RunError):
        fs, folder = file_system(f"{scratch.rstrip('/')}/{INDEX_FOLDER}", RunError)
        target = f"{folder}/{identity[:24]}.parquet"
        if not fs.exists(target):
            fs.makedirs(folder, exist_ok=True)
            with whole_file(target, fs) as file:
                write_rows(file, settings, glance)
        copied = InputFile(url_of(fs, target), posixpath.basename(target), fs.size(target), identity)
    found = Found()
    (table,) = open_parquet([copied], settings, found)
    found.words = f"{'the first of ' if part else ''}a Hugging Face dataset, {found.words}"
    return InputRows(table.rows, _fingerprint(identity, table.rows), (table,), settings, found=found)


def rows_as_input(scratch: str, name: str, rows: Callable[[], Iterable[InputRow]]) -> InputRows:
    """An input of the rows that `rows` gives, kept as `scratch/input/name.parquet`; where that is there, of those in
    it."""
    index = build_index(scratch, name, lambda _: rows())
    return InputRows(
        index.rows,
        _fingerprint(name, index.rows),
        (Table(index.url, index.rows),),
        SourceSettings(path=index.url),
        indexed=True,
        found=index.found,
    )


def _open_table(listing: Listing, recognized: Recognized, settings: SourceSettings, scratch: str) -> InputRows:
    files, first = recognized.files, recognized.files.first()
    sidecar_of = listing.beside(files, PARQUET) if first.suffix == TFRECORD else no_sidecar
    versions = with_content_versions(lambda: _with_sidecars(files, sidecar_of))
    identity = _identity("table", ((f.name, f.size, f.version) for f in versions), settings)
    if first.suffix != PARQUET:
        rows = _indexed(
            listing, scratch, identity, lambda found: _rows_of_tables(files, sidecar_of, settings, found), settings
        )
    else:
        found = Found()
        tables = tuple(shown(open_parquet(files, settings, found, recognized.shard_of), "parquet files opened"))
        count = sum(table.rows for table in tables)
        found.check(count)
        rows = InputRows(count, _fingerprint(identity, count), tables, settings, listing.root, found=found)
    assert rows.found is not None
    saved = ", images that img2dataset saved" if recognized.shard_of is not None else ""
    rows.found.words = f"{counted(len(files), f'{format_of(first)} file')}, {rows.found.words}{saved}"
    names_images = recognized.names_images or (recognized.notes and any(_files(rows, FIRST_ROWS)))
    for note in _unnamed_images(rows) if names_images else recognized.notes:
        rows.found.note(note)
    return rows


def _files(rows: InputRows, most: int) -> Iterator[ImagePlace]:
    """The places of images that are files of their own, among the first `most` rows."""
    images = (row.image for row in itertools.chain(*rows._parts(0, min(most, rows.rows))))
    return (image for image in images if isinstance(image, ImagePlace) and image.size is None)


def _unnamed_images(rows: InputRows) -> Iterator[str]:
    """A note of the images of a folder that its tables do not name."""
    with temporary_database() as database:
        database.execute("CREATE TABLE named (file PRIMARY KEY) WITHOUT ROWID")
        files = ((os.path.normpath(image.file),) for image in _files(rows, rows.rows))
        database.executemany("INSERT OR IGNORE INTO named VALUES (?)", files)
        inside = shown((image.name for image in image_files(rows.root)), "images looked for in the table")
        query = "SELECT 1 FROM named WHERE file = ?"
        left_out = (name for name in inside if database.execute(query, (name,)).fetchone() is None)
        first = next(left_out, None)
        if first is not None:
            count = counted(1 + sum(1 for _ in left_out), "image")
            yield f"{count} that the table does not name left out; first: {os.fsdecode(first)}"


def _rows_of_tables(
    files: Iterable[InputFile],
    sidecar_of: Callable[[str], InputFile | None],
    settings: SourceSettings,
    found: Found,
) -> Iterator[InputRow]:
    """Every row of tables that are not read in place, in order; of a damaged file, one row for all that is lost.
    `sidecar_of`: of a tfrecord, by its name."""
    for file in files:
        try:
            with opened_as_it_is(file.url) as raw:
                table = decompressed(raw)
                for row in _reader_of(file)(table, file, settings, found):
                    # The place of an image is that in what was read; a path of its own says nothing of the table.
                    place = row.image if table is not raw and isinstance(row.image, ImagePlace) else None
                    inside = place is not None and place.size is not None
                    yield replace(row, image=replace(place, packed=True)) if place and inside else row
        except DamagedError as error:
            if settings.strict:
                raise
            yield InputRow.lost(error.about(file.url, file.name))
        yield from failed_downloads(sidecar_of(file.name), settings, found)


def no_sidecar(name: str) -> None:
    """The sidecar of files that have none."""


def _with_sidecars(files: Iterable[InputFile], sidecar_of: Callable[[str], InputFile | None]) -> Iterator[InputFile]:
    """The files, and then their sidecars."""
    yield from files
    yield from (sidecar for file in files if (sidecar := sidecar_of(file.name)) is not None)


def _reader_of(file: InputFile) -> Callable[[IO[bytes], InputFile, SourceSettings, Found], Iterator[InputRow]]:
    if file.suffix in DELIMITED_SUFFIXES:
        return read_delimited
    return {ARROW: read_arrow, TFRECORD: read_tfrecords}.get(file.suffix, read_json)


def _open_tars(listing: Listing, recognized: Recognized, settings: SourceSettings, scratch: str) -> InputRows:
    tars, sidecar_of = recognized.files, listing.beside(recognized.files, PARQUET)
    files = _with_sidecars(tars, sidecar_of)
    identity = _identity("img2dataset", ((f.name, f.size, f.version) for f in files), settings)
    rows = _indexed(listing, scratch, identity, lambda found: rows_of_tars(tars, sidecar_of, settings, found), settings)
    first = [r for r in itertools.chain(*rows._parts(0, min(rows.rows, FIRST_ROWS))) if not r.problem]
    if first and not any(row.image for row in first):
        raise SourceError(f"input {listing.path}: no images in the tars' first samples; give the URL table instead")
    assert rows.found is not None
    rows.found.words = counted(len(tars), "tar")
    for note in recognized.notes:
        rows.found.note(note)
    return rows


def _open_folder(listing: Listing, recognized: Recognized, settings: SourceSettings, scratch: str) -> InputRows:
    found = image_files(listing.root)
    images = shown(((os.fsdecode(i.name), i.size, i.version, i.text_version) for i in found), "images found")
    first = next(images, None)
    if first is None:
        holds_videos = next(video_files(listing.root), None) is not None
        advice = "for frames of its videos, set source.kind=video" if holds_videos else "check the path"
        raise SourceError(f"input {listing.path}: no images in this folder ({', '.join(IMAGE_ENDINGS)}); {advice}")
    identity = _identity("folder", itertools.chain([first], images), settings)
    rows = _indexed(listing, scratch, identity, lambda found: rows_of_folder(listing.root, settings), settings)
    assert rows.found is not None
    rows.found.words = "a folder of images, with the texts of the same names"
    return rows


def _open_videos(listing: Listing, recognized: Recognized, settings: SourceSettings, scratch: str) -> InputRows:
    videos = shown(((f.name, f.size, f.version) for f in video_files(listing.root)), "videos found")
    first = next(videos, None)
    if first is None:
        suffixes = ", ".join(VIDEO_SUFFIXES)
        raise SourceError(f"input {listing.path}: no videos in this folder ({suffixes}); check the path")
    identity = _identity("video", itertools.chain([first], videos), settings)
    rows = _indexed(listing, scratch, identity, lambda found: rows_of_videos(listing.root, settings), settings)
    assert rows.found is not None
    rows.found.words = f"frames of videos, every {settings.frame_spacing_s:g} s"
    return rows


def _check_images(rows: InputRows) -> None:
    """Refuses a table of paths none of which leads to a file: it is the folder that is wrong, not each row."""
    placed = list(_files(rows, FIRST_ROWS))
    problem = ""
    for place in placed:  # one by one: most often the first is there
        (sample,) = samples_of([InputRow(RowFacts(), place)], 0, rows.root)
        if sample.image is not None or sample.verdict is None:
            return
        problem = problem or sample.verdict.detail
    if placed:
        elsewhere = is_in_bucket(os.fsdecode(placed[0].file))
        advice = "check the bucket, and whether these credentials may read it"
        raise SourceError(
            f"input {rows.settings.path}: none of its first {len(placed)} images can be read ({problem}); "
            f"{advice if elsewhere else 'paths are relative to the table: put it where they begin'}"
        )


def _indexed(
    listing: Listing,
    scratch: str,
    identity: str,
    rows: Callable[[Found], Iterable[InputRow]],
    settings: SourceSettings,
) -> InputRows:
    index = build_index(scratch, identity[:24], rows)
    # The index has names of its own: the recipe's column names do not apply to it.
    own = SourceSettings(path=settings.path, strict=settings.strict)
    fingerprint = _fingerprint(identity, index.rows)
    return InputRows(index.rows, fingerprint, (Table(index.url, index.rows),), own, listing.root, True, index.found)


def _identity(kind: str, files: Iterable[tuple[object, ...]], settings: SourceSettings) -> str:
    of_others = set(_OF_KIND) - {name for name, of in _OF_KIND.items() if of == kind}
    read_as = settings.model_dump(mode="json", exclude={"kind", "path", "strict"} | of_others)
    digest = hashlib.sha256(json.dumps([INDEX_VERSION, kind, read_as]).encode())
    for file in files:
        digest.update(json.dumps(file).encode())
    return digest.hexdigest()


def _fingerprint(identity: str, rows: int) -> str:
    return hashlib.sha256(f"{identity} {rows}".encode()).hexdigest()
