"""Pictures of a user's: references and masks."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from datapipe.decoding import open_image
from datapipe.image_file import ImageRefusedError
from subject_diffusion.errors import RunError


def open_picture(path: Path) -> Image.Image:
    """The picture, upright: RGB, or RGBA where some of it is transparent. Raises RunError."""
    try:
        return open_image(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: not a picture that can be read ({error.strerror})") from None
    except ImageRefusedError as refused:
        raise RunError(f"{path}: not a picture that can be read ({refused.detail})") from None
