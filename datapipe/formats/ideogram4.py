"""Ideogram 4's captions: JSON of a description, a background and elements with their boxes.

The schema is that of Ideogram's prompting guide (docs.ideogram.ai, "JSON Prompting (Ideogram 4.0)") and of its caption
verifier, as SimpleTuner 4.8.0 (bc8e6ab7) carries it: keys in this order, boxes as integers `[y_min, x_min, y_max,
x_max]` in 0..1000, one line without spaces, no escapes for letters that are not ASCII.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from datapipe.formats.grounded import description, grid_box, in_one_line, write_grounded
from datapipe.formats.labels import Faults
from datapipe.schema import Sample
from datapipe.shards import Manifest, Store


def write_ideogram4(store: Store, out: str, faults: Faults) -> Iterator[Manifest]:
    """Writes images and captions as `write_grounded` does."""
    return write_grounded(store, out, faults, ideogram4_caption)


def ideogram4_caption(sample: Sample) -> str:
    """The background is empty: no stage describes it, and the key must be there."""
    elements = [
        {"type": "obj", "bbox": grid_box(entity, sample.width, sample.height), "desc": description(entity)}
        for entity in sample.entities
    ]
    caption = {
        "high_level_description": in_one_line(sample.caption),
        "compositional_deconstruction": {"background": "", "elements": elements},
    }
    return json.dumps(caption, ensure_ascii=False, separators=(",", ":"))
