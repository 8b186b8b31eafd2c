"""Labelled images become the shards that a run of the pipeline would write."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from datapipe.errors import RunError, SourceError
from datapipe.images import ImageRefusedError, normalise
from datapipe.labelled.images import LabelledImage, LabelledObject
from datapipe.plan import code_hash
from datapipe.schema import RLE, Entity, Reason, Rejection, Sample, Slice, StageName, Tag
from datapipe.shards import Manifest, Provenance, Store, annotation_problems, is_whole, manifests, present, write_shard
from datapipe.stages.screen import perceptual_hash

MAX_PIXELS = 100_000_000
MAX_STRETCH = 0.05
"""How much the labels' aspect may differ from their image's: a smaller copy's is rounded, a turned one's is another."""


def import_images(
    images: Iterable[LabelledImage], name: str, digest: str, store: Store, slice_rows: int
) -> Iterator[Manifest]:
    """Commits a shard for every `slice_rows` images, and yields it; those that are there are left as they are.

    name, digest: of the labels; a folder with shards of others is refused. Of an image's captions the one that names
    most of its objects is taken; where there is none, one is made of their names. Objects that the caption does not
    name become candidates that were refused for their label, as the paper's rule has it. An image whose labels
    contradict it, or that has an object without area or with a broken mask, fails. Raises RunError when the folder
    holds something else, SourceError when there is no image.
    """
    recipe_hash = hashlib.sha256(f"{slice_rows} {digest}".encode()).hexdigest()
    provenance = Provenance(recipe_hash, code_hash(), name, {"labels": name})
    for manifest in manifests(store, "shard"):
        if manifest.provenance.recipe_hash != recipe_hash:
            raise RunError(
                f"{store.root} holds shards of {manifest.provenance.input} with other labels or another --slice-rows; "
                "choose another --out"
            )
        break
    with store.lock():
        store.clear_temporaries()
        done = set(present(store, "shard"))
        rows = enumerate(images)
        for index in itertools.count():
            some = list(itertools.islice(rows, slice_rows))
            if not some and index == 0:
                raise SourceError(f"{name}: no image is labelled there")
            if not some:
                return
            if index not in done:
                yield write_shard(store, "shard", Slice(index, tuple(_sample(*row) for row in some)), provenance)


def _sample(row: int, labelled: LabelledImage) -> Sample:
    sample = Sample(row=row, url=labelled.url or labelled.path.name, licence=labelled.licence)
    try:
        data = labelled.path.read_bytes()
    except OSError as error:
        return sample.failed(StageName.FETCH, Reason.UNREADABLE, f"{labelled.path.name}: {error.strerror}")
    try:
        image = normalise(data, MAX_PIXELS)
    except ImageRefusedError as refused:
        return sample.dropped(StageName.SCREEN, refused.reason, refused.detail)
    height, width = image.pixels.shape[:2]
    size_px = (image.original_width, image.original_height)
    if labelled.size_px is not None and not _same_shape(labelled.size_px, size_px):
        there, here = (f"{w} x {h}" for w, h in (labelled.size_px, size_px))
        said = f"the labels are of {there} pixels, the upright image has {here}"
        return sample.failed(StageName.GROUND, Reason.ERROR, said)
    objects = labelled.objects
    caption, source = _caption([o.name for o in objects], labelled.captions)
    candidates = tuple(_entity(o, caption, width, height) for o in objects)
    sample = sample.replace(
        image=image.data,
        width=width,
        height=height,
        original_width=size_px[0],
        original_height=size_px[1],
        sha256=hashlib.sha256(data).hexdigest(),
        phash=perceptual_hash(image.pixels),
        caption=caption,
        caption_model=source,
        tags=tuple(dict.fromkeys(Tag(c.tag, c.span) for c in candidates if c.rejected is None)),
        candidates=candidates,
    )
    if not sample.entities:
        return sample.replace(image=None).dropped(StageName.SELECT, Reason.TOO_FEW_ENTITIES, "no object has a label")
    for problem in annotation_problems(sample):
        return sample.replace(image=None).failed(StageName.GROUND, Reason.ERROR, problem)
    return sample.kept()


def _same_shape(labelled_px: tuple[int, int], found_px: tuple[int, int]) -> bool:
    (width, height), (found_width, found_height) = labelled_px, found_px
    return abs(width * found_height - height * found_width) <= MAX_STRETCH * width * found_height


def _caption(names: Sequence[str], captions: Sequence[str]) -> tuple[str, str]:
    """The caption, and where it is from."""
    distinct = list(dict.fromkeys(names))
    if captions:
        return max(captions, key=lambda c: sum(_span(n, c) is not None for n in distinct)).strip(), "people"
    words = [f"{'an' if name[:1] in 'aeiou' else 'a'} {name}" for name in distinct]
    listed = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return f"a photo of {listed}" if words else "", "names of the labels"


def _entity(labelled: LabelledObject, caption: str, width: int, height: int) -> Entity:
    span = _span(labelled.name, caption)
    x1, y1, x2, y2 = (min(max(v, 0.0), 1.0) for v in labelled.box)
    return Entity(
        labelled.name,
        span or (0, 0),
        (x1 * width, y1 * height, x2 * width, y2 * height),
        score=1.0,
        text_score=1.0,
        mask=labelled.mask and _fitted(labelled.mask, width, height),
        rejected=None if span else Rejection.LABEL,
    )


def _span(name: str, caption: str) -> tuple[int, int] | None:
    found = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", caption, re.IGNORECASE)
    return found.span() if name and found else None


def _fitted(mask: RLE, width: int, height: int) -> RLE:
    """Masks may come at another size than their image's (Open Images'). A broken one stays as it is."""
    if mask.size == (height, width) or mask.size[0] * mask.size[1] > MAX_PIXELS or not is_whole(mask):
        return mask
    decoded = coco_mask.decode({"size": list(mask.size), "counts": mask.counts.encode()})
    resized = np.asfortranarray(cv2.resize(decoded, (width, height), interpolation=cv2.INTER_NEAREST))
    return RLE((height, width), coco_mask.encode(resized)["counts"].decode())
