"""What every export does: the kept samples of a dataset, one shard at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from datapipe.formats.labels import Faults
from datapipe.schema import Sample
from datapipe.shards import Manifest, Store, kept_of, manifests
from subject_diffusion.errors import one_line


def each_kept(store: Store, faults: Faults, write: Callable[[Sample], None]) -> Iterator[Manifest]:
    """Hands every kept sample to `write`, and yields each shard when it is done. A sample for which `write` raises
    ValueError, before it has written anything, is left out, as a corrupt one is."""
    for manifest in manifests(store, "shard"):
        for sample in kept_of(store, manifest, faults.corrupt):
            try:
                write(sample)
            except ValueError as error:
                faults.corrupt(f"{store.root}/{manifest.name}.tar, sample {sample.row}", one_line(error))
        yield manifest
