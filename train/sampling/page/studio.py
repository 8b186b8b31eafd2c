"""What the page does, without the page: uploads checked, subjects cut out, pictures drawn into its own folder."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from datapipe.image_file import upright_size
from datapipe.recipe import Recipe
from datapipe.schema import RLE
from subject_diffusion.errors import RunError
from train.evaluation.pictures import open_picture
from train.sampling.checking import check_files, check_request, own_mask
from train.sampling.cutting import Cutter, Mask
from train.sampling.draw import Draftsman, Task
from train.sampling.drawing import write_picture
from train.sampling.request import AskedSubject, Reference, Request
from train.sampling.trained import find_model

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 40_000_000
"""The bytes and pixels that an upload may have."""
KEPT_S = 3600
"""How long uploads and drawings are kept."""
CUT_PX = 1024
"""The longer side of what the segmenter sees: SAM itself brings every picture to that."""
_SHOWN_PX = 520
"""Twice the height at which the page shows a cutout."""
_TINT = np.array([37, 99, 235])

Cut = tuple[str, Mask]
"""A reference's file, and where in it the subject is."""


def smaller(picture: Image.Image) -> Image.Image:
    """The picture, where it is larger than the segmenter looks at in proportion smaller."""
    bounded = picture.copy()
    bounded.thumbnail((CUT_PX, CUT_PX))
    return bounded


def enlarged(mask: Mask, size: tuple[int, int]) -> Mask:
    """The mask for a picture of (width, height)."""
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


class Studio:
    """A loaded model, a recipe's segmenter, and a folder for what is drawn."""

    def __init__(self, model: Path, labels: Recipe, scratch: Path) -> None:
        """model: a folder for `find_model`; scratch: one to draw into. Raises SddError."""
        self.folder = scratch
        self.model, self.about = find_model(model), f"Model: {model}."
        self._draftsman = Draftsman(self.model, str(model), self.model.digest())
        self._cutter = Cutter(labels)

    def uploaded(self, path: str) -> Cut | None:
        """A picture that has just come: cut out where it is transparent elsewhere, else None until it is clicked.
        Raises RunError."""
        mask = own_mask(self._open(path))
        return None if mask is None else (path, mask)

    def clicked(self, path: str, tag: str, x_px: float, y_px: float) -> Cut:
        """The subject under a click. Raises RunError."""
        picture = self._open(path)
        at = (x_px / picture.width, y_px / picture.height)
        mask = self._cutter(smaller(picture), tag.strip(), at)
        if mask is None:
            raise RunError("nothing was found there: click the middle of the subject, or say first what it is called")
        return path, enlarged(mask, picture.size)

    def _open(self, path: str) -> Image.Image:
        file = Path(path)
        size = upright_size(file)
        if file.stat().st_size > MAX_BYTES or (size is not None and size[0] * size[1] > MAX_PIXELS):
            raise RunError(f"a picture of at most {MAX_BYTES >> 20} MB and {MAX_PIXELS // 10**6} megapixels, please")
        try:
            return open_picture(file)
        except RunError:
            raise RunError("this file is not a picture that can be read") from None

    def draw(
        self,
        prompt: str,
        cast: Sequence[tuple[str, Cut, tuple[float, float, float, float]]],
        settings: dict[str, float],
        seeds: Sequence[int],
        on_step: Callable[[int], None],
    ) -> list[tuple[str, str]]:
        """The pictures' files, and how each was made in a few words. cast: tag, cutout and box of each subject;
        on_step: called with the number of the picture. Raises SddError."""
        asked = [
            AskedSubject(tag=tag.strip(), references=(Reference(image=path),), box=box) for tag, (path, _), box in cast
        ]
        masks = {id(a.references[0]): RLE.of(mask) for a, (_, (_, mask), _) in zip(asked, cast, strict=True)}
        request = Request(prompt=prompt.strip(), subjects=tuple(asked), settings=settings)
        check_files(request, "")
        check_request(request, self.model, (), "")
        self._forget()
        found = []
        for number, seed in enumerate(seeds):
            # Who knows a name is served the file.
            path = self.folder / f"{secrets.token_hex(16)}-seed-{seed}.png"
            drawing = self._draftsman.drawing(Task(request, seed, path, ""), (), lambda _, r: masks[id(r)])
            write_picture(path, self._draftsman.draw(drawing, lambda number=number: on_step(number)), drawing)  # type: ignore[misc]  # a default is a lambda's only way to hold a value
            found.append((str(path), _made(seed, settings)))
        return found

    def _forget(self) -> None:
        """Old drawings. The page shows copies, which gradio deletes."""
        for path in self.folder.glob("*-seed-*.png"):
            if time.time() - path.stat().st_mtime > KEPT_S:
                path.unlink()


def _made(seed: int, settings: dict[str, Any]) -> str:
    return f"seed {seed}, text {settings['guidance_scale']:g}, identity {settings['subject_guidance_scale']:g}"


def tinted(cut: Cut) -> Image.Image:
    """The reference with its subject as it is, and the rest paled, under a line of color around the subject; its longer
    side at most `_SHOWN_PX`."""
    path, full = cut
    picture = open_picture(Path(path)).convert("RGB")
    picture.thumbnail((_SHOWN_PX, _SHOWN_PX))
    mask = np.asarray(Image.fromarray(full).resize(picture.size))
    pixels = np.asarray(picture).astype(np.float32)
    pale = 0.25 * pixels + 0.75 * 255
    shown = np.where(mask[..., None], pixels, pale)
    width = max(1, round(max(mask.shape) / 150))
    grown = Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(2 * width + 1))
    shown[(np.asarray(grown) > 0) & ~mask] = _TINT
    return Image.fromarray(shown.astype(np.uint8))
