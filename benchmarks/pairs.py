"""How well `sdd pairs` tells look-alikes apart: `python benchmarks/pairs.py [--images 1600] [--sam] [--off-px 2]`.

Scenes of the toy world that show held-out individuals, in groups of four that share noun and both colors. Masks are
those that were drawn or, with `--sam`, what the toy world's SAM makes of the drawn boxes; with `--off-px`, each is then
grown or shrunk by a random number of pixels up to that. Precision and recall are of pairs, as training draws them. The
first interval is Wilson's, which takes pairs as independent; the second resamples the identities that were found, whose
pairs are not. The table shows other thresholds of similarity, by the same scores.
"""

from __future__ import annotations

import argparse
import io
import itertools
import tempfile
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table

from datapipe.inspect.audit import wilson_interval
from datapipe.inspect.pair_agreement import Named, compare, named
from datapipe.pairs.run import find_pairs
from datapipe.pairs.settings import settings_of
from datapipe.schema import IDENTITIES, IDENTITIES_SCHEMA, RLE, Entity, Sample, Slice, Tag
from datapipe.schema.pairs import GIVEN_IDENTITIES
from datapipe.shards import Provenance, Store, write_shard
from datapipe.stages.screen import perceptual_hash
from toyworld.pretrain.cutouts import moved, segmented
from toyworld.render import NOUNS
from toyworld.render.look_alikes import Group, look_alike_scene, look_alikes

INDIVIDUALS_OF_A_GROUP = 4
GROUPS_OF_A_NOUN = (8, 16)
"""From which to before which; by others the defaults of `decide.*` were chosen, see docs/pairs.md."""
FIRST_SCENE = 10_000
IMAGES_OF_A_SHARD = 100
SIZES_PX = (160, 256)
SIMILARITIES = (0.88, 0.9, 0.92, 0.95)
RESAMPLED = 2_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1600)
    parser.add_argument("--sam", action="store_true")
    parser.add_argument("--off-px", type=int, default=0)
    asked = parser.parse_args()
    table = Table("min_similarity", "pairs", "precision", "95 % of pairs", "95 % of identities", "recall")
    with tempfile.TemporaryDirectory() as folder:
        dataset = Store(folder)
        draw(asked.images, asked.sam, asked.off_px, dataset)
        chosen = settings_of(dataset, []).decide.min_similarity
        for similarity in sorted({*SIMILARITIES, chosen}):
            find_pairs(dataset, settings_of(dataset, [f"decide.min_similarity={similarity}"]))
            found, given = named(dataset, IDENTITIES), named(dataset, GIVEN_IDENTITIES)
            met = compare(found, given)
            table.add_row(
                f"{similarity:g}{' (default)' if similarity == chosen else ''}",
                f"{met.found:,}",
                f"{met.precision:.3f}",
                "{:.3f} to {:.3f}".format(*wilson_interval(met.right, met.found)),
                "{:.3f} to {:.3f}".format(*by_identities(found, given)),
                f"{met.recall:.3f}",
            )
    Console().print(table)


def draw(images: int, sam: bool, off_px: int, dataset: Store) -> None:
    """The shards, and who is who in them."""
    groups: dict[str, list[Group]] = {
        noun: list(itertools.islice(look_alikes(noun, "heldout", INDIVIDUALS_OF_A_GROUP), *GROUPS_OF_A_NOUN))
        for noun in NOUNS
    }
    named = []
    for index, first in enumerate(range(0, images, IMAGES_OF_A_SHARD)):
        samples = []
        for row in range(first, min(first + IMAGES_OF_A_SHARD, images)):
            sample, individuals = drawn_sample(row, groups, sam, off_px)
            samples.append(sample)
            named += [{"key": sample.key, "entity": n, "identity": who} for n, who in enumerate(individuals)]
        write_shard(dataset, "shard", Slice(index, tuple(samples)), Provenance("", "", "", {}))
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(named, IDENTITIES_SCHEMA), sink)
    dataset.put(IDENTITIES, sink.getvalue())


def drawn_sample(
    row: int, groups: dict[str, list[Group]], sam: bool = False, off_px: int = 0
) -> tuple[Sample, list[str]]:
    """A scene as a kept sample with its masks, true or SAM's, off by up to so many pixels, and who its entities are."""
    size = int(np.random.default_rng(row).integers(*SIZES_PX))
    scene = look_alike_scene(FIRST_SCENE + row, groups, size)
    true = [s.mask for s in scene.subjects]
    masks = [
        moved(mask, int(np.random.default_rng([row, n]).integers(-off_px, off_px + 1)))
        for n, mask in enumerate(segmented(scene.image, [s.box for s in scene.subjects]) if sam else true)
    ]
    sink = io.BytesIO()
    Image.fromarray(scene.image).save(sink, "JPEG", quality=92)
    sample = Sample(
        row=row,
        image=sink.getvalue(),
        width=size,
        height=size,
        phash=perceptual_hash(scene.image),
        caption=scene.caption,
        tags=tuple(Tag(s.tag, s.span) for s in scene.subjects),
        candidates=tuple(
            Entity(s.tag, s.span, s.box, 1.0, 1.0, RLE.of(mask)) for s, mask in zip(scene.subjects, masks, strict=True)
        ),
    )
    return sample.kept(), [f"{s.identity.noun} {s.identity.index}" for s in scene.subjects]


def by_identities(found: Named, given: Named) -> tuple[float, float]:
    """95 % interval of the precision when the identities that were found are drawn anew, with replacement."""
    members = defaultdict(list)
    for entity, identity in found.items():
        members[identity].append(entity)
    pairs = [[(a, b) for a, b in itertools.combinations(m, 2) if a[0] != b[0]] for m in members.values()]
    right = np.array([sum(given[a] == given[b] for a, b in some) for some in pairs])
    there = np.array([len(some) for some in pairs])
    drawn = np.random.default_rng(0).integers(0, len(right), (RESAMPLED, len(right)))
    low, high = np.quantile(right[drawn].sum(axis=1) / there[drawn].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    main()
