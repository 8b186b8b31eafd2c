"""Trainers read what was exported for them: by their own code where it is installed, else by the rules that they
document."""

from __future__ import annotations

import dataclasses
import io
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from diffusers.modular_pipelines.flux3.prompt_upsampler import split_caption, valid_added_row
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datapipe.decoding import decode_rgb
from datapipe.formats import WRITERS, Faults
from datapipe.formats.flux3 import flux3_caption
from datapipe.formats.ideogram4 import ideogram4_caption
from datapipe.schema import IDENTITIES, IDENTITIES_SCHEMA, Entity, Reason, Sample, Slice, StageName
from datapipe.shards import Provenance, Store, kept_samples, write_shard
from sdd.conversion import ExportFormat
from tests.conftest import kept_sample, rle

PAIRED = ("ai-toolkit", "diffsynth", "musubi")
SEEN = ("0000000000", "0000000001", "0000000004")
"""Samples whose mug is one and the same."""


def two_mugs(row: int) -> Sample:
    """A mug with a mask, and a larger one without, left of it in no row."""
    sample = kept_sample(row)
    other = Entity("mug", (14, 17), (24.0, 0.0, 48.0, 32.0), 0.7, 0.7)
    return sample.replace(caption="a mug and\na ☕ mug.", candidates=(*sample.candidates, other))


@pytest.fixture
def store(tmp_path: Path, provenance: Provenance) -> Store:
    """Two shards of three samples, and a third one of which nothing was kept."""
    store = Store(str(tmp_path / "set"))
    for index in range(2):
        write_shard(store, "shard", Slice(index, tuple(two_mugs(3 * index + n) for n in range(3))), provenance)
    lost = Sample(row=6).failed(StageName.FETCH, Reason.TIMEOUT)
    write_shard(store, "shard", Slice(2, (lost,)), provenance)
    return store


def write_identities(store: Store, rows: list[tuple[str, int, str]]) -> None:
    names = IDENTITIES_SCHEMA.names
    table = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], IDENTITIES_SCHEMA)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    store.put(IDENTITIES, sink.getvalue())


@pytest.fixture
def with_identities(store: Store) -> Store:
    write_identities(store, [(key, 0, "the mug") for key in SEEN])
    return store


def exported(store: Store, to: str, out: Path) -> Path:
    faults = Faults()
    assert len(list(WRITERS[to](store, str(out), faults))) == 3
    assert not faults.total
    return out


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_knows_every_writer():
    assert {to.value for to in ExportFormat} == set(WRITERS)


def test_flux3_captions_cite_every_row_of_their_table_as_diffusers_reads_them(store, tmp_path):
    out = exported(store, "flux3", tmp_path / "out")
    caption, rows = split_caption((out / "0000000000.txt").read_text())
    assert caption == "a mug <mug_1> and a ☕ mug <mug_2>."
    assert rows == [
        {"id": "mug_1", "bbox": [125, 83, 750, 417], "desc": "mug"},
        {"id": "mug_2", "bbox": [0, 500, 1000, 1000], "desc": "mug"},
    ]
    assert [valid_added_row(row, caption) for row in rows] == rows


SIDE = 4000
corners = st.tuples(st.floats(0, SIDE - 1), st.floats(0, SIDE - 1))
sizes = st.floats(1e-3, SIDE)


@given(st.lists(st.tuples(st.text(min_size=1, max_size=8), corners, sizes, sizes), min_size=1, max_size=5))
def test_whatever_the_tags_and_boxes_both_captions_are_valid(found):
    caption = " ".join(tag for tag, *_ in found)
    entities, start = [], 0
    for tag, (x, y), width, height in found:
        box = (x, y, min(x + width, SIDE), min(y + height, SIDE))
        entities.append(Entity(tag, (start, start + len(tag)), box, 1.0, 1.0))
        start += len(tag) + 1
    sample = Sample(row=0, caption=caption, width=SIDE, height=SIDE, candidates=tuple(entities))
    text = flux3_caption(sample)
    cited, rows = split_caption(text)
    assert "\n" not in text
    assert rows is not None
    assert len({row["id"] for row in rows}) == len(entities)
    for row in rows:
        # It takes no empty description, and a tag of nothing but space has none.
        assert valid_added_row(row | {"desc": row["desc"] or "-"}, cited) is not None
    assert_is_ideogram4(ideogram4_caption(sample))


def assert_is_ideogram4(text: str) -> None:
    """The rules of Ideogram's caption verifier."""
    caption = json.loads(text)
    assert text == json.dumps(caption, ensure_ascii=False, separators=(",", ":"))
    assert list(caption) == ["high_level_description", "compositional_deconstruction"]
    composition = caption["compositional_deconstruction"]
    assert list(composition) == ["background", "elements"]
    assert isinstance(composition["background"], str)
    for element in composition["elements"]:
        assert list(element) == ["type", "bbox", "desc"]
        top, left, bottom, right = element["bbox"]
        assert all(isinstance(v, int) for v in element["bbox"])
        assert 0 <= top < bottom <= 1000 and 0 <= left < right <= 1000


def test_ideogram4_captions_hold_to_its_schema_and_name_every_subject(store, tmp_path):
    out = exported(store, "ideogram4", tmp_path / "out")
    text = (out / "0000000000.txt").read_text()
    assert_is_ideogram4(text)
    elements = json.loads(text)["compositional_deconstruction"]["elements"]
    assert [(e["desc"], e["bbox"]) for e in elements] == [
        ("mug", [125, 83, 750, 417]),
        ("mug", [0, 500, 1000, 1000]),
    ]


def test_both_captions_describe_a_subject_as_the_stage_did(store):
    sample = next(kept_samples(store))
    described = tuple(dataclasses.replace(e, desc="a red\nmug with a chip") for e in sample.entities)
    sample = sample.replace(candidates=described)
    assert flux3_caption(sample).count('"desc": "a red mug with a chip"') == 2
    assert ideogram4_caption(sample).count('"desc":"a red mug with a chip"') == 2


@pytest.mark.parametrize("to", ["flux3", "ideogram4"])
def test_grounded_captions_are_an_image_folder_for_datasets(store, tmp_path, monkeypatch, to):
    out = exported(store, to, tmp_path / "out")
    data = load_dataset("imagefolder", data_dir=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert [row["text"] for row in data] == [(out / f"{n:010}.txt").read_text() for n in range(6)]
    assert data[0]["image"].size == (48, 32)


def test_simpletuner_has_boxes_as_fractions_and_masks_outside_of_the_folder_that_it_learns(store, tmp_path):
    out = exported(store, "simpletuner", tmp_path / "out")
    for sample in kept_samples(store):
        image = out / "images" / f"{sample.key}.jpg"
        assert image.read_bytes() == sample.image
        assert image.with_suffix(".txt").read_text() == sample.caption
        masked, boxed = json.loads(image.with_suffix(".bbox").read_text())
        assert masked["label"] == "mug"
        assert masked["bbox"] == pytest.approx([4 / 48, 4 / 32, 20 / 48, 24 / 32])
        mask = np.asarray(Image.open(image.parent / masked["mask"]))
        assert np.array_equal(mask > 0, rle(32, 48, (4, 4, 20, 24)).array()) and mask.max() == 255
        assert boxed == {"label": "mug", "bbox": [0.5, 0, 1, 1]}
    assert {path.suffix for path in (out / "images").iterdir()} == {".jpg", ".txt", ".bbox"}


def test_musubi_finds_every_image_from_any_folder(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    list(WRITERS["musubi"](store, "out", Faults()))
    monkeypatch.chdir("/")
    read = lines(tmp_path / "out" / "metadata.jsonl")
    assert [row["caption"] for row in read] == [s.caption for s in kept_samples(store)]
    for row, sample in zip(read, kept_samples(store), strict=True):
        assert Path(str(row["image_path"])).read_bytes() == sample.image
        controls = [name for name in row if name.startswith("control_path_")]
        assert controls == ["control_path_0", "control_path_1"]
        assert [Image.open(str(row[name])).size for name in controls] == [(16, 20), (24, 32)]


def test_ai_toolkit_finds_the_controls_of_an_image_by_its_name(store, tmp_path):
    out = exported(store, "ai-toolkit", tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["control_1", "control_2", "main"]
    for sample in kept_samples(store):
        assert (out / "main" / f"{sample.key}.jpg").read_bytes() == sample.image
        assert (out / "main" / f"{sample.key}.txt").read_text() == sample.caption
        sizes = [Image.open(out / f"control_{n}" / f"{sample.key}.png").size for n in (1, 2)]
        assert sizes == [(16, 20), (24, 32)]


def test_diffsynth_takes_a_list_of_images_to_edit(store, tmp_path):
    out = exported(store, "diffsynth", tmp_path / "out")
    for row, sample in zip(lines(out / "metadata.jsonl"), kept_samples(store), strict=True):
        assert row["prompt"] == sample.caption
        assert (out / str(row["image"])).read_bytes() == sample.image
        assert isinstance(row["edit_image"], list)
        assert [Image.open(out / name).size for name in row["edit_image"]] == [(16, 20), (24, 32)]


def test_webshart_knows_size_caption_and_place_of_every_sample(store, tmp_path):
    out = exported(store, "webshart", tmp_path / "out")
    samples = list(kept_samples(store))
    for index in range(2):
        tree = json.loads((out / f"shard-00000{index}.json").read_text())
        tar = (tmp_path / "set" / tree["path"]).read_bytes()
        assert tree["filesize"] == len(tar)
        for sample in samples[3 * index : 3 * index + 3]:
            entry = tree["files"][f"{sample.key}.jpg"]
            assert tar[entry["offset"] : entry["offset"] + entry["length"]] == sample.image
            text = tar[entry["json_offset"] : entry["json_offset"] + entry["json_length"]]
            assert json.loads(text)["key"] == sample.key
            assert (entry["width"], entry["height"], entry["aspect"]) == (48, 32, 1.5)
            assert entry["captions"] == sample.caption


def test_webshart_itself_reads_samples_by_the_index(store, tmp_path):
    webshart = pytest.importorskip("webshart", reason="webshart is not installed")
    out = exported(store, "webshart", tmp_path / "out")
    dataset = webshart.discover_dataset(source=str(tmp_path / "set"), metadata=str(out))
    loader = webshart.TarDataLoader(dataset, load_file_data=True)
    found = [loader.load_sample(shard, number) for shard in range(2) for number in range(3)]
    assert [(bytes(e.data), e.captions) for e in found] == [(s.image, s.caption) for s in kept_samples(store)]


def test_datasets_loads_a_hub_repository_with_its_images_decoded(store, tmp_path, monkeypatch):
    out = exported(store, "hf", tmp_path / "out")
    data = load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    samples = list(kept_samples(store))
    assert [row["caption"] for row in data] == [s.caption for s in samples]
    for row, sample in zip(data, samples, strict=True):
        assert np.array_equal(np.asarray(row["image"]), np.asarray(Image.open(io.BytesIO(sample.image or b""))))
        assert [e["tag"] for e in row["entities"]] == ["mug", "mug"]
    names = sorted(path.name for path in (out / "data").iterdir())
    assert names == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    metadata = pq.read_metadata(out / "data" / names[0])
    assert all(metadata.row_group(0).column(i).has_offset_index for i in range(metadata.num_columns))
    assert (out / "README.md").read_text().startswith("---\n")


def test_a_reference_is_the_subject_alone_over_white(store, tmp_path):
    out = exported(store, "diffsynth", tmp_path / "out")
    ring = rle(32, 48, (4, 4, 20, 24))
    for sample in kept_samples(store):
        pixels = decode_rgb(sample.image or b"")
        drawn = np.asarray(Image.open(out / "references" / f"{sample.key}_0.png"))
        assert np.array_equal(drawn, np.where(ring.array()[..., None], pixels, 255)[4:24, 4:20])
        boxed = np.asarray(Image.open(out / "references" / f"{sample.key}_1.png"))
        assert np.array_equal(boxed, pixels[:, 24:])


@pytest.mark.parametrize("to", PAIRED)
def test_a_reference_comes_from_another_image_of_the_same_subject_each_as_often(with_identities, tmp_path, to):
    store = with_identities
    out = exported(store, to, tmp_path / "out")
    pattern = "control_1/{}.png" if to == "ai-toolkit" else "references/{}_0.png"
    own = {s.key: decode_rgb(s.image or b"")[4:24, 4:20] for s in kept_samples(store)}
    shown = {key: np.asarray(Image.open(out / pattern.format(key))) for key in own}
    followers = dict(zip(SEEN, (*SEEN[1:], SEEN[0]), strict=True))
    for key, drawn in shown.items():
        assert np.array_equal(drawn, own[followers.get(key, key)])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("0000000000", 0, "a"), ("0000000099", 0, "a")], "sample 0000000099 is not in this dataset"),
        ([("0000000000", 0, "a"), ("0000000001", 7, "a")], "sample 0000000001 has no entity 7"),
    ],
)
def test_identities_that_cannot_be_are_refused(store, refused, tmp_path, rows, said):
    write_identities(store, rows)
    assert said in refused("export", tmp_path / "set", "--to", "musubi", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", WRITERS)
def test_an_export_is_there_whole_or_not_at_all_and_replaces_nothing(store, refused, sdd, tmp_path, to):
    words = ("export", tmp_path / "set", "--to", to, "--out", tmp_path / "out" / "set")
    broken = tmp_path / "set" / "shard-000001.parquet"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-9])
    assert "shard-000001" in refused(*words)
    assert not list((tmp_path / "out").iterdir())
    broken.write_bytes(whole)
    code, printed, _ = sdd(*words)
    assert code == 0 and "6 images" in printed
    assert "holds files already; name a new folder" in refused(*words)


def test_a_link_to_an_empty_folder_is_filled_and_a_mounted_disk_refused(store, refused, sdd, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    words = ("export", tmp_path / "set", "--to", "musubi", "--out")
    assert sdd(*words, tmp_path / "link")[0] == 0
    assert any((tmp_path / "folder").iterdir()) and (tmp_path / "link").is_symlink()
    assert "/: a mounted disk" in refused(*words, "/")


def test_a_bucket_takes_an_export_and_is_not_written_over(store, sdd, refused, bucket, tmp_path):
    words = ("export", tmp_path / "set", "--to", "diffsynth", "--out", f"{bucket}/edits")
    assert sdd(*words)[0] == 0
    there = Store(f"{bucket}/edits")
    row = json.loads(there.read("metadata.jsonl").splitlines()[0])
    assert there.read(row["image"]) == next(kept_samples(store)).image
    assert "holds files already" in refused(*words)


@pytest.mark.parametrize("to", ["hf", "musubi", "webshart"])
def test_an_export_holds_one_shard_whatever_the_number_of_shards(tmp_path, provenance, to):
    def peak(name: str, shards: int) -> int:
        store = Store(str(tmp_path / name))
        for index in range(shards):
            samples = [two_mugs(4 * index + n) for n in range(4)]
            heavy = tuple(s.replace(image=(s.image or b"") + bytes(20_000)) for s in samples)
            write_shard(store, "shard", Slice(index, heavy), provenance)
        write_identities(store, [(f"{row:010}", 0, "the mug") for row in range(4 * shards)])
        tracemalloc.start()
        list(WRITERS[to](store, str(tmp_path / f"{name}-out"), Faults()))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak("warm", 2)
    # The images of 10 shards more are 840 KB. Tuples that Python keeps to use them again take up to 100 KB.
    assert peak("large", 12) - peak("small", 2) < 200_000
