"""A user's mistake is answered with one line that says what, where and what to do, with exit code 2, and leaves
nothing behind."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import jpeg, kept_sample
from tests.toy import TOY_RECIPE, write_recipe


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "urls.parquet"
    pq.write_table(pa.table({"url": ["http://127.0.0.1:9/a.jpg"], "caption": ["a"]}), path)
    return path


def write_empty(path: Path) -> str:
    pq.write_table(pa.table({"url": pa.array([], pa.string())}), path)
    return str(path)


def write_no_url(path: Path) -> str:
    pq.write_table(pa.table({"image_uri": ["x"], "text": ["y"]}), path)
    return str(path)


def write_no_parquet(path: Path) -> str:
    path.write_bytes(b"not a parquet file at all")
    return str(path)


@pytest.mark.parametrize(
    ("write", "named"),
    [(write_empty, "no rows"), (write_no_url, "image_uri"), (write_no_parquet, "parquet"), (str, "table.parquet")],
    ids=["empty table", "missing column", "no parquet", "missing file"],
)
def test_an_input_that_cannot_be_used(refused, tmp_path, write, named):
    out = tmp_path / "out"
    source = write(tmp_path / "table.parquet")
    error = refused("dataset", "--recipe", str(TOY_RECIPE), "--input", source, "--out", str(out))
    assert named in error
    assert not list(out.glob("*.tar"))


def test_a_recipe_that_cannot_be_used(refused, tmp_path, table):
    common = ["--input", str(table), "--out", str(tmp_path / "out")]
    assert "did you mean ground.floor?" in refused(
        "dataset", "--recipe", str(write_recipe(tmp_path / "r.yaml", ground={"flor": 0.1})), *common
    )
    assert "select.nms_iou" in refused("dataset", "--set", "select.nms_iou=3", *common)
    assert "no such file" in refused("dataset", "--recipe", "nowhere.yaml", *common)


def test_weights_that_are_not_there(refused, tmp_path, table):
    for setting in ("caption.model", "ground.model", "segment.model"):
        error = refused(
            "dataset",
            "--input",
            str(table),
            "--out",
            str(tmp_path / "out"),
            "--set",
            f"{setting}=weights/of/none",
        )
        assert f"{setting} weights/of/none: no such folder" in error
    tagger = ["--set", "tag.backend=spacy", "--set", "tag.model=xx_none"]
    assert "xx_none" in refused("dataset", "--input", str(table), "--out", str(tmp_path / "out"), *tagger)


def test_no_route_to_the_cluster(refused, tmp_path, table):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    error = refused(
        "dataset", "--input", str(table), "--out", str(tmp_path / "out"), "--ray-address", f"127.0.0.1:{port}"
    )
    assert f"RAY_ADDRESS=127.0.0.1:{port}" in error


def test_a_port_that_is_taken(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", toyworld={"images": 40})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refused("dataset", "--recipe", str(recipe), "--set", f"toyworld.port={port}")
    assert f"port {port} is taken" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(refused, tmp_path, table):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused("dataset", "--input", str(table), "--out", str(tmp_path / "out"))


def test_a_folder_that_cannot_be_made(refused, tmp_path, table):
    (tmp_path / "file").write_text("")
    assert "file" in refused("dataset", "--input", str(table), "--out", str(tmp_path / "file" / "out"))


def test_no_input_at_all(refused, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", toyworld=None)
    assert "INPUT" in refused("dataset", "--recipe", str(recipe), "--out", str(tmp_path / "out"))


def test_inspecting_what_is_no_dataset(refused, tmp_path):
    assert "no such folder" in refused("inspect", str(tmp_path / "none"))
    assert "no shards here" in refused("inspect", str(tmp_path))
    assert not (tmp_path / "none").exists()


@pytest.fixture
def dataset(tmp_path, provenance) -> str:
    from datapipe.schema import Reason, Slice, StageName
    from datapipe.shards import Store, write_shard

    dropped = kept_sample(1).replace(image=jpeg()).dropped(StageName.SELECT, Reason.TOO_FEW_ENTITIES)
    out = str(tmp_path / "set")
    write_shard(Store(out), "shard", Slice(0, (kept_sample(0), dropped)), provenance)
    write_shard(Store(out), "shard", Slice(1, (kept_sample(2), kept_sample(3))), provenance)
    return out


def test_inspect_counts_and_draws(sdd, dataset, tmp_path):
    code, printed, _ = sdd("inspect", dataset)
    assert code == 0
    for shown in ("too_few_entities", "kept", "mug", "entities per image"):
        assert shown in printed
    code, printed, _ = sdd("inspect", dataset, "--shard", "0")
    assert code == 0
    picture = tmp_path / "out.png"
    key = kept_sample(2).key
    code, printed, _ = sdd("inspect", dataset, "--shard", "1", "--sample", key, "--save", str(picture))
    assert code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_inspect_names_what_it_cannot_show(refused, dataset, tmp_path):
    save = ["--save", str(tmp_path / "out.png")]
    assert "no shard 7" in refused("inspect", dataset, "--shard", "7")
    assert "no sample" in refused("inspect", dataset, "--sample", kept_sample(9).key, *save)
    assert "is no key" in refused("inspect", dataset, "--sample", "mug", *save)
    assert "too_few_entities" in refused("inspect", dataset, "--sample", kept_sample(1).key, *save)


def test_verify_tells_by_its_exit_code_and_removes_only_temporary_files(sdd, dataset, tmp_path):
    code, printed, _ = sdd("verify", dataset)
    assert (code, printed) == (0, f"{dataset}: 2 shards, all well\n")
    folder = Path(dataset)
    (folder / ".shard-000002.tar.tmp-17-0123abcd").write_bytes(b"half")
    (folder / "shard-000001.tar").write_bytes(b"")
    before = {p.name for p in folder.iterdir()}
    code, printed, _ = sdd("verify", dataset)
    assert code == 1
    assert ".shard-000002.tar.tmp-17-0123abcd: is temporary" in printed
    code, printed, _ = sdd("verify", dataset, "--repair")
    assert code == 1
    assert "shard-000001.tar: " in printed
    assert before - {p.name for p in folder.iterdir()} == {".shard-000002.tar.tmp-17-0123abcd"}


def test_verifying_what_is_no_dataset(refused, tmp_path):
    assert "no such folder" in refused("verify", str(tmp_path / "none"))
    assert "no shards here" in refused("verify", str(tmp_path))


def test_help_names_every_option(sdd):
    code, printed, _ = sdd("dataset", "--help")
    assert code == 0
    for option in ("--recipe", "--input", "--out", "--ray-address", "--set"):
        assert option in printed
