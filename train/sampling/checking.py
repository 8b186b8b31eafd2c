"""Whether requests can be drawn, found out before anything is loaded that takes seconds."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.mention import mentions
from subject_diffusion.errors import RecipeError, RunError
from subject_diffusion.settings import validated
from train.evaluation.pictures import open_picture
from train.sampling.drawing import Drawing, file_digest
from train.sampling.request import Request
from train.sampling.settings import Axis, SamplingSettings
from train.sampling.trained import TrainedModel


def check_request(request: Request, model: TrainedModel, axes: Sequence[Axis], where: str) -> None:
    """where: in front of what is wrong. Raises RunError."""
    settings = resolved(request, model, where)
    check_axes(settings, axes)
    height, width = size_of(request, model)
    if height % model.factor or width % model.factor:
        raise RunError(f"{where}height={height}, width={width}: both must be multiples of {model.factor}")
    if len(request.subjects) > model.max_subjects:
        raise RunError(f"{where}{len(request.subjects)} subjects; the model takes max_subjects={model.max_subjects}")
    for subject in request.subjects:
        if not mentions(request.prompt, subject.tag):
            raise RunError(f"{where}prompt {request.prompt!r} does not contain its subject's tag {subject.tag!r}")


def check_files(request: Request, where: str) -> None:
    """Whether all pictures and masks can be read, and fit. Raises RunError."""
    for reference in request.files():
        try:
            _check_files(reference.image, reference.mask)
        except RunError as error:
            raise RunError(f"{where}{error}") from None


def check_axes(settings: SamplingSettings, axes: Sequence[Axis]) -> None:
    """Whether each setting exists and takes each value. Raises RunError."""
    if len(axes) > 2:
        raise RunError("a grid has columns and rows; give --grid, or --grid and --interpolate, twice at most")
    if len({key for key, _ in axes}) < len(axes):
        raise RunError(f"--grid {axes[0][0]}: the same setting twice; give columns one and rows another")
    for key, values in axes:
        for value in values:
            with_value(settings, key, value)


def with_value(settings: SamplingSettings, key: str, value: float) -> SamplingSettings:
    """The settings with one of them changed. Raises RunError."""
    try:
        return validated(SamplingSettings, settings.model_dump() | {key: value}, (), "--grid")
    except RecipeError as error:
        raise RunError(str(error)) from None


def resolved(request: Request, model: TrainedModel, where: str) -> SamplingSettings:
    """The model's own settings with the request's changes. Raises RunError."""
    try:
        return validated(SamplingSettings, model.defaults.model_dump() | request.settings, (), f"{where}settings")
    except RecipeError as error:
        raise RunError(str(error)) from None


def size_of(request: Request, model: TrainedModel) -> tuple[int, int]:
    """(height, width), pixels."""
    height, width = model.size
    return request.height or height, request.width or width


@functools.cache
def _check_files(image: str, mask: str | None) -> None:
    picture = open_picture(Path(image))
    if mask is not None:
        inside = open_mask(mask)
        if inside.shape != (picture.height, picture.width):
            raise RunError(
                f"{image} is {picture.width}x{picture.height} pixels, and its mask {mask} "
                f"{inside.shape[1]}x{inside.shape[0]}: they must be the same size"
            )
        if not inside.any():
            raise RunError(f"{mask}: an empty mask; it must be white where the subject is")


def open_mask(path: str) -> NDArray[np.bool_]:
    """(H, W); white is inside, gray cut at half. Raises RunError."""
    return np.asarray(open_picture(Path(path)).convert("L")) >= 128


def own_mask(picture: Image.Image) -> NDArray[np.bool_] | None:
    """Where a picture with transparency is opaque; None where all of it is, or none."""
    if not picture.has_transparency_data:
        return None
    mask = np.asarray(picture.convert("RGBA"))[..., 3] >= 128
    return mask if mask.any() else None


def check_unchanged(drawing: Drawing, model: TrainedModel, picture: Path) -> None:
    """Whether references and model are what a picture was drawn with. Raises RunError."""
    for reference in (r for subject in drawing.subjects for r in subject.references):
        if not Path(reference.path).is_file():
            raise RunError(f"{picture}: its reference {reference.path} is not there; put it back, or go to its folder")
        if file_digest(reference.path) != reference.sha256:
            raise RunError(f"{picture}: its reference {reference.path} has changed since; it needs the file as it was")
        size = open_picture(Path(reference.path)).size[::-1]
        if size != reference.mask_size:
            raise RunError(f"{picture}: its reference {reference.path} and the mask that it has for it differ in size")
    now = model.digest()
    if now != drawing.model_sha256:
        raise RunError(
            f"{picture}: the model in {drawing.model} has changed since (SHA-256 {drawing.model_sha256[:12]}, now "
            f"{now[:12]}); name the folder of the one that drew it with --run"
        )
