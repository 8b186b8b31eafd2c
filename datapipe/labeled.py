"""Images that people have labeled become the shards that a run of the pipeline would write, without a model."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import cv2
import numpy as np

from datapipe.decoding import normalize
from datapipe.formats import Faults, LabeledImage, LabeledObject
from datapipe.formats.labels import OUTSIDE
from datapipe.image_file import ImageRefusedError
from datapipe.plan import code_hash
from datapipe.schema import RLE, Entity, Reason, Rejection, Sample, Slice, StageName, Tag, entity_problems
from datapipe.shards import Manifest, Provenance, Store, manifests, present, write_shard
from datapipe.stages.screen import perceptual_hash
from subject_diffusion.errors import RunError, SourceError

MAX_PIXELS = 100_000_000
_FIRST_IMAGES = 50
MAX_STRETCH = 0.05
"""How much the labels' aspect may differ from their image's: a smaller copy's is rounded, a turned one's is another."""


def import_images(
    images: Iterable[LabeledImage], name: str, digest: str, store: Store, slice_rows: int, faults: Faults
) -> Iterator[Manifest]:
    """Commits a shard for every `slice_rows` images, and yields it; those that are there are left as they are.

    name, digest: of the labels; a folder with shards of others is refused. Of an image's captions the one that names
    most of its objects is taken; where there is none, one is made of their names. Objects that the caption does not
    name become candidates that were refused for their label, as the paper's rule has it. An object without area or with
    a broken mask is left out and added to `faults`; an image whose labels are of another shape fails. Raises RunError
    when the folder holds something else, SourceError when there is no image, or none of the first ones is where it was
    looked for.
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
        rows = enumerate(_found_at_all(iter(images), name))
        for index in itertools.count():
            some = list(itertools.islice(rows, slice_rows))
            if not some:
                return
            if index not in done:
                samples = tuple(_sample(row, labeled, faults) for row, labeled in some)
                yield write_shard(store, "shard", Slice(index, samples), provenance)


def _found_at_all(images: Iterator[LabeledImage], name: str) -> Iterator[LabeledImage]:
    """The images. Raises SourceError before the first one where none of the first few is there: then it is the folder
    that is wrong, and a dataset of nothing but failures would help nobody."""
    first = list(itertools.islice(images, _FIRST_IMAGES))
    if not first:
        raise SourceError(f"{name}: no image is labeled there")
    looked_for = [image for image in first if not image.problem or OUTSIDE in image.problem]
    if looked_for and not any(not image.problem and image.path.is_file() for image in looked_for):
        tried = looked_for[0].problem or f"tried {looked_for[0].path}"
        raise SourceError(
            f"{name}: of the first {len(looked_for)} images that the labels name none is there ({tried}); "
            "name their folder with --images"
        )
    return itertools.chain(first, images)


def _sample(row: int, labeled: LabeledImage, faults: Faults) -> Sample:
    sample = Sample(row=row, url=labeled.url or labeled.name, licence=labeled.licence)
    if labeled.problem:
        return sample.failed(StageName.FETCH, Reason.UNREADABLE, labeled.problem)
    try:
        data = labeled.path.read_bytes()
    except OSError as error:
        faults.add("image that is not there", f"{labeled.path}: {error.strerror}")
        return sample.failed(StageName.FETCH, Reason.UNREADABLE, f"{labeled.name}: {error.strerror}")
    try:
        image = normalize(data, MAX_PIXELS)
    except ImageRefusedError as refused:
        return sample.dropped(StageName.SCREEN, refused.reason, refused.detail)
    height, width = image.height, image.width
    size_px = (image.original_width, image.original_height)
    if labeled.size_px is not None and not _same_shape(labeled.size_px, size_px):
        there, here = (f"{w} x {h}" for w, h in (labeled.size_px, size_px))
        said = f"the labels are of {there} pixels, the upright image has {here}"
        faults.add("image of another size than its labels'", f"{labeled.name}: {said}")
        return sample.failed(StageName.GROUND, Reason.ERROR, said)
    objects = [o for o in labeled.objects if _is_usable(o, width, height, faults)]
    caption, written_by = _caption([o.name for o in objects], labeled)
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
        caption_model=written_by,
        tags=tuple(dict.fromkeys(Tag(c.tag, c.span) for c in candidates if c.rejected is None)),
        candidates=candidates,
    )
    if not sample.entities:
        return sample.replace(image=None).dropped(StageName.SELECT, Reason.TOO_FEW_ENTITIES, "no object has a label")
    return sample.kept()


def _is_usable(labeled: LabeledObject, width: int, height: int, faults: Faults) -> bool:
    """Whether an object has a box and, where it has a mask, one with something in it, on its image."""
    entity = _entity(labeled, "", width, height)
    problem = next(entity_problems(entity, width, height), None)
    if problem is None and entity.mask is not None and not entity.mask.area:
        problem = "its mask is empty"
    if problem is not None:
        kind = "a box outside of its image or without area" if problem.startswith("box") else "an unusable mask"
        faults.add(f"object with {kind}", f"{labeled.where}: {problem}")
    return problem is None


def _same_shape(labeled_px: tuple[int, int], found_px: tuple[int, int]) -> bool:
    (width, height), (found_width, found_height) = labeled_px, found_px
    return abs(width * found_height - height * found_width) <= MAX_STRETCH * width * found_height


def _caption(names: Sequence[str], labeled: LabeledImage) -> tuple[str, str]:
    """The caption, and who wrote it."""
    distinct = list(dict.fromkeys(names))
    if labeled.captions:
        best = max(labeled.captions, key=lambda c: sum(_span(n, c) is not None for n in distinct))
        return best.strip(), labeled.captions_by
    words = [f"{'an' if name[:1] in 'aeiou' else 'a'} {name}" for name in distinct]
    listed = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return f"a photo of {listed}" if words else "", "names of the labels"


def _entity(labeled: LabeledObject, caption: str, width: int, height: int) -> Entity:
    span = labeled.span if labeled.span and _lies_in(labeled.span, caption) else _span(labeled.name, caption)
    x1, y1, x2, y2 = (min(max(v, 0.0), 1.0) for v in labeled.box)
    return Entity(
        labeled.name,
        span or (0, 0),
        (x1 * width, y1 * height, x2 * width, y2 * height),
        score=1.0,
        text_score=1.0,
        mask=labeled.mask and _fitted(labeled.mask, width, height),
        rejected=None if span else Rejection.LABEL,
    )


def _lies_in(span: tuple[int, int], caption: str) -> bool:
    start, end = span
    return 0 <= start < end <= len(caption)


def _span(name: str, caption: str) -> tuple[int, int] | None:
    found = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", caption, re.IGNORECASE)
    return found.span() if name and found else None


def _fitted(mask: RLE, width: int, height: int) -> RLE:
    """Masks may come at another size than their image's (Open Images'). One that is broken, or of another shape, stays
    as it is."""
    if mask.size == (height, width) or not mask.is_whole():
        return mask
    if not _same_shape((mask.size[1], mask.size[0]), (width, height)):
        return mask
    return RLE.of(cv2.resize(mask.array().view(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST))
