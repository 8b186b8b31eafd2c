"""A shard appears whole or not at all, and the same slice always gives the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile

import pyarrow.parquet as pq
import pytest
import webdataset

from datapipe.schema import Reason, Sample, Slice, StageName
from datapipe.shards import Store, iter_tables, kept_samples, manifests, present, read_sample, read_slice, write_shard
from datapipe.shards.write import ROWS_PER_GROUP, THUMBNAILS_OF_A_REASON
from subject_diffusion.errors import RunError, ShardError
from tests.conftest import kept_sample
from tests.toy import PROJECT, digests


def mixed_slice(index: int = 0) -> Slice:
    """Three kept rows, one dropped that still carries its image, one failed without."""
    first = 5 * index
    dropped = kept_sample(first + 3).dropped(StageName.SELECT, Reason.TOO_FEW_ENTITIES, "0 of 2 detections")
    failed = kept_sample(first + 4).replace(image=None).failed(StageName.FETCH, Reason.TIMEOUT, retryable=True)
    return Slice(index, (*(kept_sample(first + i) for i in range(3)), dropped, failed))


def test_the_same_slice_gives_the_same_bytes(tmp_path, provenance):
    for name in ("once", "again"):
        write_shard(Store(str(tmp_path / name)), "shard", mixed_slice(), provenance)
    assert digests(tmp_path / "once") == digests(tmp_path / "again")


def test_a_shard_reads_back_as_it_was_written(tmp_path, provenance):
    store = Store(str(tmp_path))
    work = mixed_slice()
    manifest = write_shard(store, "shard", work, provenance)
    assert next(iter(manifests(store, "shard"))) == manifest
    assert manifest.counts == {"kept": 3, "dropped": 1, "failed": 1}
    assert manifest.reasons == {"select/too_few_entities": 1, "fetch/timeout": 1}
    expected = tuple(s if i < 3 else s.replace(image=None) for i, s in enumerate(work.samples))
    assert read_slice(store, manifest).samples == expected
    assert list(kept_samples(store)) == list(expected[:3])
    assert read_sample(store, kept_sample(1).key) == expected[1]


def test_a_shard_keeps_the_first_thumbnails_of_every_reason(tmp_path, provenance):
    lost = [
        Sample(row=row, thumbnail=b"jpeg").dropped(StageName.SCREEN, reason)
        for row, reason in enumerate([Reason.WHITE_BACKGROUND, Reason.ASPECT] * (THUMBNAILS_OF_A_REASON + 4))
    ]
    store = Store(str(tmp_path))
    manifest = write_shard(store, "shard", Slice(0, tuple(lost)), provenance)
    kept = [s.thumbnail for s in read_slice(store, manifest).samples]
    assert kept == [b"jpeg"] * (2 * THUMBNAILS_OF_A_REASON) + [None] * 8


def test_the_sidecar_knows_where_the_members_lie(tmp_path, provenance):
    store = Store(str(tmp_path))
    write_shard(store, "shard", mixed_slice(), provenance)
    data = (tmp_path / "shard-000000.tar").read_bytes()
    (table,) = iter_tables(store)
    for row in table.to_pylist():
        if row["outcome"] == "kept":
            assert data[row["image_offset"] :].startswith(kept_sample(row["row"]).image)
            text = data[row["json_offset"] : row["json_offset"] + row["json_size"]]
            assert json.loads(text)["key"] == row["key"]
        else:
            assert row["image_offset"] is None


def test_a_viewer_may_read_a_part_of_a_sidecar(tmp_path, provenance):
    lost = [Sample(row=row, thumbnail=b"jpeg").dropped(StageName.SCREEN, Reason.ASPECT) for row in range(1001)]
    write_shard(Store(str(tmp_path)), "shard", Slice(0, tuple(lost)), provenance)
    metadata = pq.read_metadata(tmp_path / "shard-000000.parquet")
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    assert [group.num_rows for group in groups] == [ROWS_PER_GROUP, 1]
    columns = [group.column(i) for group in groups for i in range(metadata.num_columns)]
    assert all(column.has_offset_index for column in columns)
    assert sum(column.path_in_schema == "thumbnail" for column in columns) == 2, "in no other column's way"


def test_the_index_beside_the_tar_says_where_every_member_lies(tmp_path, provenance):
    write_shard(Store(str(tmp_path)), "shard", mixed_slice(), provenance)
    index = json.loads((tmp_path / "shard-000000.json").read_text())
    path = tmp_path / "shard-000000.tar"
    with tarfile.open(path) as tar:
        assert {m.name: (m.offset_data, m.size) for m in tar} == {
            name: (place["offset"], place["length"]) for name, place in index["files"].items()
        }
    assert index["filesize"] == path.stat().st_size
    assert index["files"]["0000000001.jpg"].items() >= {"width": 48, "height": 32, "aspect": 1.5}.items()


def test_webshart_reads_the_members_by_the_index(tmp_path, provenance):
    webshart = pytest.importorskip("webshart", reason="webshart is not installed")
    for index in range(2):
        write_shard(Store(str(tmp_path)), "shard", mixed_slice(index), provenance)
    samples = list(kept_samples(Store(str(tmp_path))))
    dataset = webshart.discover_dataset(source=str(tmp_path))
    found = [dataset.open_shard(shard).read_file(2 * number) for shard in range(2) for number in range(3)]
    assert [bytes(data) for data in found] == [s.image for s in samples]


def test_stock_readers_read_the_tar(tmp_path, provenance):
    write_shard(Store(str(tmp_path)), "shard", mixed_slice(), provenance)
    path = tmp_path / "shard-000000.tar"
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == [kept_sample(i).key for i in range(3)]
    assert samples[0]["json"]["entities"][0]["tag"] == "mug"
    with tarfile.open(path) as tar:
        assert [(m.mtime, m.uid, m.gid, m.uname) for m in tar] == [(0, 0, 0, "")] * 6


def test_killed_at_any_step_of_the_commit_a_shard_is_there_whole_or_not_at_all(tmp_path, provenance):
    command = [sys.executable, "-m", "tests.shards.killed_writers", str(tmp_path)]
    steps = int(subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert steps > 12
    undisturbed = digests(tmp_path / str(steps + 1))
    assert len(undisturbed) == 4
    for fatal in range(1, steps + 1):
        out = tmp_path / str(fatal)
        store = Store(str(out))
        for manifest in manifests(store, "shard"):
            read_slice(store, manifest)
        store.clear_temporaries()
        if not present(store, "shard"):
            write_shard(store, "shard", mixed_slice(), provenance)
        assert digests(out) == undisturbed


def test_a_file_that_its_manifest_does_not_describe_is_refused_by_name(tmp_path, provenance):
    store = Store(str(tmp_path))
    manifest = write_shard(store, "shard", mixed_slice(), provenance)
    path = tmp_path / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ShardError, match=r"shard-000000\.tar"):
        read_slice(store, manifest)


def test_a_manifest_of_another_schema_version_is_refused(tmp_path, provenance):
    store = Store(str(tmp_path))
    write_shard(store, "shard", mixed_slice(), provenance)
    path = tmp_path / "shard-000000.manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(ShardError, match="99"):
        list(manifests(store, "shard"))


def test_a_tar_without_a_manifest_is_no_shard(tmp_path, provenance):
    store = Store(str(tmp_path))
    write_shard(store, "shard", mixed_slice(), provenance)
    (tmp_path / "shard-000000.manifest.json").unlink()
    assert list(manifests(store, "shard")) == []


FILLED_DISK = """
import resource, sys
sys.path.insert(0, {project!r})
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from subject_diffusion.errors import RunError
from datapipe.shards import Store, write_shard, Provenance
from tests.shards.test_commit import mixed_slice
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_shard(Store({out!r}), "shard", mixed_slice(), Provenance("r", "c", "i", {{}}))
except RunError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    script = FILLED_DISK.format(project=str(PROJECT), out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert "shard-000000.tar: File too large" in done.stdout
    assert list((tmp_path / "out").iterdir()) == []


def test_two_runs_do_not_write_one_folder(tmp_path):
    with Store(str(tmp_path)).lock(), pytest.raises(RunError, match="another run"), Store(str(tmp_path)).lock():
        pass


def test_an_object_store_holds_the_same_bytes(bucket, tmp_path, provenance):
    remote, local = Store(f"{bucket}/sdd"), Store(str(tmp_path))
    manifest = write_shard(remote, "shard", mixed_slice(), provenance)
    write_shard(local, "shard", mixed_slice(), provenance)
    for name in local.names():
        assert remote.read(name) == local.read(name)
    assert read_slice(remote, manifest) == read_slice(local, manifest)
    assert read_sample(remote, kept_sample(2).key) == read_sample(local, kept_sample(2).key)
    assert present(remote, "shard") == [0]


def test_an_object_store_that_refuses_is_one_line(bucket):
    with pytest.raises(RunError) as refused:
        Store("s3://no-such-bucket/sdd").put("a", b"")
    assert "\n" not in str(refused.value)
