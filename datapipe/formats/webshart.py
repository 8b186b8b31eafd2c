"""webshart's index of a dataset's tars: where every sample lies, its size and its caption, so that a trainer makes its
aspect buckets without opening an image.

As the README of webshart 0.4.6 describes it; SimpleTuner reads it with `caption_strategy: webshart`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from datapipe.formats.folder import new_folder
from datapipe.formats.labels import Faults
from datapipe.schema import Sample, current, from_table, sample_problems
from datapipe.shards import Manifest, Store, iter_tables, manifests

_PLACE = ["image_offset", "image_size", "json_offset", "json_size"]


def write_webshart(store: Store, out: str, faults: Faults) -> Iterator[Manifest]:
    """Writes `shard-000000.json` and so on: `discover_dataset(source=DATASET, metadata=OUT)`. The tars stay where they
    are, and are not read."""
    with new_folder(out) as folder:
        for manifest, table in zip(manifests(store, "shard"), iter_tables(store), strict=True):
            kept = table.filter(table["image_offset"].is_valid())
            tree = {
                "path": f"{manifest.name}.tar",
                "filesize": manifest.tar.size,
                "hash": manifest.tar.sha256,
                "includes_image_geometry": True,
            }
            files: dict[str, dict[str, Any]] = {}
            for sample, place in zip(from_table(current(kept)), kept.select(_PLACE).to_pylist(), strict=True):
                problem = next(sample_problems(sample), None)
                if problem is None:
                    files |= _entries(sample, **place)
                else:
                    faults.corrupt(f"{store.root}/{manifest.name}.tar, sample {sample.row}", problem)
            text = json.dumps(tree | {"files": files}, ensure_ascii=False)
            folder.put(f"{manifest.name}.json", f"{text}\n".encode())
            yield manifest


def _entries(
    sample: Sample, image_offset: int, image_size: int, json_offset: int, json_size: int
) -> dict[str, dict[str, Any]]:
    """The members of a sample, by name."""
    image = {
        "offset": image_offset,
        "length": image_size,
        "width": sample.width,
        "height": sample.height,
        "aspect": sample.width / sample.height,
        "json_path": f"{sample.key}.json",
        "json_offset": json_offset,
        "json_length": json_size,
        "captions": sample.caption,
    }
    return {f"{sample.key}.jpg": image, f"{sample.key}.json": {"offset": json_offset, "length": json_size}}
