"""What chat models are asked, and how large an image they are shown."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from PIL import Image

from datapipe.schema import Tag, clean_text

CHAT_PROMPT = "Describe the image in one sentence."
"""What a chat model is asked when the recipe has no prompt."""

DESCRIBE_PROMPT = "Describe the object in the image in one sentence: its kind, colors, material and shape."
"""The same, about a subject that is cut out."""

OBJECTS_PROMPT = (
    'Answer with JSON alone: {"caption": "...", "objects": ["...", "..."]}. The objects are the things in the caption '
    "that can be seen, each in the caption's own words, such as red mug or traffic light, without articles."
)
"""What follows the prompt where the objects are asked for, too."""

MOST_CHARACTERS = 20_000
"""The longest such answer that is looked into: a caption and its objects have a few hundred."""

OBJECTS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"caption": {"type": "string"}, "objects": {"type": "array", "items": {"type": "string"}}},
    "required": ["caption", "objects"],
    "additionalProperties": False,
}
"""The JSON schema of such an answer, for servers that make a model keep to one."""


def caption_and_objects(answer: str) -> tuple[str, tuple[Tag, ...]]:
    """The caption of an answer to `OBJECTS_PROMPT`, in one line, and its objects where the caption has them, in order,
    none within another. What the caption does not say is left out, for it has no span. Raises ValueError for an answer
    of another form."""
    # Some models put a fence around their JSON, or a word before it.
    start, end = answer.find("{"), answer.rfind("}")
    if len(answer) > MOST_CHARACTERS:
        raise ValueError(f"{len(answer):,} characters")
    try:
        tree = json.loads(answer[start : end + 1])
    except RecursionError:
        raise ValueError("nested too deeply") from None
    caption, objects = (tree.get(name) for name in ("caption", "objects")) if isinstance(tree, dict) else (None, None)
    if not isinstance(caption, str) or not isinstance(objects, list) or not all(isinstance(o, str) for o in objects):
        raise ValueError('no {"caption": "...", "objects": ["..."]}')
    caption = clean_text(" ".join(caption.split()))
    spans: list[tuple[int, int]] = []
    for name in sorted({" ".join(o.split()) for o in objects} - {""}, key=lambda name: (-len(name), name)):
        for found in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", caption, re.IGNORECASE):
            if all(found.end() <= start or end <= found.start() for start, end in spans):
                spans.append(found.span())
    return caption, tuple(Tag(caption[start:end].lower(), (start, end)) for start, end in sorted(spans))


def bounded(image: Image.Image, min_pixels: int, max_pixels: int) -> Image.Image:
    """The image, enlarged or shrunk in proportion so that width × height lies within the bounds."""
    pixels = image.width * image.height
    if min_pixels <= pixels <= max_pixels:
        return image
    scale = math.sqrt((max_pixels if pixels > max_pixels else min_pixels) / pixels)
    whole = math.floor if pixels > max_pixels else math.ceil
    width, height = (max(1, whole(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
