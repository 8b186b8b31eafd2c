"""What a recipe can say about its input. What img2dataset calls otherwise is found by that name, too."""

from typing import Annotated, Literal

from pydantic import Field

from datapipe.sources.tar_keys import KeyRule
from subject_diffusion.settings import ADDED_LATER, EXECUTION_ONLY, AlsoCalled, Settings

Kind = Literal["auto", "table", "img2dataset", "folder", "video", "hf"]


class SourceSettings(Settings):
    """Where rows come from, and which columns play which part."""

    kind: Kind = "auto"
    """table: rows in parquet, arrow, csv, tsv, txt, json or jsonl; img2dataset: WebDataset tars; folder: image files;
    video: frames of video files; hf: a Hugging Face dataset, on the hub or as a folder, by way of the library
    `datasets`; auto: by what the path holds, but for the last two."""
    path: Annotated[str, AlsoCalled("url_list")] = ""
    """A file, a folder or a glob; local, s3:// or gs://; for kind hf, a folder or a name such as org/name. The command
    line's INPUT goes here."""
    subset: Annotated[str | None, ADDED_LATER] = None
    """Which configuration of a Hugging Face dataset; default: its own. Only for kind hf, as the next two."""
    split: Annotated[str, ADDED_LATER] = "train"
    """Which part of it."""
    revision: Annotated[str | None, ADDED_LATER] = None
    """Which branch, tag or commit of it on the hub; default: main."""
    url_column: Annotated[str | None, AlsoCalled("url_col")] = None
    """Column (or JSON key) of the image's URL; default: recognized by name, as in LAION, DataComp and COYO. A dot leads
    into a struct: photo.url."""
    image_column: str | None = None
    """Column of the image itself, as bytes or {bytes, path}, or of the path of its file, relative to the table;
    default: recognized by name and type."""
    alt_text_column: Annotated[str | None, AlsoCalled("caption_col")] = None
    """Column of the text that came with the image; default: recognized by name."""
    licence_column: str | None = None
    """Column of the license; default: recognized by name."""
    alt_text_choice: int | str | None = None
    """Which text to take where a row has several: a position in the list, from 0, or a key such as `en`; default, and
    where a row lacks it: the first."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a csv, tsv or txt without a header, in order; default: the first row names them, unless
    it holds a URL."""
    encoding: str | None = None
    """Encoding of csv, tsv, txt and json files, by Python's name: latin-1, cp1251, gb18030; default: UTF-8, or what a
    byte order mark says."""
    quoting: Literal["auto", "none"] = "auto"
    """Quotation in csv, tsv and txt files. auto: a cell in quotation marks may hold delimiters and line breaks, and a
    mark that is never closed is part of the text, as is one that is closed on a line that is a row by itself, in a file
    that does not quote; none: quotation marks are text like any other."""
    key_rule: KeyRule = "auto"
    """Where the key of a tar's member ends. first_dot: at the first dot of its file name, as in WebDataset; last_dot:
    at the last one; auto: the first, unless images of different samples would share a key in that tar."""
    frame_spacing_s: Annotated[float, ADDED_LATER, Field(gt=0)] = 1.0
    """Seconds between the frames that are taken of a video; only for kind video."""
    strict: Annotated[bool, EXECUTION_ONLY] = False
    """Refuse an input of which anything cannot be read. Default: such rows and files are named, and recorded as
    failed."""
