"""References for trainers of editing models: every subject of an image alone, over white, cut out of another image of
the same subject where the dataset knows one, else of the image itself."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from sqlite3 import Connection

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datapipe.decoding import decode_rgb
from datapipe.formats.folder import ExportFolder
from datapipe.schema import IDENTITIES, Entity, Sample, from_json
from datapipe.shards import Store, iter_tables, present, read_identities
from datapipe.shards.manifest import shard_name
from datapipe.sources.scanning import shown
from datapipe.sources.temporary_database import temporary_database
from subject_diffusion.errors import RunError, ShardError

References = Callable[[Sample], list[bytes]]
"""A PNG of each entity of a sample, best score first. Raises ValueError where the sample's image cannot be decoded."""

_MEMBERS = ("image_offset", "image_size", "json_offset", "json_size")


@contextmanager
def references_of(store: Store) -> Iterator[References]:
    """Raises RunError, ShardError for a dataset whose identities cannot be used."""
    with temporary_database() as database:
        others = _Others(store, database) if store.exists(IDENTITIES) else None

        def references(sample: Sample) -> list[bytes]:
            assert sample.image is not None
            pixels = decode_rgb(sample.image)
            return [
                (others.of(sample.key, number) if others else None) or cut_out(pixels, entity)
                for number, entity in enumerate(sample.entities)
            ]

        yield references


def put_references(folder: ExportFolder, sample: Sample, references: References) -> list[str]:
    """Writes `references/KEY_0.png` and so on; returns the names."""
    return [
        folder.put(f"references/{sample.key}_{number}.png", reference)
        for number, reference in enumerate(references(sample))
    ]


def cut_out(pixels: NDArray[np.uint8], entity: Entity) -> bytes:
    """The entity over white as a PNG, cropped to its mask, or to its box where it has none. pixels: (H, W, 3) of its
    image."""
    height, width = pixels.shape[:2]
    x1, y1 = (min(math.floor(v), side - 1) for v, side in zip(entity.box[:2], (width, height), strict=True))
    x2, y2 = (max(math.ceil(v), low + 1) for v, low in zip(entity.box[2:], (x1, y1), strict=True))
    mask = entity.mask.array() if entity.mask is not None else None
    if mask is not None and mask.any():
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x1, y1, x2, y2 = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
        pixels = np.where(mask[y1:y2, x1:x2, None], pixels[y1:y2, x1:x2], np.uint8(255))
    else:
        pixels = pixels[y1:y2, x1:x2]
    return png(pixels)


def png(pixels: NDArray[np.uint8]) -> bytes:
    """pixels: (H, W) gray, or (H, W, 3) RGB."""
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(sink, "PNG", compress_level=1)
    return sink.getvalue()


class _Others:
    """For an entity, the same subject in another image. What is known of them lies on disk, however many they are."""

    def __init__(self, store: Store, database: Connection) -> None:
        self._store = store
        self._database = database
        database.execute(
            "CREATE TABLE identities (identity, key, entity, PRIMARY KEY (identity, key, entity)) WITHOUT ROWID"
        )
        rows = ((identity, key, entity) for key, entity, identity in shown(read_identities(store), "identities read"))
        database.executemany("INSERT OR IGNORE INTO identities VALUES (?, ?, ?)", rows)
        database.execute("CREATE INDEX entities ON identities (key, entity)")
        database.execute(f"CREATE TABLE places (key PRIMARY KEY, shard, {', '.join(_MEMBERS)}) WITHOUT ROWID")
        tables = iter_tables(store, columns=["key", *_MEMBERS])
        for shard, table in zip(present(store, "shard"), tables, strict=True):
            kept = table.filter(table["image_offset"].is_valid()).to_pydict().values()
            database.executemany(
                f"INSERT INTO places SELECT ?1, {shard}, ?2, ?3, ?4, ?5 "
                "WHERE EXISTS (SELECT 1 FROM identities WHERE key = ?1)",
                zip(*kept, strict=True),
            )

    def of(self, key: str, entity: int) -> bytes | None:
        """The next image of the subject in the order of the keys, after the last one the first: so each serves as
        often as any other. None where there is none that can be read."""
        query = "SELECT identity FROM identities WHERE key = ? AND entity = ? ORDER BY identity LIMIT 1"
        known = self._database.execute(query, (key, entity)).fetchone()
        if known is None:
            return None
        query = "SELECT key, entity FROM identities WHERE identity = ?1 AND key {} ?2 ORDER BY key, entity LIMIT 1"
        for order in (">", "<"):
            found = self._database.execute(query.format(order), (*known, key)).fetchone()
            if found is not None:
                return self._cut_out(*found)
        return None

    def _cut_out(self, key: str, number: int) -> bytes | None:
        query = f"SELECT shard, {', '.join(_MEMBERS)} FROM places WHERE key = ?"
        place = self._database.execute(query, (key,)).fetchone()
        if place is None:
            raise RunError(f"{self._store.root}/{IDENTITIES}: sample {key} is not in this dataset")
        shard, image_offset, image_size, json_offset, json_size = place
        tar = f"{shard_name('shard', shard)}.tar"
        try:
            sample = from_json(self._store.read(tar, json_offset, json_size))
            pixels = decode_rgb(self._store.read(tar, image_offset, image_size))
        except (ShardError, ValueError):  # the export names it when its own turn comes
            return None
        if number >= len(sample.entities):
            raise RunError(f"{self._store.root}/{IDENTITIES}: sample {key} has no entity {number}")
        return cut_out(pixels, sample.entities[number])
