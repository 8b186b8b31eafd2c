"""musubi-tuner's JSON lines: an image, its caption, and control images.

As `docs/dataset_config.md` and `dataset/datasources.py` of musubi-tuner 0.3.4 (30c658c4) say.
"""

from __future__ import annotations

from collections.abc import Iterator

from datapipe.formats.folder import new_folder
from datapipe.formats.kept import each_kept
from datapipe.formats.labels import Faults
from datapipe.formats.references import put_references, references_of
from datapipe.schema import Sample
from datapipe.shards import Manifest, Store


def write_musubi(store: Store, out: str, faults: Faults) -> Iterator[Manifest]:
    """Writes `images/KEY.jpg`, `references/KEY_0.png` and so on, and last `metadata.jsonl`, the `image_jsonl_file`.
    Paths in it are absolute, because musubi-tuner opens them from wherever it runs."""
    with new_folder(out) as folder, folder.lines("metadata.jsonl") as add, references_of(store) as references:

        def write(sample: Sample) -> None:
            assert sample.image is not None
            controls = put_references(folder, sample, references)
            image = folder.put(f"images/{sample.key}.jpg", sample.image)
            numbered = {f"control_path_{number}": f"{folder.place}/{name}" for number, name in enumerate(controls)}
            add({"image_path": f"{folder.place}/{image}", **numbered, "caption": sample.caption})

        yield from each_kept(store, faults, write)
