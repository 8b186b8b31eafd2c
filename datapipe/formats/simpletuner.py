"""SimpleTuner's folders: an image, its caption and a `.bbox` file of its subjects, whose masks lie elsewhere.

As `documentation/DATALOADER.md` and `helpers/training/grounding/metadata.py` of SimpleTuner 4.8.0 (bc8e6ab7) say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

from datapipe.formats.folder import ExportFolder, new_folder
from datapipe.formats.kept import each_kept
from datapipe.formats.labels import Faults, fractions
from datapipe.formats.references import png
from datapipe.schema import Sample
from datapipe.shards import Manifest, Store


def write_simpletuner(store: Store, out: str, faults: Faults) -> Iterator[Manifest]:
    """Writes `images/KEY.jpg`, `KEY.txt` and `KEY.bbox` into the folder `out`, and `masks/KEY_0.png`, white where the
    subject is. `instance_data_dir` is to be `images`: SimpleTuner learns every image below it."""
    with new_folder(out) as folder:

        def write(sample: Sample) -> None:
            assert sample.image is not None
            entities = [_entity(sample, number, folder) for number in range(len(sample.entities))]
            folder.put(f"images/{sample.key}.jpg", sample.image)
            folder.put(f"images/{sample.key}.txt", sample.caption.encode())
            folder.put(f"images/{sample.key}.bbox", json.dumps(entities, ensure_ascii=False).encode())

        yield from each_kept(store, faults, write)


def _entity(sample: Sample, number: int, folder: ExportFolder) -> dict[str, object]:
    entity = sample.entities[number]
    found: dict[str, object] = {"label": entity.tag, "bbox": fractions(entity.box, sample.width, sample.height)}
    if entity.mask is not None:
        mask = folder.put(f"masks/{sample.key}_{number}.png", png(entity.mask.array() * np.uint8(255)))
        found["mask"] = f"../{mask}"  # from the image's folder
    return found
