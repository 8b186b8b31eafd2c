"""DiffSynth-Studio's metadata: JSON lines of an image, a prompt, and the images to edit.

As `docs/en/API_Reference/core/data.md` and `diffsynth/core/data/unified_dataset.py` of DiffSynth-Studio 2.1.2
(fed7b18f) say.
"""

from __future__ import annotations

from collections.abc import Iterator

from datapipe.formats.folder import new_folder
from datapipe.formats.kept import each_kept
from datapipe.formats.labels import Faults
from datapipe.formats.references import put_references, references_of
from datapipe.schema import Sample
from datapipe.shards import Manifest, Store


def write_diffsynth(store: Store, out: str, faults: Faults) -> Iterator[Manifest]:
    """Writes `images/KEY.jpg`, `references/KEY_0.png` and so on, and last `metadata.jsonl`, for `--data_file_keys
    image,edit_image`. Paths in it are relative to the folder, the `--dataset_base_path`."""
    with new_folder(out) as folder, folder.lines("metadata.jsonl") as add, references_of(store) as references:

        def write(sample: Sample) -> None:
            assert sample.image is not None
            edited = put_references(folder, sample, references)
            image = folder.put(f"images/{sample.key}.jpg", sample.image)
            add({"image": image, "prompt": sample.caption, "edit_image": edited})

        yield from each_kept(store, faults, write)
