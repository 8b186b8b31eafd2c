"""Where shards come from: folders, tars of others, buckets, servers that fail; and the cache between."""

from __future__ import annotations

import io
import multiprocessing
import os
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datapipe.decoding import normalize
from subject_diffusion import storage
from subject_diffusion.errors import SddError, ShardError
from tests.color_profiles import DISPLAY_P3
from tests.conftest import jpeg
from tests.train.datasets import TAGS, digest, ids, sample, web, write_dataset
from train.stream import cache as cache_module
from train.stream.cache import ShardCache, ShardFile
from train.stream.dataset import Stream
from train.stream.filter import Filter
from train.stream.loader import StreamLoader
from train.stream.reader import Reader
from train.stream.source import Source
from train.stream.tar_sample import CorruptSampleError, RawSample, decode_image
from train.stream.transform import SubjectTransform

SIZES = (5, 8, 6)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "STALL_S", 1)
    monkeypatch.setattr(cache_module, "FIRST_WAIT_S", 0.01)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"), SIZES)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars as stock webdataset writes them, without manifests."""
    folder = tmp_path_factory.mktemp("foreign")
    for shard in range(3):
        with webdataset.TarWriter(str(folder / f"data-{shard:04d}.tar")) as writer:
            for row in range(4):
                number = 4 * shard + row
                writer.write({"__key__": f"part/{number:05d}", "jpg": jpeg(seed=number), "cls": str(number)})
    return folder


def test_a_server_that_fails_stalls_truncates_and_garbles_is_asked_again(dataset, tmp_path):
    transform = SubjectTransform(size_px=16)
    expected = [digest(b) for b in Stream(str(dataset), 4, transform, cache=tmp_path / "local")]
    with web(dataset, faults=("fail", "stall", "truncate", "garble", "fail")) as (address, asked):
        stream = Stream(f"{address}/", 4, transform, cache=tmp_path / "remote")
        assert [digest(b) for b in stream] == expected
        tars = {path: count for path, count in asked.items() if path.endswith(".tar")}
        assert sum(tars.values()) >= len(SIZES) + 5
        asked.clear()
        list(stream)
        assert not [path for path in asked if path.endswith(".tar")]


@pytest.mark.parametrize("of", [".json", ".parquet"])
def test_a_server_that_fails_at_a_manifest_or_a_sidecar_is_asked_again(dataset, tmp_path, of):
    expected = [digest(b) for b in Stream(str(dataset), 4, cache=tmp_path / "local")]
    with web(dataset, faults=("fail", "truncate", "fail", "fail"), of=of) as (address, _):
        assert [digest(b) for b in Stream(f"{address}/", 4, cache=tmp_path / "remote")] == expected


def test_a_shard_whose_sidecar_is_missing_is_refused_by_name(tmp_path):
    folder = write_dataset(tmp_path / "dataset", SIZES)
    (folder / "shard-000001.parquet").unlink()
    with pytest.raises(SddError, match=r"shard-000001\.parquet: no such file"):
        Stream(str(folder), 4, cache=tmp_path / "cache")


def test_a_shard_that_never_comes_right_is_refused_by_name(dataset, tmp_path):
    with web(dataset, faults=["garble"] * 100) as (address, _):
        for workers in (0, 1):
            loader = StreamLoader(Stream(f"{address}/", 4, cache=tmp_path), workers)
            with pytest.raises(ShardError, match=r"shard-00000\d\.tar: its SHA-256") as error:
                list(loader)
            assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.tar"))


def test_a_bucket_gives_what_the_folder_gives(dataset, bucket, tmp_path):
    write_dataset(f"{bucket}/stream", SIZES)
    expected = [digest(b) for b in Stream(str(dataset), 4, cache=tmp_path / "local")]
    for workers in (0, 2):
        loader = StreamLoader(Stream(f"{bucket}/stream", 4, cache=tmp_path / "remote"), workers)
        assert [digest(b) for b in loader] == expected


def test_a_dataset_that_is_not_there_is_one_line(tmp_path):
    for path in (str(tmp_path), str(tmp_path / "missing"), "http://127.0.0.1:9/", "zzz://x", str(tmp_path / "*.tar")):
        with pytest.raises(ShardError) as error:
            Stream(path, 4, cache=tmp_path / "cache")
        assert path.rstrip("/") in str(error.value) and "\n" not in str(error.value)


def test_a_system_without_posix_fadvise_reads_as_well(dataset, tmp_path, monkeypatch):
    expected = [digest(b) for b in Stream(str(dataset), 4, cache=tmp_path / "linux")]
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert [digest(b) for b in Stream(str(dataset), 4, cache=tmp_path / "macos")] == expected


def test_the_cache_keeps_to_its_limit_and_to_the_shards_used_last(dataset, tmp_path):
    with web(dataset) as (address, asked):
        shards = [
            ShardFile(f"{address}/shard-00000{i}.tar", (dataset / f"shard-00000{i}.tar").stat().st_size, None)
            for i in range(3)
        ]
        cache = ShardCache(tmp_path, limit_bytes=shards[0].size + shards[1].size)
        opened = [cache.open(shards[i]) for i in (0, 1, 0, 2)]
        held = {p.stat().st_size for p in tmp_path.glob("*.tar")}
        assert held == {shards[0].size, shards[2].size}
        assert asked["/shard-000000.tar"] == 1
        # One that was removed while open reads on.
        assert len(os.pread(opened[1], shards[1].size, 0)) == shards[1].size
        for descriptor in opened:
            os.close(descriptor)


def test_processes_share_one_download(dataset, tmp_path):
    with web(dataset) as (address, asked):
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=_read_all, args=(f"{address}/", tmp_path)) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        assert [asked[f"/shard-00000{i}.tar"] for i in range(3)] == [1, 1, 1]


def test_a_forked_worker_waits_for_no_download_of_its_parent(dataset, tmp_path):
    with (
        web(dataset, faults=["stall"] * 100) as (address, asked),
        ThreadPoolExecutor() as thread,
        Reader(Stream(f"{address}/", 4, cache=tmp_path).plan) as reader,
    ):
        batch = thread.submit(reader.batch, 0, 0)
        while not any(path.endswith(".tar") for path in asked):
            time.sleep(0.01)
        copy = multiprocessing.get_context("fork").Process(target=reader.__exit__)
        copy.start()
        copy.join(20)
        assert copy.exitcode == 0
        assert isinstance(batch.exception(), ShardError)


def test_an_abandoned_iterator_may_be_collected_in_the_thread_that_downloads(dataset, tmp_path):
    with web(dataset, faults=["stall"] * 100) as (address, asked), ThreadPoolExecutor() as thread:
        reader = Reader(Stream(f"{address}/", 4, cache=tmp_path).plan)
        batch = thread.submit(reader.batch, 0, 0)
        while sum(path.endswith(".tar") for path in list(asked)) < 3:  # the batch waits for the downloads alone
            time.sleep(0.01)
        fsspec.asyn.get_loop().call_soon_threadsafe(reader.__exit__)
        assert isinstance(batch.exception(timeout=60), ShardError)


def _read_all(path: str, cache: Path) -> None:
    list(Stream(path, 4, cache=cache))


def test_what_a_killed_download_left_is_cleared_away(tmp_path):
    (tmp_path / "0123.part").write_bytes(b"half")
    ShardCache(tmp_path, 1)
    assert not list(tmp_path.glob("*.part"))


def test_tars_without_manifest_get_an_index_beside_them(foreign, tmp_path):
    stream = Stream(str(foreign), 3, cache=tmp_path / "one")
    batches = list(stream)
    assert sorted(ids(batches)) == [f"part/{n:05d}" for n in range(12)]
    for batch in batches:
        for key, members in zip(batch["key"], batch["members"], strict=True):
            number = int(key.removeprefix("part/"))
            assert members == {"jpg": jpeg(seed=number), "cls": str(number).encode()}
    indices = sorted(foreign.glob("*.index.parquet"))
    assert len(indices) == 3
    stamps = [path.stat().st_mtime_ns for path in indices]
    again = Stream(f"{foreign}/data-{{0000..0002}}.tar", 3, cache=tmp_path / "two")
    assert ids(list(again)) == ids(batches)
    assert [path.stat().st_mtime_ns for path in indices] == stamps
    with pytest.raises(ShardError, match="filters need the manifest"):
        Stream([Source(str(foreign), keep=Filter(min_side_px=10))], 3, cache=tmp_path / "three")
    with web(foreign) as (address, _):
        remote = Stream(f"{address}/data-{{0000..0002}}.tar", 3, cache=tmp_path / "four")
        assert ids(list(remote)) == ids(batches)


@given(
    names=st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/."), min_size=1), max_size=6
    ),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    deep=st.booleans(),
)
def test_any_tar_format_and_any_name_is_read(tmp_path_factory, names, form, deep):
    names = list(dict.fromkeys(["plain", *names]))
    folder = tmp_path_factory.mktemp("tars")
    prefix = "long/" * 25 if deep else ""
    written: dict[str, dict[str, bytes]] = {}
    with tarfile.open(folder / "a.tar", "w", format=form, encoding="utf-8") as tar:
        for name in names:
            for ending in ("txt", "seg.png"):
                member = tarfile.TarInfo(f"{prefix}{name}.{ending}")
                member.size = 3
                try:
                    tar.addfile(member, io.BytesIO(b"abc"))
                except ValueError:  # longer than the format allows
                    continue
                written.setdefault(prefix + name, {})[ending] = b"abc"
    stream = Stream(str(folder), 1, mode="evaluate", cache=folder / "cache")
    read = {key: members for b in stream for key, members in zip(b["key"], b["members"], strict=True)}
    assert read == written


def test_a_broken_image_in_a_tar_is_replaced_and_a_broken_tar_refused(tmp_path):
    def write(name: str, broken: int | None) -> Path:
        folder: Path = tmp_path / name
        folder.mkdir()
        with webdataset.TarWriter(str(folder / "a.tar")) as writer:
            for row in range(8):
                image = jpeg(seed=row)
                writer.write({"__key__": f"{row:03d}", "jpg": image[: len(image) // 2] if row == broken else image})
        return folder

    def pixels(raw, rng):
        return {"pixels": raw.image()}

    whole = ids(list(Stream(str(write("whole", None)), 4, pixels, cache=tmp_path / "cache")))
    loader = StreamLoader(Stream(str(write("broken", 5)), 4, pixels, cache=tmp_path / "cache"))
    now = ids(list(loader))
    (replaced,) = loader.replaced
    assert (replaced.key, replaced.position) == ("005", whole.index("005"))
    assert "damaged image" in replaced.reason
    assert [a for a, b in zip(now, whole, strict=True) if b != "005"] == [b for b in whole if b != "005"]

    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "a.tar").write_bytes((tmp_path / "whole/a.tar").read_bytes()[:3000])
    with pytest.raises(ShardError, match=r"a\.tar: not a whole tar"):
        Stream(str(cut), 1, cache=tmp_path / "cache")


@given(
    min_score=st.sampled_from([0.0, 0.75, 0.85]),
    tags=st.none() | st.frozensets(st.sampled_from(TAGS), min_size=1),
    without_tags=st.frozensets(st.sampled_from(TAGS), max_size=1),
    min_entities=st.integers(0, 2),
    max_entities=st.none() | st.integers(1, 3),
    min_side_px=st.sampled_from([0, 33, 34]),
)
def test_filters_keep_what_a_plain_loop_keeps(dataset, tmp_path_factory, **wanted):
    keep = Filter(**wanted)
    rows = [r for r in range(sum(SIZES) + 2) if r not in (5, 14)]
    expected = []
    for row in rows:
        made = sample(row, entities=1 + row % 3)
        entities = [e for e in made.entities if e.score >= keep.min_score and (keep.tags is None or e.tag in keep.tags)]
        if (
            min(made.width, made.height) >= keep.min_side_px
            and not any(e.tag in keep.without_tags for e in made.entities)
            and keep.min_entities <= len(entities) <= (keep.max_entities or 99)
        ):
            expected.append((made.key, [e.tag for e in entities]))
    cache = tmp_path_factory.getbasetemp() / "filters"
    if not expected:
        with pytest.raises(Exception, match="do not fill a batch"):
            Stream([Source(str(dataset), keep=keep)], 1, mode="evaluate", cache=cache)
        return

    def tags(raw, rng):
        return {"tags": [e.tag for e in raw.annotation().entities]}

    stream = Stream([Source(str(dataset), keep=keep)], 1, tags, mode="evaluate", cache=cache)
    assert [(b["key"][0], b["tags"][0]) for b in stream] == expected


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()


def test_images_of_others_come_out_as_the_pipeline_would_store_them(tmp_path):
    """Whatever their format, the case of their ending, their depth, transparency, orientation and profile."""
    picture = Image.open(io.BytesIO(jpeg(48, 32)))
    turned = Image.Exif()
    turned[0x0112] = 6
    see_through = picture.copy()
    see_through.putalpha(Image.linear_gradient("L").resize((48, 32)))
    ramp = np.linspace(0, 65535, 48 * 32, dtype=np.uint16).reshape(32, 48)
    images = {
        "JPG": jpeg(48, 32),
        "jpeg": encoded(picture, "JPEG", exif=turned),
        "jfif": encoded(picture, "JPEG", icc_profile=DISPLAY_P3.icc()),
        "png": encoded(see_through, "PNG"),
        "PNG": encoded(Image.fromarray(ramp), "PNG"),
        **{e: encoded(picture, f) for e, f in (("avif", "AVIF"), ("gif", "GIF"), ("bmp", "BMP"), ("tif", "TIFF"))},
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, (ending, data) in enumerate(images.items()):
            for name, content in ((f"{number}.txt", b"a mug"), (f"{number}.{ending}", data)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    def pixels(raw, rng):
        return {"pixels": [raw.image()]}

    stream = Stream(str(tmp_path), 1, pixels, mode="evaluate", cache=tmp_path / "cache")
    read = [batch["pixels"][0][0] for batch in stream]
    for data, found in zip(images.values(), read, strict=True):
        expected = normalize(data, 10**6).pixels
        # JPEGs are decoded by another library, which may round otherwise.
        np.testing.assert_allclose(found, expected, atol=4 if data[:2] == b"\xff\xd8" else 0)
    assert read[1].shape == (48, 32, 3)
    assert np.abs(read[4].astype(int) - (ramp >> 8)[..., None]).max() == 0


def test_a_sample_without_an_image_names_its_members():
    with pytest.raises(CorruptSampleError, match=r"no image among its members \(txt, json\)"):
        RawSample("0", {"txt": memoryview(b""), "json": memoryview(b"")}).image()


def test_large_jpegs_are_decoded_no_smaller_than_asked_for():
    data = jpeg(640, 480)
    assert decode_image(data).shape == (480, 640, 3)
    assert decode_image(data, 200).shape == (240, 320, 3)
    assert np.abs(decode_image(data, 240).mean((0, 1)) - decode_image(data).mean((0, 1))).max() < 3
    with pytest.raises(CorruptSampleError, match="damaged image"):
        decode_image(data[:500])
