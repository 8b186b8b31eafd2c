"""Hugging Face datasets, on the hub or on disk, by way of the library `datasets`: streamed, and executing nothing of
theirs. Their rows are copied into one parquet file, from which slices are read as from any other."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from datapipe.sources.input_files import explained, input_file_of, input_file_system
from datapipe.sources.listing import is_hidden
from datapipe.sources.parquet_tables import columns_of_schema
from datapipe.sources.path_table import path_table
from datapipe.sources.scanning import shown
from datapipe.sources.settings import SourceSettings
from datapipe.sources.store_listing import files_below
from subject_diffusion._extras import help_for
from subject_diffusion.errors import SourceError, one_line

if TYPE_CHECKING:
    from datasets import IterableDataset

_HUB = "hf://datasets/"
_ID = re.compile(rf"(?:{_HUB})?([\w.-]+/[\w.-]+)")
_ROWS_AT_ONCE = 16
_ROWS_FOR_TYPES = 1000
"""First rows by which the types of columns are known, where the dataset does not say them."""
_GROUP_BYTES = 16 << 20
"""Bytes of a row group: what is held, beside what `datasets` holds, a row group of the files that it reads."""
_SAVED = ("state.json", "dataset_dict.json")
"""By one of these, a folder is what `save_to_disk` leaves."""


def pinned(settings: SourceSettings) -> SourceSettings:
    """The same for a folder; for a dataset of the hub, with the commit that its revision stands for now. Raises
    SourceError."""
    if (hub := _hub_id(settings)) is None:
        return settings
    with _explained(settings):
        from huggingface_hub import HfApi

        commit = HfApi().dataset_info(hub, revision=settings.revision).sha
    return settings.model_copy(update={"revision": commit})


def dataset_identity(settings: SourceSettings) -> Iterator[tuple[object, ...]]:
    """What tells this version of a `pinned` dataset from others: its commit on the hub, or every file with its size and
    version. Raises SourceError."""
    with _explained(settings):
        if (hub := _hub_id(settings)) is not None:
            yield hub, settings.revision
            return
        fs, root = input_file_system(settings.path)
        with path_table() as table:
            table.add(info["name"] for info in shown(files_below(fs, root, is_hidden), "files looked through"))
            for path in table:
                file = input_file_of(fs, root, fs.info(path))
                if file is not None:
                    yield file.name, file.size, file.version


def write_rows(file: IO[bytes], settings: SourceSettings, most: int | None = None) -> None:
    """Copies, of a `pinned` dataset, the columns that play a part into a parquet file, the images with their bytes. An
    image that is a file elsewhere than in the dataset itself is left empty; other columns may name such files, which
    must not be read. `most`: of so many first rows; default: all. Raises SourceError."""
    with _explained(settings):
        data, may_read = _opened(settings)
        data, images = _undecoded(data, settings.path)
        data = data if most is None else data.take(most)
        columns, _ = columns_of_schema(data.features.arrow_schema, settings, settings.path)
        every = data.features.arrow_schema
        names = list(dict.fromkeys(n if n in every.names else n.partition(".")[0] for n in columns.names))
        schema = pa.schema([every.field(name) for name in names])
        batches = data.select_columns(names).with_format("arrow").iter(_ROWS_AT_ONCE)
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            waiting: list[pa.Table] = []
            for batch in shown(batches, f"batches of {_ROWS_AT_ONCE} rows read"):
                for name in images & set(names):
                    at = batch.schema.get_field_index(name)
                    batch = batch.set_column(at, schema.field(name), _with_bytes(batch.column(at), may_read))
                waiting.append(batch.cast(schema))
                if sum(table.nbytes for table in waiting) >= _GROUP_BYTES:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting = []
            if waiting:
                writer.write_table(pa.concat_tables(waiting))


def _hub_id(settings: SourceSettings) -> str | None:
    """The name on the hub; None for a folder. Raises SourceError for what is neither."""
    if os.path.isdir(settings.path):
        return None
    found = _ID.fullmatch(settings.path)
    if found is None:
        raise SourceError(
            f"input {settings.path}: no folder, nor a name on the Hugging Face hub such as org/name; check source.path"
        )
    return found[1]


def _opened(settings: SourceSettings) -> tuple[IterableDataset, re.Pattern[str]]:
    """The rows of the split, and which files its images may be."""
    from datasets import DatasetDict, load_from_disk

    hub = _hub_id(settings)
    if hub is not None:
        stream = _streamed(hub, settings, revision=settings.revision)
        return stream, _files_below(f"{_HUB}{hub}@{settings.revision}")
    folder = os.path.realpath(settings.path)
    inside = _files_below(folder)
    if not any(os.path.isfile(f"{folder}/{name}") for name in _SAVED):
        return _streamed(folder, settings), inside
    try:
        saved = load_from_disk(folder)
    except IndexError:  # of the first of its files: none is written where there are no rows
        raise _without_rows(settings.path) from None
    if isinstance(saved, DatasetDict):
        if settings.split not in saved:
            splits = ", ".join(saved)
            raise SourceError(f"input {settings.path}: no split {settings.split}, but {splits}; set source.split")
        saved = saved[settings.split]
    return saved.to_iterable_dataset(), inside


def _files_below(place: str) -> re.Pattern[str]:
    """The paths of files there, and of members of archives there."""
    return re.compile(rf"(?:(?:zip|tar)://[^:]*::)?{re.escape(place)}/.*")


def _streamed(path: str, settings: SourceSettings, **options: Any) -> IterableDataset:
    from datasets import load_dataset_builder

    builder = load_dataset_builder(path, settings.subset, **options)
    if hasattr(builder.config, "decode_num_threads"):
        builder.config.decode_num_threads = (
            0  # else a folder's images come decoded from the hub, and would be encoded anew
        )
    if hasattr(builder.config, "batch_size"):
        builder.config.batch_size = _ROWS_AT_ONCE  # else all of a parquet's first row group, which may have no rows
    return builder.as_streaming_dataset(split=settings.split)


def _without_rows(path: str) -> SourceError:
    return SourceError(f"input {path}: holds no rows; check source.path, source.subset and source.split")


def _undecoded(data: IterableDataset, path: str) -> tuple[IterableDataset, set[str]]:
    """The rows with their images as {bytes, path}, and which columns these are."""
    from datasets import Features, Image

    if data.features is None:  # as those of a CSV file: the first rows tell them
        first = next(iter(data.with_format("arrow").iter(_ROWS_FOR_TYPES)), None)
        if first is None:
            raise _without_rows(path)
        data = data.cast(Features.from_arrow_schema(first.schema))
    images = {name for name, feature in data.features.items() if isinstance(feature, Image)}
    for name in images:
        data = data.cast_column(name, Image(decode=False))
    return data, images


def _with_bytes(images: pa.ChunkedArray, may_read: re.Pattern[str]) -> pa.Array:
    """`datasets`' images, {bytes, path}, with the bytes of those that are files of the dataset, and no paths."""
    from datasets.utils.file_utils import xopen

    def content(image: dict[str, Any] | None) -> bytes | None:
        if image is None or image["path"] is None or image["bytes"] is not None:
            return None if image is None else image["bytes"]
        path = image["path"] if "://" in image["path"] else os.path.realpath(image["path"])
        if not may_read.fullmatch(path) or ".." in path.split("/"):
            return None
        with xopen(path, "rb") as file:
            return bytes(file.read())

    found = pa.array([content(image) for image in images.to_pylist()], pa.binary())
    return pa.StructArray.from_arrays([found, pa.nulls(len(found), pa.string())], ["bytes", "path"])


@contextmanager
def _explained(settings: SourceSettings) -> Iterator[None]:
    """What `datasets` and the hub's client raise becomes a SourceError of one line."""
    try:
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise SourceError(help_for(error) or one_line(error)) from None
    with explained(settings.path):
        try:
            yield
        except (DatasetsError, FileNotFoundError, NotImplementedError, RuntimeError, ValueError) as error:
            raise SourceError(
                f"input {settings.path}: {one_line(error)}; check source.path, source.subset and source.split"
            ) from None
