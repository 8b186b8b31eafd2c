"""The search for near duplicates on a cluster: its tables are sorted side by side."""

from __future__ import annotations

import numpy as np
import ray
from numpy.typing import NDArray

from datapipe import cluster
from datapipe.duplicate_search import BYTES_PER_HASH, paired
from datapipe.duplicate_tables import tables_for

SPREAD_FROM = 1_000_000
"""Hashes; fewer take seconds where they are."""


def paired_on_ray(hashes: NDArray[np.uint64], max_bits: int) -> NDArray[np.bool_]:
    """`paired`, in a task for each CPU of the cluster, as far as there are tables. Each node holds the hashes once, and
    each task what `paired` takes."""
    tables = tables_for(len(hashes), max_bits)
    tasks = min(len(tables), int(sum(cpus for cpus, _ in cluster.nodes())))
    if len(hashes) < SPREAD_FROM or tasks < 2:
        return paired(hashes, max_bits, tables)
    on_node = ray.put(hashes)
    # Ray runs no more of them on a node at once than its memory holds, and none that asks for more than any node has.
    largest = max(node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"])
    task = ray.remote(paired).options(memory=int(min(BYTES_PER_HASH * len(hashes), largest)))
    working = [task.remote(on_node, max_bits, tables[k::tasks]) for k in range(tasks)]
    found = np.zeros(len(hashes), bool)
    while working:
        (done,), working = ray.wait(working)
        found |= ray.get(done)
    return found
