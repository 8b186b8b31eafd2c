"""Writing, committing and reading the dataset's shards."""

from datapipe.shards.identities import read_identities
from datapipe.shards.manifest import (
    FileRecord,
    Kind,
    Manifest,
    Provenance,
    manifest_name,
    manifests,
    present,
    read_manifest,
)
from datapipe.shards.read import iter_tables, kept_of, kept_samples, read_sample, read_samples, read_slice
from datapipe.shards.rebuild import rebuild_manifests
from datapipe.shards.store import RUN_FILE, Store
from datapipe.shards.verify import Problem, verify
from datapipe.shards.write import write_shard

__all__ = [
    "RUN_FILE",
    "FileRecord",
    "Kind",
    "Manifest",
    "Problem",
    "Provenance",
    "Store",
    "iter_tables",
    "kept_of",
    "kept_samples",
    "manifest_name",
    "manifests",
    "present",
    "read_identities",
    "read_manifest",
    "read_sample",
    "read_samples",
    "read_slice",
    "rebuild_manifests",
    "verify",
    "write_shard",
]
