"""What an input path holds: tables, tars, img2dataset's output, or images."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass

from datapipe.sources.compression import COMPRESSED_SUFFIXES
from datapipe.sources.input_files import LIST_SUFFIX, TABLE_SUFFIXES, TAR_SUFFIX, InputFile
from datapipe.sources.listing import InputFiles, Listing
from datapipe.sources.settings import Kind
from subject_diffusion.errors import SourceError

FEW_IMAGES = 3
"""So many images beside tables, at most, are a logo and the like. More of them may be the input."""

PARQUET, ARROW, TFRECORD = ".parquet", ".arrow", ".tfrecord"
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
DELIMITED_SUFFIXES = (".csv", ".tsv", LIST_SUFFIX)

METADATA = re.compile(r"metadata\.(csv|tsv|jsonl|json|parquet)(\.\w+)?")
"""Tables of the texts of an image folder, as Hugging Face `datasets` names them."""
NO_TABLES = ("dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json", "package.json")
"""What `datasets` keeps beside its tables."""
_ENDING = re.compile(rf".*?(\.[^./]+({'|'.join(map(re.escape, COMPRESSED_SUFFIXES))})?)", re.IGNORECASE | re.DOTALL)
"""The end of a name as a glob needs it: `.jsonl.gz`, `.CSV`."""
_STATISTICS = re.compile(r"(.*?/?\d+)_stats\.json")


@dataclass(frozen=True)
class Recognized:
    """`files`: those to read. `shard_of`: where img2dataset saved the images of a table as files: their folder,
    relative to the root, and their ending; None where it did not. `names_images`: the files are metadata of an image
    folder."""

    kind: Kind
    files: InputFiles
    shard_of: Callable[[InputFile], tuple[str, str] | None] | None = None
    notes: tuple[str, ...] = ()
    names_images: bool = False


def recognize_kind(listing: Listing, wanted: Kind) -> Recognized:
    """Raises SourceError in one line where nothing, or more than one thing, is to be had."""
    if wanted == "video":
        if not listing.is_folder:
            raise SourceError(f"input {listing.path}: source.kind is video, and this is no folder; name one of videos")
        return Recognized("video", listing.files)
    tars = listing.files.only(lambda file: file.suffix == TAR_SUFFIX)
    if wanted == "img2dataset" or (wanted == "auto" and tars):
        if not tars:
            raise SourceError(f"input {listing.path}: no .tar in it; name the folder that img2dataset wrote")
        return Recognized("img2dataset", tars, notes=_beside_tars(listing))
    tables = _tables(listing)
    if wanted == "folder" or (wanted == "auto" and not tables):
        return _folder(listing, wanted)
    if not tables:
        raise SourceError(f"input {listing.path}: no table in it ({', '.join(TABLE_SUFFIXES)}); check the path")
    shards = tables.only(lambda file: _img2dataset_shard(listing, file) is not None)
    if listing.is_folder and shards:
        return Recognized("table", shards, lambda file: _img2dataset_shard(listing, file))
    metadata = tables.only(lambda file: METADATA.fullmatch(posixpath.basename(file.name)) is not None)
    if listing.is_folder and listing.images and metadata:
        return Recognized("table", _of_one_format(listing, metadata), names_images=True)
    if wanted == "auto" and listing.is_folder and listing.images > FEW_IMAGES:
        raise SourceError(
            f"input {listing.path}: holds tables and images ({counted(len(tables), 'table')}, "
            f"{counted(listing.images, 'image')}); set source.kind to table or folder"
        )
    images = listing.images if listing.is_folder else 0
    notes = (f"{counted(images, 'image')} beside the tables left out",) if images else ()
    return Recognized("table", _of_one_format(listing, tables), notes=notes)


def _beside_tars(listing: Listing) -> tuple[str, ...]:
    """What is left out but for the parquet and the json that img2dataset puts beside every tar."""

    def is_of_a_tar(table: InputFile) -> bool:
        stem = table.name.removesuffix(PARQUET).removesuffix(".json")
        tars = (listing.named(f"{stem}{TAR_SUFFIX}{packed}") for packed in ("", *COMPRESSED_SUFFIXES))
        return any(tar is not None for tar in tars)

    tables = len(_tables(listing).only(lambda table: not is_of_a_tar(table))) if listing.is_folder else 0
    left_out = [counted(n, what) for n, what in ((tables, "table"), (listing.images, "image")) if n]
    return (f"{' and '.join(left_out)} beside the tars left out",) if left_out and listing.is_folder else ()


def counted(count: int, what: str) -> str:
    """ "1 row", "2 rows"."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def _folder(listing: Listing, wanted: Kind) -> Recognized:
    if listing.is_folder:
        return Recognized("folder", listing.files)
    if wanted == "folder":
        raise SourceError(f"input {listing.path}: source.kind is folder, and this is none; name a folder")
    if listing.images:
        raise SourceError(f"input {listing.path}: images; name the folder that holds them")
    raise SourceError(
        f"input {listing.path}: neither a table ({', '.join((*TABLE_SUFFIXES, LIST_SUFFIX))}) nor a .tar nor a folder "
        "of images; save it as one of these"
    )


def _tables(listing: Listing) -> InputFiles:
    """Without what `datasets` and img2dataset say about their own tables."""

    def says_of_others(file: InputFile) -> bool:
        statistics = _STATISTICS.fullmatch(file.name)
        of_img2dataset = statistics is not None and listing.named(f"{statistics.group(1)}{PARQUET}") is not None
        return listing.is_folder and (of_img2dataset or posixpath.basename(file.name) in NO_TABLES)

    tables = listing.files.only(lambda file: file.suffix != TAR_SUFFIX and not says_of_others(file))
    records = tables.only(lambda file: file.suffix == TFRECORD)
    if listing.is_folder and records:
        return records  # beside each, img2dataset puts a parquet of its own
    arrow = tables.only(lambda file: file.suffix == ARROW)
    others = tables.only(lambda file: file.suffix not in (ARROW, *JSON_SUFFIXES))
    return arrow if listing.is_folder and arrow and not others else tables


def _of_one_format(listing: Listing, files: InputFiles) -> InputFiles:
    formats = {format_of(file): file for file in files}
    if len(formats) > 1:
        name, example = sorted(formats.items())[0]
        suffix = _ENDING.fullmatch(example.name)[1]  # type: ignore[index]  # it ends in one of TABLE_SUFFIXES
        where = listing.path.rstrip("/") if listing.is_folder else posixpath.dirname(listing.path)
        below = "**/" if any(file.folder for file in files) else ""
        raise SourceError(
            f"input {listing.path}: holds {' and '.join(sorted(formats))}; choose by a glob such as "
            f"'{where}/{below}*{suffix}' for the {name}"
        )
    return files


def format_of(file: InputFile) -> str:
    """One of parquet, arrow, tfrecord, json, csv, tsv, txt."""
    return "json" if file.suffix in JSON_SUFFIXES else file.suffix[1:]


def _img2dataset_shard(listing: Listing, table: InputFile) -> tuple[str, str] | None:
    """The folder of images 00000 beside a table 00000.parquet, and their ending: img2dataset's format
    "files"."""
    folder = table.name.removesuffix(PARQUET)
    if table.suffix != PARQUET or not posixpath.basename(folder).isdigit():
        return None
    ending = listing.image_ending(folder)
    return None if ending is None else (folder, ending)
