"""Samples as a web page shows them: a small picture as a data URI, and masks as outlines over it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from datapipe.images import decode_rgb
from datapipe.inspect.browse import samples_at
from datapipe.inspect.draw import what_became_of
from datapipe.inspect.galleries import Pick, Place
from datapipe.schema import RLE, Sample
from datapipe.shards import Store

PICTURE_PX = 320
"""Long side: of a page's few hundred pictures each is to be some 20 KB."""
_QUALITY = 80
_OUTLINE_TOLERANCE_PX = 0.7

Card = dict[str, Any]
"""What the page's script knows of a sample; plain types."""


def cards_of(store: Store, picks: Iterable[Pick], dataset: str = "") -> dict[Place, Card]:
    """Of all picks that are of this dataset, each sample once."""
    places = sorted({p.place for p in picks if p.dataset == dataset})
    samples = samples_at(store, (place[1:] for place in places))
    return {place: card(sample, f"{dataset}{sample.key}") for place, sample in zip(places, samples, strict=True)}


def card(sample: Sample, identity: str, picture_px: int = PICTURE_PX) -> Card:
    """`src`: a data URI, or empty where the folder has no image; boxes and outlines in pixels of the stored image."""
    return {
        "id": identity,
        "key": sample.key,
        "src": "" if sample.image is None else data_uri(sample.image, picture_px),
        "width": sample.width,
        "height": sample.height,
        "caption": sample.caption,
        "caption_model": sample.caption_model,
        "alt_text": sample.alt_text,
        "url": sample.url,
        "licence": sample.licence,
        "verdict": what_became_of(sample),
        "candidates": [
            {
                "tag": c.tag,
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


def details_of(cards: Iterable[Card]) -> dict[str, Card]:
    """What the page's script needs, by id. Pictures are left out: they stand in the page where they are shown."""
    return {c["id"]: {name: value for name, value in c.items() if name not in ("id", "src")} for c in cards}


def data_uri(image: bytes, long_side_px: int = PICTURE_PX) -> str:
    """A JPEG of at most this size."""
    picture = Image.fromarray(decode_rgb(image))
    picture.thumbnail((long_side_px, long_side_px), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode("ascii")


def outlines(mask: RLE, scale: float) -> list[list[int]]:
    """The mask's borders, holes included, each as x, y, x, y, …; `scale`: stored pixels in a pixel of the picture."""
    decoded = coco_mask.decode({"size": list(mask.size), "counts": mask.counts.encode("ascii")})
    found, _ = cv2.findContours(decoded, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    simpler = (cv2.approxPolyDP(c, _OUTLINE_TOLERANCE_PX * max(scale, 1), closed=True) for c in found)
    return [np.asarray(c).ravel().tolist() for c in simpler if len(c) > 2]
