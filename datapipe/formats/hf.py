"""A dataset repository of the Hugging Face hub: parquet files with the images inside, and the dataset card.

`datasets` (5.2.0) takes the type of a column from the schema's metadata: an `Image` is decoded, and the hub's viewer
shows it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from datapipe.formats.folder import new_folder
from datapipe.formats.labels import Faults
from datapipe.formats.parquet import IMAGE, ROWS_PER_GROUP, table_of
from datapipe.inspect.dataset_card import CARD_FILE, dataset_card
from datapipe.schema import Outcome, to_parquet
from datapipe.shards import Manifest, Store, kept_of, manifests

_FEATURES = {b"huggingface": json.dumps({"info": {"features": {IMAGE: {"_type": "Image"}}}}).encode()}


def write_hf(store: Store, out: str, faults: Faults) -> Iterator[Manifest]:
    """Writes `data/train-00000-of-00001.parquet` and so on, one for each shard with kept images, with the columns that
    `write_parquet` writes; and last `README.md`. Then `hf upload NAME OUT . --repo-type dataset`."""
    total = sum(_is_filled(manifest) for manifest in manifests(store, "shard"))
    number = 0
    with new_folder(out) as folder:
        for manifest in manifests(store, "shard"):
            if _is_filled(manifest):
                table = table_of(list(kept_of(store, manifest, faults.corrupt)))
                data = to_parquet(table.replace_schema_metadata(_FEATURES), ROWS_PER_GROUP)
                folder.put(f"data/train-{number:05}-of-{total:05}.parquet", data)
                number += 1
            yield manifest
        folder.put(CARD_FILE, dataset_card(store, "data/train-*.parquet").encode())


def _is_filled(manifest: Manifest) -> bool:
    return manifest.counts.get(Outcome.KEPT.value, 0) > 0
