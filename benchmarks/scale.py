"""What a run's bookkeeping costs as datasets grow: `python benchmarks/scale.py [--slices 10000 100000]
[--rows 1000000 10000000] [--bits 4]`.

Datasets of so many slices, with all the files that a run leaves, of which only the manifests have contents; and
perceptual hashes of so many images. Seconds, CPU time and peak memory of: the check which slices are missing, as a
resumed run does it; the counts of all manifests, as `sdd status` and `sdd inspect` show them; reading the hashes of
all raw shards, of 100 images each, before duplicates are sought; a hundred looks at the ledger of a run; the search for
near duplicates; and what the driver holds of the duplicates. Each is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from datapipe.deduplicate import DuplicatesBySlice, duplicates_table, screened_images, write_duplicates
from datapipe.duplicate_search import near_duplicates
from datapipe.inspect import count_manifests
from datapipe.ledger import Ledger, Tally
from datapipe.plan import Part, Plan
from datapipe.recipe import load_recipe
from datapipe.schema import Reason, Sample, to_parquet, to_table
from datapipe.shards import Kind, Provenance, Store
from datapipe.shards.manifest import FileRecord, Manifest, shard_name
from datapipe.stages import ANNOTATE_STAGES

SLICE_ROWS = 1000
IMAGES_OF_A_SIDECAR = 100
NEAR_SHARE = 0.05
"""Share of the images that are near duplicates of others."""
PROVENANCE = Provenance("0" * 64, "0" * 64, "0" * 64, {"caption": "Salesforce/blip2-opt-2.7b@0000000"})
FILE = FileRecord("0" * 64, 100_000_000)

Work = Callable[[], object]


@dataclass(frozen=True)
class Cost:
    """`cpu_s`: of the process, which other programs on the machine change little; `peak_mb`: of the whole process, with
    its preparations."""

    what: str
    size: int
    seconds: float
    cpu_s: float
    peak_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--bits", type=int, nargs="+", default=[4], help="in which near duplicates may differ")
    arguments = parser.parse_args()
    costs: list[Cost] = []
    for slices in arguments.slices:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            write_folder(Path(folder), slices)
            costs.append(measured("slices: which are missing", slices, missing, folder))
            costs.append(measured("slices: counts of all manifests", slices, counts, folder))
            costs.append(measured("slices: hashes of the raw shards", slices, collected, folder))
        costs.append(measured("slices: 100 looks at the ledger", slices, looks, 100))
    for rows in arguments.rows:
        costs += [measured(f"rows: near duplicates, {bits} bits", rows, near, bits) for bits in arguments.bits]
        costs.append(measured("rows: duplicates in the driver", rows, held, NEAR_SHARE))
    table = Table("what", "how many", "seconds", "CPU s", "peak MB", box=None)
    for cost in costs:
        figures = (f"{cost.seconds:.2f}", f"{cost.cpu_s:.2f}", f"{cost.peak_mb:,.0f}")
        table.add_row(cost.what, f"{cost.size:,}", *figures)
    Console().print(table)
    print(json.dumps([asdict(cost) for cost in costs]))


def measured(what: str, size: int, prepare: Callable[..., Work], given: object) -> Cost:
    """Times the work that `prepare(size, given)` returns, in a process that starts with nothing in memory."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, prepare, size, given))
    process.start()
    seconds, cpu_s, peak_mb = receiver.recv()
    process.join()
    return Cost(what, size, seconds, cpu_s, peak_mb)


def _measure(sender: Connection, prepare: Callable[..., Work], size: int, given: object) -> None:
    work = prepare(size, given)
    started, cpu_started = time.perf_counter(), time.process_time()
    work()
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    sender.send((seconds, cpu_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000))


def write_folder(folder: Path, slices: int) -> None:
    """A finished dataset, but for the contents of its tars and sidecars. The raw sidecars are all the same one."""
    sidecar = folder.parent / f"{folder.name}.parquet"
    images = [
        Sample(row, sha256=f"{row:064x}", phash=row, original_width=640, original_height=480)
        for row in range(IMAGES_OF_A_SIDECAR)
    ]
    sidecar.write_bytes(to_parquet(to_table(images), IMAGES_OF_A_SIDECAR))
    kinds: tuple[tuple[Kind, dict[str, int]], ...] = (
        ("raw", {"fetched": 600, "failed": 200, "dropped": 200}),
        ("shard", {"kept": 400, "failed": 200, "dropped": 400}),
    )
    reasons = {"fetch/http_status": 150, "fetch/timeout": 50, "screen/too_small": 200, "select/too_few_entities": 200}
    for kind, counted in kinds:
        for index in range(slices):
            manifest = Manifest(kind, index, index * SLICE_ROWS, SLICE_ROWS, FILE, FILE, counted, reasons, PROVENANCE)
            (folder / manifest.file).write_bytes(manifest.to_json())
            name = shard_name(kind, index)
            (folder / f"{name}.tar").touch()
            if kind == "raw":
                (folder / f"{name}.parquet").symlink_to(sidecar)
            else:
                (folder / f"{name}.parquet").touch()


def missing(slices: int, folder: str) -> Work:
    recipe = load_recipe("toy", ["toyworld=null", f"slice_rows={SLICE_ROWS}"])
    plan = Plan(recipe, (Part(slices * SLICE_ROWS, "input"),), {}, folder, PROVENANCE)
    return lambda: (plan.missing(Store(folder), "shard"), plan.to_fetch(Store(folder)))


def counts(slices: int, folder: str) -> Work:
    return lambda: count_manifests(Store(folder))


def collected(slices: int, folder: str) -> Work:
    return lambda: screened_images(Store(folder), np.empty(0, np.int64))


def looks(slices: int, times: int) -> Work:
    ledger = Ledger()
    for index in range(slices):
        for stage in ANNOTATE_STAGES:
            ledger.end(index, stage, Tally(SLICE_ROWS, 10, 10, 1.0, failed_by={Reason.ERROR: 10}))

    def look() -> None:
        for _ in range(times):
            ledger.progress()

    return look


def near(rows: int, bits: int) -> Work:
    hashes = hashes_of(rows)
    return lambda: near_duplicates(hashes, bits)


def hashes_of(rows: int) -> NDArray[np.uint64]:
    """Random ones, of which some are others with a bit changed."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, rows, dtype=np.uint64)
    copies = rng.choice(rows, (2, int(rows * NEAR_SHARE)), replace=False)
    hashes[copies[0]] = hashes[copies[1]] ^ (np.uint64(1) << rng.integers(0, 64, copies.shape[1], dtype=np.uint64))
    return hashes


def held(rows: int, share: float) -> Work:
    rng = np.random.default_rng(0)
    duplicates = np.sort(rng.choice(rows, int(rows * share), replace=False))
    folder = tempfile.mkdtemp(prefix="benchmark-")
    exact = np.zeros(len(duplicates), bool)
    write_duplicates(Store(folder), duplicates_table(duplicates, duplicates // 2, exact), parts=1)

    def look() -> None:
        found = DuplicatesBySlice(Store(folder))
        for start in range(0, rows, SLICE_ROWS):
            found.of(range(start, start + SLICE_ROWS))

    return look


if __name__ == "__main__":
    main()
