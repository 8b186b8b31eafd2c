"""What an input path holds: tables, tars, img2dataset's output, or images."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from datapipe.sources.compression import COMPRESSED_SUFFIXES
from datapipe.sources.input_files import (
    LIST_SUFFIX,
    TABLE_SUFFIXES,
    TAR_SUFFIX,
    InputFile,
    Listing,
    input_file_system,
)
from datapipe.sources.settings import Kind
from datapipe.sources.tar_keys import IMAGE_ENDINGS
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
    """`files`: those to read. `shards`: where img2dataset saved the images of a table as files: their folder, relative
    to the root, and their ending, by the table's name. `names_images`: the files are metadata of an image folder."""

    kind: Kind
    files: tuple[InputFile, ...] = ()
    shards: dict[str, tuple[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    names_images: bool = False


def recognize_kind(listing: Listing, wanted: Kind) -> Recognized:
    """Raises SourceError in one line where nothing, or more than one thing, is to be had."""
    tars = tuple(file for file in listing.files if file.suffix == TAR_SUFFIX)
    if wanted == "img2dataset" or (wanted == "auto" and tars):
        if not tars:
            raise SourceError(f"input {listing.path}: no .tar in it; name the folder that img2dataset wrote")
        return Recognized("img2dataset", tars, notes=_beside_tars(listing, tars))
    tables = _tables(listing)
    if wanted == "folder" or (wanted == "auto" and not tables):
        return _folder(listing, wanted)
    if not tables:
        raise SourceError(f"input {listing.path}: no table in it ({', '.join(TABLE_SUFFIXES)}); check the path")
    if listing.is_folder and (shards := _img2dataset_shards(listing, tables)):
        return Recognized("table", tuple(file for file in tables if file.name in shards), shards)
    metadata = tuple(file for file in tables if METADATA.fullmatch(posixpath.basename(file.name)))
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


def _beside_tars(listing: Listing, tars: Sequence[InputFile]) -> tuple[str, ...]:
    """What is left out but for the parquet and the json that img2dataset puts beside every tar."""
    own = {file.name.partition(TAR_SUFFIX)[0] for file in tars}
    tables = [f for f in _tables(listing) if f.name.removesuffix(PARQUET).removesuffix(".json") not in own]
    left_out = [counted(n, what) for n, what in ((len(tables), "table"), (listing.images, "image")) if n]
    return (f"{' and '.join(left_out)} beside the tars left out",) if left_out and listing.is_folder else ()


def counted(count: int, what: str) -> str:
    """ "1 row", "2 rows"."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def _folder(listing: Listing, wanted: Kind) -> Recognized:
    if listing.is_folder:
        return Recognized("folder")
    if wanted == "folder":
        raise SourceError(f"input {listing.path}: source.kind is folder, and this is none; name a folder")
    if listing.images:
        raise SourceError(f"input {listing.path}: images; name the folder that holds them")
    raise SourceError(
        f"input {listing.path}: neither a table ({', '.join((*TABLE_SUFFIXES, LIST_SUFFIX))}) nor a .tar nor a folder "
        "of images; save it as one of these"
    )


def _tables(listing: Listing) -> tuple[InputFile, ...]:
    """Without what `datasets` and img2dataset say about their own tables."""
    names = {file.name for file in listing.files}

    def says_of_others(file: InputFile) -> bool:
        statistics = _STATISTICS.fullmatch(file.name)
        of_img2dataset = statistics is not None and f"{statistics.group(1)}.parquet" in names
        return listing.is_folder and (of_img2dataset or posixpath.basename(file.name) in NO_TABLES)

    tables = tuple(f for f in listing.files if f.suffix != TAR_SUFFIX and not says_of_others(f))
    records = tuple(f for f in tables if f.suffix == TFRECORD)
    if records and listing.is_folder:
        return records  # beside each, img2dataset puts a parquet of its own
    arrow = tuple(f for f in tables if f.suffix == ARROW)
    return arrow if arrow and listing.is_folder and all(f.suffix in (ARROW, *JSON_SUFFIXES) for f in tables) else tables


def _of_one_format(listing: Listing, files: Sequence[InputFile]) -> tuple[InputFile, ...]:
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
    return tuple(files)


def format_of(file: InputFile) -> str:
    """One of parquet, arrow, tfrecord, json, csv, tsv, txt."""
    return "json" if file.suffix in JSON_SUFFIXES else file.suffix[1:]


def _img2dataset_shards(listing: Listing, tables: Sequence[InputFile]) -> dict[str, tuple[str, str]]:
    """Tables such as 00000.parquet that have a folder of images 00000 beside them: img2dataset's format "files"."""
    fs, root = input_file_system(listing.root)
    shards: dict[str, tuple[str, str]] = {}
    for file in tables:
        folder = file.name.removesuffix(PARQUET)
        if file.suffix != PARQUET or not posixpath.basename(folder).isdigit():
            continue
        path = f"{root.rstrip('/')}/{folder}"
        if not fs.isdir(path):
            continue
        endings = (name.rpartition(".")[2].lower() for name in fs.ls(path, detail=False))
        ending = next((e for e in endings if e in IMAGE_ENDINGS), None)
        if ending is not None:
            shards[file.name] = (folder, ending)
    return shards
