"""Samples that somebody else wrote: what is wrong with one costs that sample, wherever it is read, and nothing else."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from datapipe.formats import WRITERS
from datapipe.schema import RLE, Slice, from_json, sample_problems, to_json
from datapipe.shards import Provenance, Store, kept_samples, read_manifest, read_samples, verify, write_shard
from datapipe.shards.verify import record_of
from datapipe.sources.tar_headers import tar_headers
from datapipe.sources.tars import members_of
from subject_diffusion.errors import ShardError
from tests.conftest import Sdd, kept_sample
from train.stream.dataset import Stream
from train.stream.loader import StreamLoader
from train.stream.tar_sample import CorruptSampleError, RawSample, parse_members

HUGE = "o" * 6 + "0"
"""A run of 2^30 pixels."""


def entity(**changes: Any) -> dict[str, Any]:
    tree = json.loads(to_json(kept_sample(0)))
    return {"entities": [tree["entities"][0] | changes]}


def mask(counts: object, *size: object) -> dict[str, Any]:
    return entity(mask={"size": list(size), "counts": counts})


HOSTILE: dict[str, dict[str, Any]] = {
    "a box of NaN": entity(box=[math.nan, 4, 20, 24]),
    "a box of infinity": entity(box=[4, 4, math.inf, 24]),
    "a box of text": entity(box=["4", "4", "20", "24"]),
    "a box that is text": entity(box="4,4,20,24"),
    "a box of null": entity(box=[None, 4, 20, 24]),
    "a box of three": entity(box=[4, 4, 20]),
    "a box of 10^400": entity(box=[4, 4, 10**400, 24]),
    "no box": entity(box=None),
    "a box outside of the image": entity(box=[4, 4, 20, 99]),
    "a box without area": entity(box=[4, 4, 4, 24]),
    "a score of null": entity(score=None),
    "a score of NaN": entity(text_score=math.nan),
    "a score of text": entity(score="high"),
    "a score of true": entity(stability=True),
    "a tag that is a number": entity(tag=7),
    "a description that is a number": entity(desc=7),
    "a span that is text": entity(span="ab"),
    "a span outside of the caption": entity(span=[2, 99]),
    "a mask of 4 EiB": mask(HUGE, 2**31, 2**31),
    "a mask of 4 GiB": mask(HUGE, 2**16, 2**16),
    "a mask of a negative size": mask("P0", -32, -48),
    "a mask of size 0": mask("", 0, 0),
    "a mask of size null": mask("P0", None, 48),
    "a mask of a size of text": mask("P0", "32", "48"),
    "a mask that overruns": mask(HUGE, 32, 48),
    "a mask whose last number goes on": mask("PPPPPP", 32, 48),
    "a mask of a number without end": mask("o" * 5000 + "0", 32, 48),
    "a mask of a negative run": mask("0O", 32, 48),
    "a mask of no run lengths": mask("\x7f\x7f", 32, 48),
    "a mask of another alphabet": mask("ｏｏ", 32, 48),
    "a mask of null": mask(None, 32, 48),
    "a mask of lists": mask([1, 2, 3], 32, 48),
    "a mask of another size than the image": mask("P0", 48, 32),
    "a width of null": {"width": None},
    "a width of 0": {"width": 0},
    "a width of text": {"width": "48"},
    "a width of NaN": {"width": math.nan},
    "a width of 2^63": {"width": 2**63},
    "an image of 2^40 pixels": {"width": 2**20, "height": 2**20},
    "a caption that is a number": {"caption": 5},
    "a caption of half a character": {"caption": "\ud83d a mug"},
    "tags that are text": {"tags": "mug"},
    "a tag that is null": {"tags": [None]},
    "entities that are a number": {"entities": 5},
    "an entity that is null": {"entities": [None]},
    "scores that are a list": {"scores": [1]},
    "a score of the input that is text": {"scores": {"punsafe": "0.1"}},
    "a hash that is none": {"phash": "zz"},
    "a row of text": {"row": "0"},
    "a schema of another version": {"schema_version": [2]},
}


def hostile_json(case: str) -> bytes:
    return json.dumps(json.loads(to_json(kept_sample(1))) | HOSTILE[case]).encode()


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_sample_is_refused_in_one_way(case: str) -> None:
    with pytest.raises(ShardError) as refused:
        from_json(hostile_json(case))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300
    raw = RawSample("1", {"json": memoryview(hostile_json(case))})
    with pytest.raises(CorruptSampleError):
        raw.annotation()


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_json_nested_without_end_is_no_sample(opening: bytes) -> None:
    with pytest.raises(ShardError):
        from_json(b'{"schema_version":2,"a":' + opening * 100_000)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A tar without a manifest of every hostile sample, with good ones before, between and behind."""
    path = tmp_path / "foreign" / "all.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for number, case in enumerate(HOSTILE):
            good = [(f"good{number}-{copy}", to_json(kept_sample(1))) for copy in range(3)]
            for key, tree in (*good, (f"bad{number}", hostile_json(case))):
                image = kept_sample(1).image
                assert image is not None
                add(f"{key}.jpg", image)
                add(f"{key}.json", tree)
    return path


def annotated(raw: RawSample, rng: np.random.Generator) -> dict[str, float]:
    """A transform that looks at all of it."""
    return {"area": float(sum(e.mask.array().sum() for e in raw.annotation().entities if e.mask))}


def test_the_stream_replaces_lists_and_counts_hostile_samples(foreign: Path, tmp_path: Path) -> None:
    loader = StreamLoader(Stream(str(foreign), 7, annotated, cache=tmp_path / "cache", mode="evaluate"))
    assert not [key for batch in loader for key in batch["key"] if key.startswith("bad")]
    assert {r.key for r in loader.replaced if r.key.startswith("bad")} == {f"bad{n}" for n in range(len(HOSTILE))}


def test_inspect_shows_what_is_wrong_with_a_hostile_sample(sdd: Sdd, foreign: Path) -> None:
    for number in (0, list(HOSTILE).index("a mask that overruns"), list(HOSTILE).index("a width of null")):
        code, printed, _ = sdd("inspect", foreign, "--sample", f"bad{number}")
        assert code == 0
        assert "corrupt: " in printed


IN_A_SIDECAR: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "a box of NaN": lambda e: {"box": [math.nan, 4.0, 20.0, 24.0]},
    "a box of null": lambda e: {"box": [None, 4.0, 20.0, 24.0]},
    "a box outside": lambda e: {"box": [4.0, 4.0, 20.0, 99.0]},
    "a score of null": lambda e: {"score": None},
    "a mask that overruns": lambda e: {"mask": {"size": [32, 48], "counts": HUGE}},
    "a mask of 4 EiB": lambda e: {"mask": {"size": [2**31 - 1, 2**31 - 1], "counts": HUGE}},
}


@pytest.fixture(params=IN_A_SIDECAR)
def with_hostile_row(request: pytest.FixtureRequest, tmp_path: Path, provenance: Provenance) -> Path:
    """A dataset of three kept rows, the middle one of which is hostile. Its manifest is right about its files."""
    folder = tmp_path / "dataset"
    rows = [kept_sample(row) for row in range(3)]
    change = IN_A_SIDECAR[request.param]({})
    good = rows[1].candidates[0]
    box = tuple(change.get("box", good.box))
    changed = dict(change, box=box)
    if "mask" in changed:
        changed["mask"] = RLE(tuple(change["mask"]["size"]), change["mask"]["counts"])
    hostile = dataclasses.replace(good, **changed)
    if None not in box and "score" not in change:
        rows[1] = rows[1].replace(candidates=(hostile,))
        write_shard(Store(str(folder)), "shard", Slice(0, tuple(rows)), provenance)
        return folder
    # Our own writer refuses null, so the sidecar is written anew, as a stranger would.
    store = Store(str(folder))
    manifest = write_shard(store, "shard", Slice(0, tuple(rows)), provenance)
    table = pq.ParquetFile(folder / "shard-000000.parquet").read()
    trees = table.to_pylist()
    trees[1]["candidates"][0].update(change)
    pq.write_table(type(table).from_pylist(trees, schema=table.schema), folder / "shard-000000.parquet")
    record = record_of((folder / "shard-000000.parquet").read_bytes())
    store.put(manifest.file, dataclasses.replace(manifest, parquet=record).to_json())
    return folder


def test_a_hostile_row_of_a_sidecar_costs_itself(sdd: Sdd, with_hostile_row: Path, tmp_path: Path) -> None:
    store = Store(str(with_hostile_row))
    assert any("0000000001" in p.what or "row 1 " in p.what for p in verify(store))
    first, corrupt, last = read_samples(store, read_manifest(store, "shard", 0), [0, 1, 2])
    assert first.is_kept
    assert last.is_kept
    assert corrupt.verdict is not None
    assert "corrupt: " in corrupt.verdict.detail
    for to in WRITERS:
        code, printed, error = sdd("export", with_hostile_row, "--to", to, "--out", tmp_path / to)
        assert code == 0, error
        assert "2 images" in printed
        assert "corrupt sample left out" in printed
    with pytest.raises(ShardError, match="corrupt"):
        list(kept_samples(store))


@pytest.mark.parametrize(("field", "value"), [("kind", "../../other"), ("index", 1), ("index", "0"), ("kind", None)])
def test_a_manifest_cannot_point_elsewhere(tmp_path: Path, provenance: Provenance, field: str, value: object) -> None:
    store = Store(str(tmp_path))
    manifest = write_shard(store, "shard", Slice(0, (kept_sample(0),)), provenance)
    store.put(manifest.file, json.dumps(json.loads(manifest.to_json()) | {field: value}).encode())
    with pytest.raises(ShardError, match="not a manifest"):
        read_manifest(store, "shard", 0)


def header(name: str, kind: bytes, size: int, content: bytes = b"") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    data = info.tobuf(tarfile.GNU_FORMAT)
    return data + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def pax(record: str) -> bytes:
    length = len(record) + 3
    content = f"{length if len(str(length)) == 2 else length + 1} {record}\n".encode()
    return header("x", tarfile.XHDTYPE, len(content), content)


END = bytes(2 * tarfile.BLOCKSIZE)
FILE = header("a.json", tarfile.REGTYPE, 2, b"{}")
TARS = {
    "3,000 long names in a row": header("n", tarfile.GNUTYPE_LONGNAME, 2, b"a\0") * 3000 + FILE + END,
    "3,000 pax headers in a row": pax("path=a.json") * 3000 + FILE + END,
    "3,000 global headers in a row": header("g", tarfile.XGLTYPE, 11, b"11 a=b2345\n") * 3000 + FILE + END,
    "a pax size of 2^63": pax(f"size={2**63}") + FILE + END,
    "a pax size of 2^40": pax(f"size={2**40}") + FILE + END,
    "a pax size below zero": pax("size=-512") + FILE + END,
    "a pax size of text": pax("size=many") + FILE + END,
    "a long name of 64 GiB": header("n", tarfile.GNUTYPE_LONGNAME, 1 << 36) + FILE + END,
    "a pax length of 10^5000": header("x", tarfile.XHDTYPE, 512, b"9" * 512) + FILE + END,
    "a file that ends early": header("a.json", tarfile.REGTYPE, 4096, b"{}"),
    "half a header": FILE + FILE[:100],
    "no tar": b"no tar" * 1000,
    "nothing": b"",
}


LEFT_OUT = "a pax length of 10^5000"
"""Python's tarfile takes such a header for one that says nothing."""


@pytest.mark.parametrize("case", TARS)
def test_a_hostile_tar_ends_with_one_kind_of_error(case: str, sdd: Sdd, tmp_path: Path) -> None:
    if case == LEFT_OUT:
        assert [member.name for member in members_of(io.BytesIO(TARS[case]))] == ["a.json"]
        return
    for read in (tar_headers, members_of):
        with pytest.raises(tarfile.TarError):
            list(read(io.BytesIO(TARS[case])))
    path = tmp_path / "a.tar"
    path.write_bytes(TARS[case])
    code, _, error = sdd("inspect", path)
    assert code == 2
    assert error.count("\n") == 1, error


@pytest.mark.parametrize("case", sorted(set(TARS) - {"nothing", *(case for case in TARS if "in a row" in case)}))
def test_a_hostile_stretch_of_a_tar_is_a_corrupt_sample(case: str) -> None:
    with pytest.raises(CorruptSampleError):
        parse_members(memoryview(TARS[case]))


def test_samples_that_the_pipeline_made_pass(made: Any) -> None:
    store = Store(str(made.folder))
    assert not [p for s in kept_samples(store) for p in sample_problems(s)]
