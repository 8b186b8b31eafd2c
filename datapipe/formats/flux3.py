"""FLUX.3's captions: a text that cites every subject by its id, and a table of ids, boxes and descriptions.

As `modular_pipelines/flux3/prompt_upsampler.py` of diffusers 0.42.1 describes and reads them (prompts of
black-forest-labs/flux-3-image-klein-pup at 8b069751): `a mug <mug_1> on grass [{"id": "mug_1", "bbox": [250, 83, 750,
417], "desc": "mug"}]`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

from datapipe.formats.grounded import description, grid_box, in_one_line, write_grounded
from datapipe.formats.labels import Faults
from datapipe.schema import Entity, Sample
from datapipe.shards import Manifest, Store


def write_flux3(store: Store, out: str, faults: Faults) -> Iterator[Manifest]:
    """Writes images and captions as `write_grounded` does."""
    return write_grounded(store, out, faults, flux3_caption)


def flux3_caption(sample: Sample) -> str:
    """The text with an id after each subject's noun, and the table, in the order in which they are cited."""
    named = sorted(zip(_ids(sample.entities), sample.entities, strict=True), key=lambda pair: pair[1].span[1])
    parts, at = [], 0
    for name, entity in named:
        parts += [sample.caption[at : entity.span[1]], f" <{name}>"]
        at = entity.span[1]
    text = in_one_line("".join([*parts, sample.caption[at:]]))
    rows = [
        {"id": name, "bbox": grid_box(entity, sample.width, sample.height), "desc": description(entity)}
        for name, entity in named
    ]
    return f"{text} {json.dumps(rows, ensure_ascii=False)}"


def _ids(entities: Sequence[Entity]) -> list[str]:
    """An id for each: its noun, and its number among those of the same noun, from the left to the right, then from the
    top down."""
    nouns = [_noun(entity.tag) for entity in entities]
    order = sorted(range(len(entities)), key=lambda i: entities[i].box[:2])
    ids, counts = [""] * len(entities), Counter[str]()
    for i in order:
        counts[nouns[i]] += 1
        ids[i] = f"{nouns[i]}_{counts[nouns[i]]}"
    return ids


def _noun(tag: str) -> str:
    """In the letters of an id: `[A-Za-z][A-Za-z0-9_]*`."""
    plain = unicodedata.normalize("NFKD", tag).encode("ascii", "ignore").decode()
    noun = re.sub(r"[^A-Za-z0-9]+", "_", plain).strip("_0123456789")
    return noun or "object"
