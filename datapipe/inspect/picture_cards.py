"""Samples as a web page shows them: a small picture as a data URI, and masks as outlines over it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
from PIL import Image

from datapipe.decoding import decode_rgb
from datapipe.inspect.browse import samples_at
from datapipe.inspect.draw import outcome_text
from datapipe.inspect.galleries import GalleryItem, Place
from datapipe.schema import RLE, Sample
from datapipe.shards import Store

PICTURE_PX = 320
"""The long side, such that each of a page's few hundred pictures takes some 20 KB."""
_QUALITY = 80
_OUTLINE_TOLERANCE_PX = 0.7

Card = dict[str, Any]
"""What the page's script knows of a sample; plain types."""


def sample_cards(
    store: Store, items: Iterable[GalleryItem], dataset: str = "", picture_px: int = PICTURE_PX
) -> dict[Place, Card]:
    """Cards of the samples that a gallery of this dataset shows, each once."""
    places = sorted({p.place for p in items if p.dataset == dataset})
    samples = samples_at(store, (place[1:] for place in places))
    return {
        place: sample_card(sample, f"{dataset}{sample.key}", picture_px)
        for place, sample in zip(places, samples, strict=True)
    }


def sample_card(sample: Sample, identity: str, picture_px: int = PICTURE_PX) -> Card:
    """`src`: a data URI, or empty where the folder has no image; boxes and outlines in pixels of the stored image."""
    return {
        "id": identity,
        "key": sample.key,
        "src": "" if sample.picture is None else data_uri(sample.picture, picture_px),
        "width": sample.width,
        "height": sample.height,
        "caption": sample.caption,
        "caption_model": sample.caption_model,
        "alt_text": sample.alt_text,
        "url": sample.url,
        "licence": sample.licence,
        "verdict": outcome_text(sample),
        "entities": [number for number, c in enumerate(sample.candidates) if c.rejected is None],
        "candidates": [
            {
                "tag": c.tag,
                "desc": c.desc or "",
                "span": list(c.span),
                "box": [round(v, 1) for v in c.box],
                "score": round(c.score, 3),
                "text_score": round(c.text_score, 3),
                "predicted_iou": c.predicted_iou and round(c.predicted_iou, 3),
                "stability": c.stability and round(c.stability, 3),
                "rejected": c.rejected.value if c.rejected else "",
                "outlines": [] if c.mask is None else outlines(c.mask, max(sample.width, sample.height) / picture_px),
            }
            for c in sample.candidates
        ],
    }


def by_id(cards: Iterable[Card]) -> dict[str, Card]:
    """As the page's script looks them up."""
    return {card["id"]: card for card in cards}


def data_uri(image: bytes, long_side_px: int = PICTURE_PX) -> str:
    """A JPEG of at most this size."""
    picture = Image.fromarray(decode_rgb(image))
    picture.thumbnail((long_side_px, long_side_px), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode("ascii")


def outlines(mask: RLE, scale: float) -> list[list[int]]:
    """The mask's borders, holes included, each as x, y, x, y, …; `scale`: stored pixels in a pixel of the picture."""
    found, _ = cv2.findContours(mask.array().view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    simpler = (cv2.approxPolyDP(c, _OUTLINE_TOLERANCE_PX * max(scale, 1), closed=True) for c in found)
    return [np.asarray(c).ravel().tolist() for c in simpler if len(c) > 2]
