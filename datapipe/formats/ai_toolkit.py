"""AI Toolkit's folders: targets with their captions, and up to three folders of control images of the same names.

As `config/examples/train_lora_qwen_image_edit_2509_32gb.yaml` and `toolkit/dataloader_mixins.py` of ai-toolkit 0.12.26
(27a03a91) say.
"""

from __future__ import annotations

from collections.abc import Iterator

from datapipe.formats.folder import new_folder
from datapipe.formats.kept import each_kept
from datapipe.formats.labels import Faults
from datapipe.formats.references import references_of
from datapipe.schema import Sample
from datapipe.shards import Manifest, Store

CONTROLS = 3
"""Control images of a target, at most: `control_path_1` to `control_path_3`."""


def write_ai_toolkit(store: Store, out: str, faults: Faults) -> Iterator[Manifest]:
    """Writes `main/KEY.jpg` and `KEY.txt`, and `control_1/KEY.png` to `control_3/KEY.png`, the best scores first."""
    with new_folder(out) as folder, references_of(store) as references:

        def write(sample: Sample) -> None:
            assert sample.image is not None
            for number, reference in enumerate(references(sample)[:CONTROLS], 1):
                folder.put(f"control_{number}/{sample.key}.png", reference)
            folder.put(f"main/{sample.key}.jpg", sample.image)
            folder.put(f"main/{sample.key}.txt", sample.caption.encode())

        yield from each_kept(store, faults, write)
