"""How a picture was made, as its PNG carries it: all that is needed to draw it again. Of the model and the references
themselves, there are paths and hashes."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Literal

from PIL import Image, PngImagePlugin
from pydantic import Field, ValidationError, field_validator

from datapipe.schema import RLE
from subject_diffusion.errors import RunError
from subject_diffusion.settings import Settings
from subject_diffusion.storage import whole_file
from train.sampling.request import Box
from train.sampling.settings import MAX_SEED, Axis, SamplingSettings

KEY = "subject-diffusion"
"""The key of the PNG's text."""


class DrawnReference(Settings):
    """A picture of a subject, and where in it the subject is."""

    path: str
    sha256: str
    mask_size: tuple[int, int]
    """(height, width), pixels of the upright picture."""
    mask: str
    """COCO's compressed run lengths."""

    def rle(self) -> RLE:
        return RLE(self.mask_size, self.mask)

    @field_validator("mask")
    @classmethod
    def _ascii(cls, mask: str) -> str:
        if not mask.isascii():
            raise ValueError("no run lengths")
        return mask


class DrawnSubject(Settings):
    tag: str
    box: Box | None
    references: tuple[DrawnReference, ...]


class Drawing(Settings):
    """One picture; or, with axes, a sheet of them."""

    format: Literal[1] = 1
    version: str
    """This project's version."""
    torch: str
    device: str
    threads: int = Field(ge=1)
    model: str
    """Folder of a run or a pipeline."""
    model_sha256: str
    prompt: str
    subjects: tuple[DrawnSubject, ...]
    seed: int = Field(ge=0, le=MAX_SEED)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    settings: SamplingSettings
    axes: tuple[Axis, ...] = Field((), max_length=2)
    """What varies over the sheet's columns, and over its rows."""
    asked: str = ""
    """Hash of the request, by which a picture that is already there is known."""


def file_digest(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_picture(path: Path, picture: Image.Image, drawing: Drawing) -> None:
    """A PNG, whole or not at all."""
    sink, said = io.BytesIO(), PngImagePlugin.PngInfo()
    said.add_text(KEY, drawing.model_dump_json(ensure_ascii=True))
    picture.save(sink, "PNG", pnginfo=said)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(sink.getvalue())


def read_drawing(path: Path) -> Drawing:
    """How a picture of `write_picture` was made. Raises RunError."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()  # text may come after the pixels
            said = picture.info.get(KEY)
    except OSError as error:
        raise RunError(
            f"{path}: not a PNG that can be read ({error.strerror or 'damaged, or of another kind'})"
        ) from None
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RunError(f"{path}: not a PNG that can be read ({error})") from None
    if not isinstance(said, str):
        raise RunError(f"{path}: it does not say how it was made; only PNGs of `sdd sample` do, unless edited since")
    try:
        drawing = Drawing.model_validate_json(said)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise RunError(f"{path}: what it says of how it was made is damaged ({key}: {first['msg']})") from None
    for reference in (r for subject in drawing.subjects for r in subject.references):
        if not reference.rle().is_whole():
            raise RunError(f"{path}: what it says of how it was made is damaged (the mask of {reference.path})")
    return drawing


def already_drawn(path: Path, asked: str) -> bool:
    """Whether the picture of this request is there."""
    try:
        return path.exists() and read_drawing(path).asked == asked
    except RunError:
        return False
