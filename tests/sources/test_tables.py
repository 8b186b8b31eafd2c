"""parquet, arrow and JSON tables: captions in lists, columns, images inside, paths, folders of several files."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datapipe.schema import Reason, Sample
from datapipe.sources import json_stream, parquet_tables
from tests.sources.inputs import opened, refusal, whole, write_delimited, write_jsonl, write_parquet, write_tar

URL = "http://x.example/{}.jpg"


def jpeg(seed: int) -> bytes:
    sink = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(sink, "JPEG")
    return sink.getvalue()


def facts(samples: list[Sample]) -> list[tuple[str, str]]:
    return [(sample.url, sample.alt_text) for sample in samples]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_parquet(path, rows) if path.suffix == ".parquet" else write_jsonl(path, rows)


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl"])
def test_captions_in_lists_or_by_language_are_texts(tmp_path: Path, name: str) -> None:
    lists = write(tmp_path / name, [{"url": [URL], "caption": c} for c in (["a cat", "small"], ["", "b"], [], None)])
    source = opened(lists, tmp_path / "scratch")
    assert facts(whole(source)) == [(URL, "a cat"), (URL, "b"), (URL, ""), (URL, "")]
    assert "caption `caption` (list: first)" in source.described()[0]
    assert [c for _, c in facts(whole(opened(lists, tmp_path / "scratch", alt_text_choice=1)))] == [
        "small",
        "b",
        "",
        "",
    ]
    named = write(tmp_path / name, [{"url": URL, "caption": {"en": "a dog", "de": "ein Hund"}}])
    assert facts(whole(opened(named, tmp_path / "scratch"))) == [(URL, "a dog")]
    assert facts(whole(opened(named, tmp_path / "scratch", alt_text_choice="de"))) == [(URL, "ein Hund")]
    assert facts(whole(opened(named, tmp_path / "scratch", alt_text_choice="fr"))) == [(URL, "a dog")]
    wrapped = write(tmp_path / name, [{"url": URL, "captions": [{"raw": "a cup", "id": 7}]}])
    assert facts(whole(opened(wrapped, tmp_path / "scratch"))) == [(URL, "a cup")]


def test_arrow_maps_of_captions_are_texts(tmp_path: Path) -> None:
    captions = pa.array([[("en", "a dog"), ("de", "ein Hund")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"url": [URL], "caption": captions}), tmp_path / "t.parquet")
    assert facts(whole(opened(tmp_path / "t.parquet", tmp_path))) == [(URL, "a dog")]
    assert facts(whole(opened(tmp_path / "t.parquet", tmp_path, alt_text_choice="de"))) == [(URL, "ein Hund")]


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl"])
def test_columns_inside_structs_and_with_dots_can_be_named_as_the_refusal_says(tmp_path: Path, name: str) -> None:
    inside = write(tmp_path / name, [{"photo": {"url": URL, "caption": "a"}, "id": 1}])
    assert "set source.url_column=photo.url" in refusal(inside, tmp_path / "scratch")
    assert facts(whole(opened(inside, tmp_path / "scratch", url_column="photo.url"))) == [(URL, "a")]
    dotted = write(tmp_path / name, [{"photo.url": URL, "photo.caption": "a"}])
    assert "set source.url_column=photo.url" in refusal(dotted, tmp_path / "scratch")
    assert facts(whole(opened(dotted, tmp_path / "scratch", url_column="photo.url"))) == [(URL, "a")]


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl"])
def test_columns_that_differ_in_case_alone_are_asked_for(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"url": "", "URL": URL, "TEXT": "y"}])
    assert "has both url and URL; set source.url_column=url, or =URL" in refusal(path, tmp_path / "scratch")
    assert facts(whole(opened(path, tmp_path / "scratch", url_column="URL"))) == [(URL, "y")]


def test_a_doubled_column_matters_only_where_it_is_used(tmp_path: Path) -> None:
    arrays = [pa.array([URL]), pa.array(["x"]), pa.array([1]), pa.array([2])]
    pq.write_table(pa.Table.from_arrays(arrays, ["url", "caption", "w", "w"]), tmp_path / "t.parquet")
    assert facts(whole(opened(tmp_path / "t.parquet", tmp_path))) == [(URL, "x")]
    pq.write_table(pa.Table.from_arrays(arrays[:2] * 2, ["url", "caption"] * 2), tmp_path / "t.parquet")
    assert "is there twice" in refusal(tmp_path / "t.parquet", tmp_path)


def test_parquet_files_of_odd_types_among_others(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    tables = [
        pa.table({"URL": pa.array([URL], pa.large_string()), "TEXT": ["a"]}),
        pa.table({"url": pa.array([URL, None]).dictionary_encode(), "punsafe": ["0.5", "x"]}),
        pa.table({"caption": ["c"], "Image_URL": pa.array([URL.encode()])}),
        pa.table({"url": pa.nulls(2), "text": pa.nulls(2)}),
        pa.table({"url": [12345], "text": [1.5]}),
        pa.table({"url": pa.array([], pa.string())}),
    ]
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"{number}.parquet")
    (folder / "_SUCCESS").touch()
    (folder / ".0.parquet.crc").write_bytes(b"x")
    samples = whole(opened(folder, tmp_path))
    assert facts(samples) == [(URL, "a"), (URL, ""), ("", ""), (URL, "c"), ("", ""), ("", ""), ("12345", "1.5")]
    assert samples[1].scores == (("punsafe", 0.5),)


def test_a_damaged_parquet_among_others_is_named_and_costs_its_own_rows(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        write_parquet(folder / f"{number}.parquet", [{"url": URL, "caption": str(number)}])
    (folder / "1.parquet").write_bytes(b"PAR1 and nothing more")
    (folder / "4.parquet").touch()
    write_parquet(folder / "5.parquet", [{"id": 1}, {"id": 2}])
    source = opened(folder, tmp_path)
    assert [s.alt_text for s in whole(source)] == ["0", "", "2", "3", "", "", ""]
    verdicts = [(s.row, s.verdict.reason, s.verdict.detail) for s in whole(source) if s.verdict]
    assert [row for row, *_ in verdicts] == [1, 4, 5, 6], "the footer of 5.parquet tells of two rows"
    assert all(reason is Reason.UNREADABLE for _, reason, _ in verdicts)
    assert [detail.split(":")[0] for *_, detail in verdicts] == ["1.parquet", "4.parquet", "5.parquet", "5.parquet"]
    assert all(name in "\n".join(source.described()) for name in ("1.parquet", "4.parquet", "5.parquet"))
    assert "1.parquet: not a parquet file" in refusal(folder, tmp_path, strict=True)


def test_compressed_parquet_says_so(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", [{"url": URL}])
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert "decompress it" in refusal(path, tmp_path)


@pytest.mark.parametrize("streamed", [False, True])
def test_images_inside_parquet_are_not_fetched_again(
    tmp_path: Path, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if streamed:
        monkeypatch.setattr(parquet_tables, "CACHED_GROUP_BYTES", 0)
        monkeypatch.setattr(parquet_tables, "BATCH_BYTES", 2000)
    images = [jpeg(i) for i in range(12)]
    (tmp_path / "beside.jpg").write_bytes(b"beside")
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": data, "path": None}, "text": f"t{i}"} for i, data in enumerate(images)
    ]
    rows += [{"image": {"bytes": None, "path": "beside.jpg"}, "text": "path"}, {"image": None, "text": "none"}]
    source = opened(write_parquet(tmp_path / "hf.parquet", rows), tmp_path)
    *read, beside, none = whole(source)
    assert [(s.image, s.alt_text) for s in read] == [(data, f"t{i}") for i, data in enumerate(images)]
    assert source.read(5, 7)[1].image == images[6]
    assert (beside.image, beside.url) == (b"beside", "beside.jpg")
    assert none.verdict is not None and "image is empty" in none.verdict.detail
    assert "image column `image`, caption `text`" in source.described()[0]


def test_img2datasets_parquet_keeps_images_and_what_failed(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    beside = {"error_message": None, "status": "success"}
    rows: list[dict[str, Any]] = [
        {"key": "0", "jpg": jpeg(0), "txt": "a", "url": URL, "caption": "a", **beside},
        {"key": "1", "jpg": None, "txt": None, "url": URL, "caption": "b", "status": "failed_to_download",
         "error_message": "HTTP Error 404: Not Found"},
    ]  # fmt: skip
    write_parquet(folder / "00000.parquet", rows)
    (folder / "00000_stats.json").write_text(json.dumps({"count": 2}))
    good, failed = whole(opened(folder, tmp_path))
    assert (good.image, good.url, good.alt_text) == (jpeg(0), URL, "a")
    assert failed.image is None and failed.verdict is not None and failed.alt_text == "b"
    assert failed.verdict.detail == "img2dataset: failed_to_download HTTP Error 404: Not Found"


def test_img2datasets_files_are_read_as_they_lie_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = []
    for number in range(6):
        shard, key = out / f"{number // 3:05d}", f"{number:09d}"
        status = "success" if number != 3 else "failed_to_resize"
        rows.append({"url": URL.format(number), "caption": f"cap {number}", "key": key, "status": status})
        if status == "success":
            shard.mkdir(parents=True, exist_ok=True)
            (shard / f"{key}.webp").write_bytes(f"image {number}".encode())
            (shard / f"{key}.txt").write_text(f"cap {number}")
            (shard / f"{key}.json").write_text(json.dumps(rows[-1]))
    for shard_number in range(2):
        write_parquet(out / f"{shard_number:05d}.parquet", rows[3 * shard_number : 3 * shard_number + 3])
        (out / f"{shard_number:05d}_stats.json").write_text("{}")
    samples = whole(opened(out, tmp_path))
    assert facts(samples) == [(URL.format(i), f"cap {i}") for i in range(6)]
    assert [s.image for s in samples if s.row != 3] == [f"image {i}".encode() for i in range(6) if i != 3]
    assert samples[3].verdict is not None and "failed_to_resize" in samples[3].verdict.detail


@pytest.mark.parametrize("table", ["t.csv", "t.tsv", "t.jsonl", "t.parquet"])
def test_tables_of_local_paths_are_read_relative_to_the_table(tmp_path: Path, table: str) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "1.jpg").write_bytes(b"one")
    (tmp_path / "elsewhere.jpg").write_bytes(b"two")
    places = ["sub/1.jpg", str(tmp_path / "elsewhere.jpg"), "sub\\1.jpg", "gone.jpg", URL]
    path = tmp_path / "in" / table
    if path.suffix in (".csv", ".tsv"):
        lines = ["filepath\ttitle", *(f"{place}\tt" for place in places)]  # open_clip's, with tabs whatever its name
        path.write_text("\n".join(lines))
    else:
        write(path, [{"filepath": place, "title": "t"} for place in places])
    one, two, windows, gone, web = whole(opened(path, tmp_path / "scratch"))
    assert (one.image, one.url, one.alt_text) == (b"one", "sub/1.jpg", "t")
    assert (two.image, windows.image) == (b"two", b"one")
    assert gone.verdict is not None and gone.verdict.reason is Reason.UNREADABLE and "gone.jpg" in gone.verdict.detail
    assert (web.url, web.image, web.verdict) == (URL, None, None)


def test_a_table_none_of_whose_paths_exist_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"file_name": f"{i}.jpg"} for i in range(300)])
    message = refusal(path, tmp_path / "scratch")
    assert "none of its first 100 images can be read (0.jpg: FileNotFoundError)" in message


@pytest.mark.parametrize("metadata", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_image_folders_with_a_metadata_table(tmp_path: Path, metadata: str) -> None:
    folder = tmp_path / "in"
    rows = [{"file_name": f"{i}.jpg", "text": f"text, {i}"} for i in range(5)]
    for split in ("test", "train"):
        (folder / split).mkdir(parents=True)
        for number in range(5):
            (folder / split / f"{number}.jpg").write_bytes(f"{split} {number}".encode())
        if metadata.endswith(".csv"):
            lines = [f'{row["file_name"]},"{row["text"]}"' for row in rows]
            (folder / split / metadata).write_text("\n".join(["file_name,text", *lines]))
        else:
            write(folder / split / metadata, rows)
    (folder / "train" / "more.jpg").write_bytes(b"more")
    source = opened(folder, tmp_path / "scratch")
    assert "note: 1 image that the table does not name left out; first: train/more.jpg" in source.described()
    samples = whole(source)
    assert [s.image for s in samples] == [f"{split} {i}".encode() for split in ("test", "train") for i in range(5)]
    assert [s.url for s in samples] == [f"{split}/{i}.jpg" for split in ("test", "train") for i in range(5)]
    assert [s.alt_text for s in samples] == [f"text, {i}" for i in range(5)] * 2


@pytest.mark.parametrize("split", [False, True])
def test_datasets_on_disk_are_read_in_place(tmp_path: Path, split: bool) -> None:
    images = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(7)]
    rows = datasets.Dataset.from_dict({"image": images, "text": [f"t{i}" for i in range(7)], "label": [3] * 7})
    rows = rows.cast_column("image", datasets.Image())
    saved = datasets.DatasetDict({"train": rows}) if split else rows
    saved.save_to_disk(str(tmp_path / "in"))
    source = opened(tmp_path / "in", tmp_path / "scratch")
    samples = whole(source)
    assert [s.alt_text for s in samples] == [f"t{i}" for i in range(7)]
    assert [s.image for s in samples] == [jpeg(i) for i in range(7)]
    assert sum(p.stat().st_size for p in (tmp_path / "scratch" / "input").iterdir()) < 20_000, "no copies of images"


def test_arrow_files_of_several_batches_and_truncated_ones(tmp_path: Path) -> None:
    table = pa.table({"image": [jpeg(i) for i in range(9)], "url": [URL.format(i) for i in range(9)]})
    path = tmp_path / "t.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    samples = whole(opened(path, tmp_path / "scratch"))
    assert [(s.image, s.url) for s in samples] == [(jpeg(i), URL.format(i)) for i in range(9)]
    (tmp_path / "t.arrow.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert [s.image for s in whole(opened(tmp_path / "t.arrow.gz", tmp_path / "scratch"))] == [s.image for s in samples]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    *good, lost = whole(opened(path, tmp_path / "scratch"))
    assert [s.image for s in good] == [jpeg(i) for i in range(len(good))] and len(good) > 1
    assert lost.verdict is not None and "not a whole arrow file" in lost.verdict.detail
    pa.feather.write_feather(table, str(tmp_path / "t.feather"), compression="zstd")
    assert "save it as parquet" in refusal(tmp_path / "t.feather", tmp_path / "scratch")


@pytest.mark.parametrize("chunk", [40, 1 << 20])
def test_objects_that_wrap_a_list_are_read(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.json"
    rows = [{"url": URL.format(i), "caption": f"c{i}"} for i in range(5)]
    path.write_text(json.dumps({"count": 5, "data": rows, "info": {"n": [1, 2]}, "more": None}))
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    assert facts(whole(opened(path, tmp_path / "scratch"))) == [(URL.format(i), f"c{i}") for i in range(5)]


def test_cocos_captions_are_joined_to_their_images(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    content = {
        "info": {"year": 2014},
        "licenses": [{"url": "http://creativecommons.example/by", "id": 1}],
        "images": [{"id": i, "coco_url": URL.format(i), "file_name": f"{i}.jpg"} for i in range(3)],
        "annotations": [
            {"image_id": 1, "id": 7, "caption": "one"},
            {"image_id": 0, "id": 8, "caption": "zero"},
            {"image_id": 1, "id": 9, "caption": "another"},
        ],
    }
    path.write_text(json.dumps(content))
    expected = [(URL.format(0), "zero"), (URL.format(1), "one"), (URL.format(2), "")]
    assert facts(whole(opened(path, tmp_path / "scratch"))) == expected
    path.write_text(json.dumps(content)[:-30])
    assert "captions.json: not valid JSON within annotations" in refusal(path, tmp_path / "scratch")


def test_every_record_is_read_by_its_own_keys(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"url": URL, "text": "a"},
        {"image_url": URL, "caption": "b"},
        {"URL": URL, "TEXT": "c"},
    ]
    rows += [{"url": URL}] * 2000 + [{"url": "", "URL": URL}, {"url": URL, "caption": "late"}]
    samples = whole(opened(write_jsonl(tmp_path / "t.jsonl", rows), tmp_path / "scratch"))
    assert samples[-2].verdict is not None and "has both url and URL" in samples[-2].verdict.detail
    assert facts(samples)[:3] == [(URL, "a"), (URL, "b"), (URL, "c")]
    assert facts(samples)[-1] == (URL, "late")


def test_a_broken_json_line_costs_itself_and_a_torn_array_its_rest(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f'\ufeff{{"url": "{URL}"}}\n{{"url": "half\n{{"url": "{URL}", "text": "c"}}\n{{"ur')
    samples = whole(opened(path, tmp_path / "scratch"))
    assert [(s.alt_text, s.verdict is None) for s in samples] == [("", True), ("", False), ("c", True), ("", False)]
    path = tmp_path / "t.json"
    path.write_text(f'[{{"url": "{URL}"}}, {{"url" "{URL}"}}, {{"url": "{URL}"}}]')
    good, rest = whole(opened(path, tmp_path / "scratch"))
    assert good.url == URL and rest.verdict is not None and "no row after it can be found" in rest.verdict.detail


@pytest.mark.parametrize("suffix", [".gz", ""])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.json"])
def test_compressed_tables_are_read_whatever_their_name(tmp_path: Path, name: str, suffix: str) -> None:
    delimiter = "\t" if name == "t.tsv" else ","
    text = f"url{delimiter}caption\n{URL}{delimiter}a\n" if "sv" in name else json.dumps([{"url": URL, "caption": "a"}])
    (tmp_path / (name + suffix)).write_bytes(gzip.compress(text.encode()))
    assert facts(whole(opened(tmp_path / (name + suffix), tmp_path / "scratch"))) == [(URL, "a")]


def test_tables_in_partition_folders_with_a_logo_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for part in range(2):
        (folder / f"part={part}").mkdir(parents=True)
        write_parquet(folder / f"part={part}" / "a.parquet", [{"url": URL.format(part), "caption": "a"}])
    (folder / "assets").mkdir()
    (folder / "assets" / "logo.png").write_bytes(jpeg(0))
    (folder / "README.md").write_text("# Data")
    (folder / ".hidden").mkdir()
    shutil.copy(folder / "part=0" / "a.parquet", folder / ".hidden" / "b.parquet")
    source = opened(folder, tmp_path / "scratch")
    assert facts(whole(source)) == [(URL.format(0), "a"), (URL.format(1), "a")]
    assert "1 image beside the tables left out" in "\n".join(source.described())


def test_several_formats_in_a_folder_are_told_apart_by_the_glob_that_the_refusal_names(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    write_parquet(folder / "sub" / "a.parquet", [{"url": URL}])
    (folder / "b.csv").write_text(f"url\n{URL}\n")
    message = refusal(folder, tmp_path / "scratch")
    glob = message.split("'")[1]
    assert whole(opened(glob, tmp_path / "scratch"))[0].url == URL


def test_a_photo_folder_with_texts_and_json_of_the_images_names_is_no_table(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
        (folder / f"{number}.json").write_text(json.dumps({"camera": "x"}))
        (folder / f"{number}.txt").write_text(f"text {number}")
    assert [s.alt_text for s in whole(opened(folder, tmp_path / "scratch"))] == [f"text {i}" for i in range(5)]


def _example_class() -> Any:
    """TensorFlow's Example, by protobuf itself."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tf", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto
    for name, kind in [
        ("BytesList", field.TYPE_BYTES),
        ("FloatList", field.TYPE_FLOAT),
        ("Int64List", field.TYPE_INT64),
    ]:
        file.message_type.add(name=name).field.add(name="value", number=1, label=field.LABEL_REPEATED, type=kind)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("bytes_list", "float_list", "int64_list"), 1):
        kind_name = "." + "tf." + name.title().replace("_", "")
        feature.field.add(
            name=name, number=number, label=1, type=field.TYPE_MESSAGE, type_name=kind_name, oneof_index=0
        )
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=1, type=field.TYPE_STRING)
    entry.field.add(name="value", number=2, label=1, type=field.TYPE_MESSAGE, type_name=".tf.Feature")
    features.field.add(
        name="feature", number=1, label=3, type=field.TYPE_MESSAGE, type_name=".tf.Features.FeatureEntry"
    )
    example = file.message_type.add(name="Example")
    example.field.add(name="features", number=1, label=1, type=field.TYPE_MESSAGE, type_name=".tf.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))


def test_img2datasets_tfrecords_are_read_in_place(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    kind = _example_class()
    records = []
    for number in range(3):
        example = kind()
        feature = example.features.feature
        texts: dict[str, Any] = {
            "key": str(number),
            "jpg": jpeg(number),
            "url": URL.format(number),
            "caption": f"c{number} ☕",
            "empty": "",
        }
        for name, value in texts.items():
            feature[name].bytes_list.value.append(value if isinstance(value, bytes) else value.encode())
        feature["punsafe"].float_list.value.append(0.25)
        feature["width"].int64_list.value.append(-7)
        data = example.SerializeToString()
        records.append(struct.pack("<Q", len(data)) + b"\0" * 4 + data + b"\0" * 4)
    (folder / "00000.tfrecord").write_bytes(b"".join(records))
    write_parquet(folder / "00000.parquet", [{"url": URL, "key": "0", "status": "success"}])
    samples = whole(opened(folder, tmp_path / "scratch"))
    assert facts(samples) == [(URL.format(i), f"c{i} ☕") for i in range(3)]
    assert [s.image for s in samples] == [jpeg(i) for i in range(3)]
    assert samples[0].scores == (("punsafe", 0.25),)
    bad = struct.pack("<Q", 4) + b"\0" * 4 + b"\x0a\xff\xff\xff" + b"\0" * 4
    (folder / "00000.tfrecord").write_bytes(records[0] + bad + records[1][:-9])
    good, odd, torn = whole(opened(folder, tmp_path / "scratch"))
    assert good.image == jpeg(0)
    assert odd.verdict is not None and "record 1 is no tf.train.Example" in odd.verdict.detail
    assert torn.verdict is not None and "after 2 records" in torn.verdict.detail


def test_what_was_recognized_is_said(tmp_path: Path) -> None:
    row = {"URL": URL, "TEXT": "a", "LICENSE": "CC0", "punsafe": 0.1, **{f"c{i}": i for i in range(37)}}
    source = opened(write_parquet(tmp_path / "t.parquet", [row] * 2000), tmp_path)
    recognized = (
        "1 parquet file, URL column `URL`, caption `TEXT`, license `LICENSE`, punsafe `punsafe`, 37 columns ignored"
    )
    assert source.described() == [f"input {tmp_path}/t.parquet: 2,000 rows: {recognized}"]
    tars = opened(write_tar(tmp_path / "t.tar", [("0.jpg", b"x")]), tmp_path / "scratch")
    assert tars.described() == [f"input {tmp_path}/t.tar: 1 row: 1 tar"]


def test_images_that_a_table_names_are_not_said_to_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "in" / "x").mkdir(parents=True)
    (tmp_path / "in" / "x" / "0.jpg").write_bytes(b"0")
    write_delimited(tmp_path / "in" / "t.csv", [{"image_path": "x\\0.jpg", "caption": "a"}])
    source = opened(tmp_path / "in", tmp_path / "scratch")
    assert "left out" not in "\n".join(source.described())
    assert [(s.url, s.image) for s in whole(source)] == [("x/0.jpg", b"0")]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_glob_that_is_proposed_finds_the_tables(tmp_path: Path, suffix: str) -> None:
    pack = gzip.compress if suffix else bytes
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"a.JSONL{suffix}").write_bytes(pack(json.dumps({"url": URL.format(0)}).encode()))
    (tmp_path / "in" / f"a.tsv{suffix}").write_bytes(pack(f"url\n{URL.format(1)}\n".encode()))
    glob = refusal(tmp_path / "in", tmp_path / "scratch").split("'")[1]
    assert [s.url for s in whole(opened(glob, tmp_path / "scratch"))] == [URL.format(0)]


def test_a_table_that_was_compressed_twice_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(gzip.compress(f"url,caption\n{URL.format(0)},a\n".encode())))
    assert [s.alt_text for s in whole(opened(path, tmp_path / "scratch"))] == ["a"]


def test_a_list_of_urls_may_have_blanks_in_its_first_one(tmp_path: Path) -> None:
    path = tmp_path / "urls.txt"
    path.write_text("http://a.example/my photo.jpg\nhttp://a.example/2.jpg\n")
    assert [s.url for s in whole(opened(path, tmp_path / "scratch"))] == path.read_text().splitlines()


def test_a_table_in_utf_32_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(f"url,caption\n{URL.format(0)},é☕\n".encode("utf-32"))
    assert [s.alt_text for s in whole(opened(path, tmp_path / "scratch"))] == ["é☕"]


def test_an_empty_arrow_file_and_several_images_a_row_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "t.arrow").write_bytes(b"")
    assert "without a schema" in refusal(tmp_path / "t.arrow", tmp_path)
    write_parquet(tmp_path / "t.parquet", [{"images": [{"bytes": jpeg(0), "path": None}], "text": "two"}])
    assert "images holds several images a row" in refusal(tmp_path / "t.parquet", tmp_path)


def test_the_caption_that_is_chosen_is_said(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", [{"url": URL.format(0), "captions": ["a", "b"]}])
    assert "`captions` (list: first)" in opened(path, tmp_path).described()[0]
    assert "`captions` (list: 1)" in opened(path, tmp_path, alt_text_choice=1).described()[0]


def test_a_text_that_many_rows_share_takes_its_room_once(tmp_path: Path) -> None:
    """A text of 300 KB, which the footer counts once and 2,000 rows have: 600 MB, if each had its own."""
    text = "a text" * 50_000
    captions = pa.DictionaryArray.from_arrays([0, None] * 2000, [text])
    table = pa.table({"url": [URL] * 4000, "caption": captions})
    pq.write_table(table, tmp_path / "t.parquet", store_schema=False)
    assert (tmp_path / "t.parquet").stat().st_size < 100_000
    source = opened(tmp_path / "t.parquet", tmp_path)
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        samples = source.read(1000, 1400)
        texts = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert [sample.alt_text for sample in samples[:3]] == [text, "", text]
    assert pool.max_memory() < 20 << 20 and texts < 20 << 20


@pytest.mark.parametrize("bound", [0, 200_000, parquet_tables.CACHED_GROUP_BYTES])
def test_a_row_group_is_read_once_for_each_time_it_is_not_held(tmp_path: Path, monkeypatch: Any, bound: int) -> None:
    """The column that is needed of these 2,000 rows takes less than 200 KB, and the whole 2 MB."""
    monkeypatch.setattr(parquet_tables, "CACHED_GROUP_BYTES", bound)
    reads: list[int] = []

    class Counted(pq.ParquetFile):  # type: ignore[misc]  # pyarrow has no types
        def iter_batches(self, *args: Any, **kwargs: Any) -> Any:
            reads.append(1)
            return super().iter_batches(*args, **kwargs)

    monkeypatch.setattr(pq, "ParquetFile", Counted)
    rng = np.random.default_rng(0)
    urls = [f"{URL}/{i:06d}" for i in range(2000)]
    table = pa.table({"url": urls, "rest": [rng.bytes(1000) for _ in urls]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2000)
    source = opened(tmp_path / "t.parquet", tmp_path)
    for start in range(0, 2000, 500):
        assert [s.url for s in source.read(start, start + 500)] == urls[start : start + 500]
    assert len(reads) == (5 if bound == 0 else 1), "once when it is opened"
