"""Hugging Face datasets are read by the library `datasets`, from a folder or the hub; nothing of theirs is executed."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value

from datapipe.formats import WRITERS, Faults
from datapipe.schema import Slice
from datapipe.shards import Provenance, Store, write_shard
from datapipe.sources import InputRows, SourceSettings, open_source
from subject_diffusion.errors import SourceError
from tests.backends.hub_server import Hub, Repository
from tests.conftest import jpeg, kept_sample
from tests.toy import PROJECT

ROWS = [(f"a mug, {n}", jpeg(seed=n)) for n in range(5)]


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., InputRows]:
    def open_dataset(path: object, **settings: object) -> InputRows:
        wanted = SourceSettings.model_validate({"kind": "hf", "path": str(path), **settings})
        return open_source(wanted, str(tmp_path / "scratch"))

    return open_dataset


def dataset(rows: list[tuple[str, bytes]] = ROWS) -> Dataset:
    columns = {"text": [text for text, _ in rows], "picture": [{"bytes": data, "path": None} for _, data in rows]}
    return Dataset.from_dict(columns, Features({"text": Value("string"), "picture": Image()}))


def save_to_disk(folder: Path) -> None:
    dataset().save_to_disk(str(folder))


def splits_on_disk(folder: Path) -> None:
    DatasetDict({"test": dataset(ROWS[:1]), "train": dataset()}).save_to_disk(str(folder))


def parquet_repository(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    dataset().to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
    )


def image_folder(folder: Path) -> None:
    folder.mkdir()
    for number, (_, data) in enumerate(ROWS):
        (folder / f"{number}.jpg").write_bytes(data)
    names = [f'{number}.jpg,"{text}"' for number, (text, _) in enumerate(ROWS)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *names]))


@pytest.mark.parametrize("write", [save_to_disk, splits_on_disk, parquet_repository, image_folder])
def test_a_dataset_on_disk_gives_its_texts_and_images(opened, tmp_path, write):
    write(tmp_path / "set")
    rows = opened(tmp_path / "set")
    assert [(s.alt_text, s.image) for s in rows.read(0, rows.rows)] == ROWS
    assert rows.read(3, 5) == rows.read(0, 5)[3:]
    assert "a Hugging Face dataset, " in rows.described()[0]
    again = opened(tmp_path / "set")
    assert again.fingerprint == rows.fingerprint


def test_what_was_exported_for_the_hub_is_read_again(opened, tmp_path, provenance: Provenance):
    samples = [kept_sample(row) for row in range(3)]
    store = Store(str(tmp_path / "set"))
    write_shard(store, "shard", Slice(0, tuple(samples)), provenance)
    list(WRITERS["hf"](store, str(tmp_path / "hf"), Faults()))
    rows = opened(tmp_path / "hf")
    read = rows.read(0, rows.rows)
    assert [(s.url, s.alt_text, s.image) for s in read] == [(s.url, s.caption, s.image) for s in samples]


def test_a_table_of_urls_is_left_to_be_fetched(opened, tmp_path):
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"URL": ["http://x/a.jpg"], "TEXT": ["a"], "n": [1]}), tmp_path / "set" / "a.parquet")
    (sample,) = opened(tmp_path / "set").read(0, 1)
    assert (sample.url, sample.alt_text, sample.image, sample.verdict) == ("http://x/a.jpg", "a", None, None)


def test_a_table_without_types_gives_them_by_its_first_rows(opened, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.csv").write_text("url,text,n\nhttp://x/a.jpg,a,1\nhttp://x/b.jpg,b,2\n")
    assert [(s.url, s.alt_text) for s in opened(tmp_path / "set").read(0, 2)] == [
        ("http://x/a.jpg", "a"), ("http://x/b.jpg", "b")
    ]  # fmt: skip


def test_a_column_may_have_a_dot_in_its_own_name(opened, tmp_path):
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"img.png": [ROWS[0][1]], "en.text": ["a"]}), tmp_path / "set" / "a.parquet")
    (sample,) = opened(tmp_path / "set", image_column="img.png", alt_text_column="en.text").read(0, 1)
    assert (sample.alt_text, sample.image) == ("a", ROWS[0][1])


def empty_on_disk(folder: Path) -> None:
    dataset([]).save_to_disk(str(folder))


def empty_parquet(folder: Path) -> None:
    folder.mkdir()
    pq.write_table(pa.table({"url": pa.array([], pa.string())}), folder / "a.parquet")


def empty_csv(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.csv").write_text("url,text\n")


@pytest.mark.parametrize("write", [empty_on_disk, empty_parquet, empty_csv])
def test_a_dataset_without_rows_is_refused_in_one_line(opened, tmp_path, write):
    write(tmp_path / "set")
    with pytest.raises(SourceError, match=f"^input {tmp_path}/set: holds no rows; check [^\n]*$"):
        opened(tmp_path / "set")


def test_a_part_may_be_named_and_one_that_is_not_there_is_refused(opened, tmp_path):
    splits_on_disk(tmp_path / "set")
    assert opened(tmp_path / "set", split="test").rows == 1
    with pytest.raises(SourceError, match=r"no split dev, but test, train; set source\.split"):
        opened(tmp_path / "set", split="dev")
    parquet_repository(tmp_path / "repository")
    with pytest.raises(SourceError, match=r"Bad split: dev.* check source\.path"):
        opened(tmp_path / "repository", split="dev")
    with pytest.raises(SourceError, match="'other' not found"):
        opened(tmp_path / "repository", subset="other")


def test_an_image_that_is_a_file_outside_of_the_dataset_is_not_read(opened, tmp_path):
    (tmp_path / "secret.jpg").write_bytes(ROWS[0][1])
    paths = [str(tmp_path / "secret.jpg"), f"{tmp_path}/set/../secret.jpg", "http://127.0.0.1:9/a.jpg"]
    columns = {"text": ["a", "b", "c"], "image": [{"bytes": None, "path": path} for path in paths]}
    (tmp_path / "set").mkdir()
    data = Dataset.from_dict(columns, Features({"text": Value("string"), "image": Image(decode=False)}))
    pq.write_table(data.data.table, tmp_path / "set" / "a.parquet")
    samples = opened(tmp_path / "set").read(0, 3)
    assert [s.verdict.detail for s in samples if s.verdict] == ["the column image is empty"] * 3


def test_no_column_of_whatever_type_leads_to_a_file_or_a_bucket(opened, tmp_path):
    (tmp_path / "secret.jpg").write_bytes(ROWS[0][1])
    secret = str(tmp_path / "secret.jpg")
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "image_path": pa.array([secret, "s3://bucket/a.jpg"]),
        "url": pa.array(["s3://bucket/a.jpg", "gs://bucket/a.jpg"]),
        "undeclared": pa.array([{"bytes": secret.encode(), "path": None}, {"bytes": None, "path": secret}], image),
        "photo": pa.array([{"image": {"bytes": None, "path": path}} for path in (secret, "s3://b/a.jpg")]),
        "jpg": pa.array([secret.encode(), b"s3://bucket/a.jpg"]),
    }
    for name, column in columns.items():
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({name: column}), tmp_path / name / "a.parquet")
        rows = opened(tmp_path / name, **({"image_column": "photo.image"} if name == "photo" else {}))
        for sample in rows.read(0, 2):
            assert sample.image is None and sample.verdict is not None, name
            assert sample.verdict.detail.startswith("names a file or an object of a bucket"), name


def test_code_of_a_dataset_is_not_executed(opened, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(SourceError, match=f"input {tmp_path}/set: "):
        opened(tmp_path / "set")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["no such folder", "a/b/c"])
def test_what_is_no_dataset_is_refused_in_one_line(opened, path):
    with pytest.raises(SourceError, match="no folder, nor a name on the Hugging Face hub such as org/name"):
        opened(path)


HUB = """
import sys
from datapipe.sources import SourceSettings, open_source
from subject_diffusion.errors import SourceError
for path in ("org/tables", "org/folder", "org/none"):
    try:
        rows = open_source(SourceSettings(kind="hf", path=path, revision="v1"), sys.argv[1])
        print([(s.alt_text, len(s.image)) for s in rows.read(0, rows.rows)], rows.settings.revision)
    except SourceError as error:
        print(error)
"""
"""A program of its own, because where the hub is, is read when its client is imported."""


def test_datasets_of_the_hub_are_read_at_the_commit_of_their_revision_or_refused_in_one_line(tmp_path):
    parquet_repository(tmp_path / "tables")
    image_folder(tmp_path / "folder")
    commit = "a" * 40
    names = ("tables", "folder")
    repositories = {f"org/{n}": Repository({"main": "b" * 40, "v1": commit}, {commit: tmp_path / n}) for n in names}
    with Hub(repositories).served() as hub:
        # `datasets` would import torch, which takes longer than all of this.
        place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "USE_TORCH": "0"}
        command = [sys.executable, "-c", HUB, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | place, cwd=PROJECT)
    read = f"{[(text, len(data)) for text, data in ROWS]} {commit}"
    *found, refused = done.stdout.splitlines()
    assert found == [read, read], done.stderr
    assert refused.startswith("input org/none: ")


def test_a_glance_copies_the_first_rows_alone(tmp_path):
    save_to_disk(tmp_path / "set")
    wanted = SourceSettings(kind="hf", path=str(tmp_path / "set"))
    some = open_source(wanted, str(tmp_path / "scratch"), 2)
    assert [(s.alt_text, s.image) for s in some.read(0, some.rows)] == ROWS[:2]
    assert "2 rows: the first of a Hugging Face dataset, " in some.described()[0]
    assert open_source(wanted, str(tmp_path / "scratch")).rows == len(ROWS)


def test_a_row_that_was_copied_takes_no_memory(tmp_path, opened, monkeypatch):
    monkeypatch.setattr("datapipe.sources.hugging_face._GROUP_BYTES", 100_000)
    heavy = jpeg() + bytes(20_000)

    def peak(name: str, count: int) -> int:
        (tmp_path / name).mkdir()
        images = pa.array([{"bytes": heavy, "path": None}] * count, Image().pa_type)
        table = pa.table({"text": ["a"] * count, "image": images})
        pq.write_table(table, tmp_path / name / "a.parquet", row_group_size=20)
        tracemalloc.start()
        assert opened(tmp_path / name).rows == count
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak("warm", 40)
    # 240 images more, of 20 KB each.
    assert peak("large", 280) - peak("small", 40) < 1_000_000
