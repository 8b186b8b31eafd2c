"""What lies on a shared disk may be others' work: it is not followed, not run, and not believed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datapipe.schema import Slice
from datapipe.shards import Provenance, Store, write_shard
from subject_diffusion.errors import RunError, ShardError
from tests.conftest import kept_sample
from train.stream.cache import ShardCache, ShardFile
from train.stream.dataset import Stream
from train.stream.shard_index import Index
from train.trainer.checkpoint import CheckpointError, load_checkpoint
from train.trainer.run_folder import CHECKPOINT_RECORD


class Malicious:
    """Leaves a file where it was unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def remote_shard(content: bytes) -> ShardFile:
    fsspec.filesystem("memory").pipe_file("/bucket/a.tar", content)
    return ShardFile("memory://bucket/a.tar", len(content), hashlib.sha256(content).hexdigest())


def test_a_cache_into_which_anybody_may_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(RunError, match="anybody may write"):
        ShardCache(tmp_path, 1 << 20)


def test_another_users_cache_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 12_345)
    if owner == 0:
        os.chown(tmp_path, 54_321, -1)
    with pytest.raises(RunError, match="another user's"):
        ShardCache(tmp_path, 1 << 20)


def test_a_new_cache_is_its_users_alone(tmp_path: Path) -> None:
    ShardCache(tmp_path / "new", 1 << 20)
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


def test_a_link_in_the_place_of_a_download_is_not_followed(tmp_path: Path) -> None:
    cache, shard = ShardCache(tmp_path / "cache", 1 << 20), remote_shard(b"the shard")
    os.close(cache.open(shard))
    (cached,) = (tmp_path / "cache").glob("*.tar")
    (tmp_path / "other").write_bytes(b"not that shard")
    cached.unlink()
    cached.symlink_to(tmp_path / "other")
    with pytest.raises(ShardError):
        cache.open(shard)


def test_a_download_with_another_hash_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.stream.cache.ATTEMPTS", 1)
    shard = remote_shard(b"the shard")
    fsspec.filesystem("memory").pipe_file("/bucket/a.tar", b"the sharp")
    with pytest.raises(ShardError, match="SHA-256"):
        ShardCache(tmp_path, 1 << 20).open(shard)
    assert not list(tmp_path.glob("*.tar"))


def test_a_local_shard_that_changed_is_hashed_again(tmp_path: Path, provenance: Provenance) -> None:
    store = Store(str(tmp_path / "set"))
    write_shard(store, "shard", Slice(0, (kept_sample(0), kept_sample(1))), provenance)
    (batch,) = Stream(store.root, 2, cache=tmp_path / "cache", mode="evaluate")
    assert len(batch["key"]) == 2
    tar = tmp_path / "set" / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ShardError, match="SHA-256"):
        list(Stream(store.root, 2, cache=tmp_path / "cache", mode="evaluate"))


PLACES: dict[str, tuple[list[float], list[float]]] = {
    "before the tar": ([-4096], [2048]),
    "behind the tar": ([1 << 40], [2048]),
    "longer than the tar": ([0], [1 << 62]),
    "beyond all numbers": ([1 << 62], [1 << 62]),
    "of no length": ([0], [0]),
    "of half a byte": ([0.5], [2048.0]),
}


@pytest.mark.parametrize("case", [*PLACES, "no parquet", "other columns"])
def test_an_index_beside_a_tar_that_lies_is_made_again(tmp_path: Path, case: str) -> None:
    tar = tmp_path / "set" / "a.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as file:
        info = tarfile.TarInfo("0.txt")
        info.size = 5
        file.addfile(info, io.BytesIO(b"a cat"))
    marks = {"size": str(tar.stat().st_size), "key_rule": "auto", "found_key_rule": "first_dot"}
    offsets, sizes = PLACES.get(case, ([0], [1024]))
    columns = {"offset": offsets, "size": sizes} if case in PLACES else {"other": [0]}
    index = tmp_path / "set" / "a.tar.index.parquet"
    pq.write_table(pa.table(columns, metadata=marks), index)
    if case == "no parquet":
        index.write_bytes(b"PAR1 and no more")
    (batch,) = Stream(str(tar.parent), 1, cache=tmp_path / "cache")
    assert bytes(batch["members"][0]["txt"]) == b"a cat"


@pytest.mark.parametrize("case", sorted(set(PLACES) - {"of half a byte"}))
def test_a_sidecar_that_lies_about_its_tar_is_refused(tmp_path: Path, provenance: Provenance, case: str) -> None:
    store = Store(str(tmp_path / "set"))
    write_shard(store, "shard", Slice(0, (kept_sample(0),)), provenance)
    sidecar = tmp_path / "set" / "shard-000000.parquet"
    table = pq.ParquetFile(sidecar).read()
    (offset,), (size,) = PLACES[case]
    for name, value in (("image_offset", offset + 512), ("json_offset", offset), ("json_size", size)):
        column = table.schema.get_field_index(name)
        table = table.set_column(column, table.schema.field(name), pa.array([value], pa.int64()))
    pq.write_table(table, sidecar)
    with pytest.raises(ShardError, match="where its tar has none"):
        Stream(store.root, 1, cache=tmp_path / "cache")


def test_an_index_of_pickled_objects_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "shards.json").write_text("[]")
    for name in ("first", "offsets", "sizes"):
        np.save(tmp_path / f"{name}.npy", np.array([Malicious(tmp_path / "run")], dtype=object), allow_pickle=True)
    with pytest.raises(ShardError, match="no index"):
        Index.load(tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_pickle_among_the_members_of_a_sample_stays_bytes(tmp_path: Path) -> None:
    import pickle

    content = pickle.dumps(Malicious(tmp_path / "run"))
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("0.pkl", "0.pyd", "0.pth", "0.npy"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (batch,) = Stream(str(tmp_path / "set"), 1, cache=tmp_path / "cache")
    assert {bytes(value) for value in batch["members"][0].values()} == {content}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("files", [{"../secret.safetensors": {"bytes": 1, "sha256": ""}}, ["a"], {"a": 5}, None])
def test_a_checkpoint_names_files_of_its_own_folder(tmp_path: Path, files: object) -> None:
    (tmp_path / "step").mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    (tmp_path / "step" / CHECKPOINT_RECORD).write_text(json.dumps({"step": 1, "files": files}))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "step")
