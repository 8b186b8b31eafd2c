"""What chat models are asked, and how large an image they are shown."""

from __future__ import annotations

import math

from PIL import Image

CHAT_PROMPT = "Describe the image in one sentence."
"""What a chat model is asked when the recipe has no prompt."""

DESCRIBE_PROMPT = "Describe the object in the image in one sentence: its kind, colors, material and shape."
"""The same, about a subject that is cut out."""


def bounded(image: Image.Image, min_pixels: int, max_pixels: int) -> Image.Image:
    """The image, enlarged or shrunk in proportion so that width × height lies within the bounds."""
    pixels = image.width * image.height
    if min_pixels <= pixels <= max_pixels:
        return image
    scale = math.sqrt((max_pixels if pixels > max_pixels else min_pixels) / pixels)
    whole = math.floor if pixels > max_pixels else math.ceil
    width, height = (max(1, whole(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
