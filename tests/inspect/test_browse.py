"""`sdd inspect` on a folder, a shard and a foreign tar: what it lists, draws and refuses."""

from __future__ import annotations

import dataclasses
import fcntl
import gzip
import io
import json
import os
import pty
import select as system
import shutil
import struct
import subprocess
import sys
import tarfile
import termios
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from datapipe.inspect import browse
from datapipe.inspect.browse import random_samples
from datapipe.inspect.random_choice import rank, rank_in_sql
from datapipe.inspect.sidecars import select
from datapipe.schema import Outcome, Reason, Sample, Slice, from_table
from datapipe.shards import Store, iter_tables, write_shard
from tests.conftest import jpeg, kept_sample
from tests.sources.inputs import write_tar
from tests.test_schema import without
from tests.toy import PROJECT


@pytest.fixture(scope="module")
def samples(made) -> list[Sample]:
    """Every row of the dataset, without images."""
    return [s for table in iter_tables(made.store) for s in from_table(table)]


def lost(sample: Sample, stage: str) -> bool:
    assert sample.verdict is not None
    return sample.verdict.outcome is not Outcome.KEPT and sample.verdict.stage == stage


def objects(printed: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in printed.splitlines()]


def test_the_summary_for_scripts_counts_what_the_sidecars_hold(sdd, made, samples):
    code, printed, _ = sdd("inspect", made.folder, "--json")
    summary = json.loads(printed)
    assert code == 0
    assert summary["rows"] == len(samples) == summary["kept"] + summary["dropped"] + summary["failed"]
    assert sum(r["rows"] for r in summary["reasons"]) == summary["dropped"] + summary["failed"]
    assert summary["tags"] == Counter(e.tag for s in samples if not lost(s, "select") for e in s.entities)


def test_a_condition_lists_the_rows_that_match(sdd, made, samples):
    code, printed, _ = sdd("inspect", made.folder, "--where", "stage = 'select' and outcome = 'dropped'", "--json")
    assert code == 0
    expected = [s.key for s in samples if lost(s, "select")]
    assert expected
    assert [row["key"] for row in objects(printed)] == expected
    _, printed, _ = sdd("inspect", made.folder, "--where", "stage = 'select' and outcome = 'dropped'")
    assert printed.splitlines()[-1] == f"{len(expected)} of {len(samples)} rows"


def test_candidate_boxes_have_reasons_of_their_own(sdd, made, samples):
    code, printed, _ = sdd("inspect", made.folder, "--candidates", "--where", "reason='score'", "--json")
    assert code == 0
    found = [(row["key"], row["score"]) for row in objects(printed)]
    assert found
    assert found == [(s.key, c.score) for s in samples for c in s.candidates if c.rejected == "score"]


def test_descriptions_are_found_beside_shards_from_before_there_were_any(sdd, tmp_path, provenance):
    plain, described = kept_sample(0), kept_sample(1)
    entity = dataclasses.replace(described.candidates[0], desc="a red mug with a chipped rim")
    store = Store(str(tmp_path / "set"))
    for index, sample in enumerate((plain, described.replace(candidates=(entity, *described.candidates[1:])))):
        write_shard(store, "shard", Slice(index, (sample,)), provenance)
    earlier = tmp_path / "set" / "shard-000000.parquet"
    pq.write_table(without(pq.read_table(earlier), "candidates", "desc"), earlier)
    assert [row["desc"] for row in select(store, '"desc"', "reason IS NULL", view="candidates")] == [None, entity.desc]
    (found,) = objects(sdd("inspect", store.root, "--where", "entities[1].desc LIKE '%chipped%'", "--json")[1])
    assert found["row"] == 1
    assert "mug: a red mug with a chipped rim" in sdd("inspect", store.root, "--sample", described.key)[1]


def test_an_entity_is_looked_for_by_its_tag(sdd, made, samples):
    tag = next(s for s in samples if s.entities).entities[0].tag
    _, printed, _ = sdd("inspect", made.folder, "--entity", tag, "--json")
    assert [row["key"] for row in objects(printed)] == [s.key for s in samples if tag in {e.tag for e in s.entities}]


@pytest.mark.parametrize(
    "condition",
    [
        "nope = 1",
        "row >",
        "key > 5 and caption::int = 3",
        "true; DROP TABLE sidecar",
        "row in (select 1 from read_csv('/etc/passwd'))",
        "key in (select content from read_text('/etc/hostname'))",
        "row in (select 1 from samples)",
    ],
)
def test_a_condition_that_is_wrong_or_reaches_out_is_refused_in_one_line(refused, made, condition):
    samples = made  # a Python variable, which SQL must not see  # noqa: F841
    assert "--where" in refused("inspect", made.folder, "--where", condition)


def test_a_quote_in_a_tag_is_only_a_quote(sdd, made):
    code, printed, _ = sdd("inspect", made.folder, "--entity", "mug' OR true --", "--json")
    assert (code, printed) == (0, "")


def test_the_same_seed_chooses_the_same_samples_in_whatever_shards_they_lie(made, samples):
    kept = [s for s in samples if s.verdict.outcome is Outcome.KEPT]
    chosen = list(random_samples(made.store, 5, seed=3))
    assert [s.key for s in chosen] == sorted(sorted((s.key for s in kept), key=lambda key: rank(key, 3))[:5])
    assert all(s.image for s in chosen)
    assert [s.key for s in random_samples(made.store, 5, seed=4)] != [s.key for s in chosen]
    assert len(list(random_samples(made.store, 1000, seed=0))) == len(kept)
    assert [r["r"] for r in select(made.store, f"{rank_in_sql(3)} AS r")] == [rank(s.key, 3) for s in samples]


def test_pictures_are_drawn_of_one_sample_and_of_several(sdd, made, samples, tmp_path):
    code, _, _ = sdd("inspect", made.folder, "--random", 3, "--save", tmp_path / "sheet.png")
    assert code == 0
    key = next(s.key for s in samples if lost(s, "select"))
    code, printed, _ = sdd("inspect", made.folder, "--sample", key, "--save", tmp_path / "one.png")
    assert code == 0, "the image of a row lost at selection is in the raw shard"
    assert "dropped at select" in printed
    assert Image.open(tmp_path / "sheet.png").width > Image.open(tmp_path / "one.png").width


def test_a_row_lost_at_selection_has_no_picture_once_the_raw_shards_are_deleted(refused, copied, samples, tmp_path):
    for path in copied.glob("raw-*"):
        path.unlink()
    key = next(s.key for s in samples if lost(s, "select"))
    assert "no image in the folder" in refused("inspect", copied, "--sample", key, "--save", tmp_path / "one.png")


def test_of_a_row_lost_at_screening_a_thumbnail_is_drawn(sdd, refused, copied, samples, tmp_path):
    for path in copied.glob("raw-*"):
        path.unlink()
    keys = {s.verdict.reason: s.key for s in samples if s.verdict and lost(s, "screen")}
    dropped = sdd("inspect", copied, "--sample", keys[Reason.WHITE_BACKGROUND], "--save", tmp_path / "one.png")
    assert dropped[0] == 0
    assert "of the pixels are white" in dropped[1]
    assert max(Image.open(tmp_path / "one.png").size) >= 160
    assert "no image in the folder" in refused(
        "inspect", copied, "--sample", keys[Reason.UNDECODABLE], "--save", tmp_path / "one.png"
    )
    for choice in (["--sample", keys[Reason.WHITE_BACKGROUND]], ["--where", "thumbnail is not null"]):
        _, printed, _ = sdd("inspect", copied, "--json", *choice)
        assert "thumbnail" not in objects(printed)[0], "pictures are no text for scripts"


def test_one_shard_can_be_named_by_its_file(sdd, made):
    _, by_file, _ = sdd("inspect", made.folder / "shard-000001.tar", "--json")
    _, by_number, _ = sdd("inspect", made.folder, "--shard", 1, "--json")
    assert by_file == by_number


def test_an_object_store_is_looked_into_like_a_folder(sdd, made, bucket):
    remote = Store(f"{bucket}/looked-at")
    for name in made.store.names():
        remote.put(name, made.store.read(name))
    for more in ([], ["--where", "outcome = 'kept'"], ["--random", "2"]):
        assert sdd("inspect", remote.root, "--json", *more) == sdd("inspect", made.folder, "--json", *more)


def test_a_tar_without_a_manifest_is_read_by_its_members(sdd, made, samples, tmp_path):
    path = shutil.copy(made.folder / "shard-000001.tar", tmp_path / "moved.tar")
    _, printed, _ = sdd("inspect", path, "--json")
    kept = [s for s in samples if 40 <= s.row < 80 and s.verdict.outcome is Outcome.KEPT]
    assert json.loads(printed)["samples"] == len(kept)
    code, printed, _ = sdd("inspect", path, "--sample", kept[1].key, "--save", tmp_path / "one.png")
    assert code == 0
    assert kept[1].entities[0].tag in printed


def foreign_tar(path: Path) -> Path:
    """A tar of images and captions only, as other tools write them."""
    with tarfile.open(path, "w") as tar:
        for i in range(4):
            for name, data in ((f"a/b.{i}/cat{i}.JPG", jpeg(seed=i)), (f"a/b.{i}/cat{i}.txt", b"a cat \x1b[2J")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def test_a_foreign_tar_is_counted_and_drawn(sdd, tmp_path):
    path = foreign_tar(tmp_path / "foreign.tar")
    _, printed, _ = sdd("inspect", path, "--json")
    assert json.loads(printed)["samples"] == 4
    code, printed, _ = sdd("inspect", path, "--random", 2, "--save", tmp_path / "sheet.png")
    assert code == 0
    assert printed.count("a cat") == 2
    assert printed.count("no verdict  48 x 32 px") == 2
    sheet = Image.open(tmp_path / "sheet.png").convert("L")
    assert sum(sheet.histogram()[:200]) > 0.2 * sheet.width * sheet.height, "pictures, not slivers"
    assert "\x1b" not in printed


def test_a_foreign_tar_has_the_samples_that_the_pipeline_reads(sdd, tmp_path):
    """Dots in names, members of one sample apart, what macOS leaves, and compression."""
    stems = ["IMG_2020.01.05", "IMG_2020.01.06", "IMG_2020.01.07"]
    images = [(f"{stem}.jpg", jpeg(64, 48)) for stem in stems]
    texts = [(f"{stem}.json", json.dumps({"caption": f"of {stem}"}).encode()) for stem in stems]
    path = write_tar(tmp_path / "dated.tar", [*images, ("._IMG_2020.01.05.jpg", b"mac"), *texts])
    packed = tmp_path / "dated.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for tar in (path, packed):
        code, printed, _ = sdd("inspect", tar, "--json")
        assert code == 0
        assert json.loads(printed)["samples"] == 3
        assert {ending: count for ending, (count, _) in json.loads(printed)["members"].items()} == {"jpg": 3, "json": 3}
        code, printed, _ = sdd("inspect", tar, "--sample", stems[2], "--save", tmp_path / "one.png")
        assert code == 0
        assert "of IMG_2020.01.07" in printed
        _, printed, _ = sdd("inspect", tar, "--random", 3, "--json")
        assert [row["caption"] for row in objects(printed)] == [f"of {stem}" for stem in stems]


def test_what_a_tar_cannot_answer_is_said(refused, tmp_path):
    path = foreign_tar(tmp_path / "foreign.tar")
    assert "without a sidecar" in refused("inspect", path, "--where", "true")
    assert "no sample dog" in refused("inspect", path, "--sample", "dog")
    assert "no such file" in refused("inspect", tmp_path / "none.tar")
    path.write_bytes(path.read_bytes()[:1500])
    assert "not a whole tar" in refused("inspect", path)


def test_what_does_not_go_together_is_said(refused, made, tmp_path):
    assert "leave out" in refused("inspect", made.folder, "--candidates", "--random", 2)
    assert "choose them with" in refused("inspect", made.folder, "--save", tmp_path / "x.png")
    nothing = ["--where", "false", "--save", tmp_path / "x.png"]
    assert "nothing to draw" in refused("inspect", made.folder, *nothing)
    assert "name a picture file" in refused("inspect", made.folder, "--random", 1, "--save", tmp_path / "x.nope")
    key = next(random_samples(made.store, 1, 0)).key
    assert "no entity unicorn" in refused("inspect", made.folder, "--sample", key, "--entity", "unicorn")


def test_of_many_shards_the_first_row_and_a_sample_read_few_manifests(sdd, made, tmp_path, monkeypatch):
    """In a bucket every manifest is a request."""
    folder, shards = tmp_path / "many", 64
    folder.mkdir()
    first = json.loads((made.folder / "shard-000000.manifest.json").read_text())
    for index in range(shards):
        for ending in ("tar", "parquet"):
            os.link(made.folder / f"shard-000000.{ending}", folder / f"shard-{index:06d}.{ending}")
        manifest = first | {"index": index, "first_row": index * first["rows"]}
        (folder / f"shard-{index:06d}.manifest.json").write_text(json.dumps(manifest))
    read: list[str] = []
    whole = Store.read

    def read_and_note(self: Store, name: str, *part: Any) -> Any:
        read.append(name)
        return whole(self, name, *part)

    monkeypatch.setattr(Store, "read", read_and_note)
    monkeypatch.setattr(browse, "_print_line", lambda *_: (_ for _ in ()).throw(BrokenPipeError))
    assert sdd("inspect", folder, "--where", "true")[0] == 0
    assert len(read) == 1
    assert sdd("inspect", folder, "--sample", "0000000000")[0] == 0
    assert len([name for name in read if name.endswith(".json")]) < 12


def test_a_reader_that_leaves_early_is_no_error(made):
    command = [sys.executable, "-m", "sdd", "inspect", str(made.folder), "--where", "true"]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"0000000000")
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize(("answer", "shown"), [(b"\x1b[?62;4;6c", b"\x1bP"), (b"\x1b[?62;6c", "▀".encode())])
def test_a_terminal_shows_pictures_as_well_as_it_can(made, answer, shown):
    """`answer`: to the question for its abilities; 4 is Sixel."""
    key = next(random_samples(made.store, 1, 0)).key
    shell, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 1000, 800))
    command = [sys.executable, "-m", "sdd", "inspect", str(made.folder), "--sample", key]
    sizes = ("COLUMNS", "LINES")  # count for more than the terminal's own, where they are set
    environment = {k: v for k, v in os.environ.items() if k not in sizes} | {"TERM": "xterm-256color"}
    with subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdin=terminal, stdout=terminal, stderr=terminal
    ) as process:
        os.close(terminal)
        printed, deadline = b"", time.monotonic() + 300
        while time.monotonic() < deadline:
            if not system.select([shell], [], [], 1)[0]:
                continue
            try:
                part = os.read(shell, 1 << 16)
            except OSError:  # the other side is closed
                break
            if part.endswith(b"\x1b[c"):
                os.write(shell, answer)
            printed += part
    os.close(shell)
    assert process.returncode == 0
    assert shown in printed
    lines = [line.count("▀") for line in printed.decode(errors="replace").splitlines() if "▀" in line]
    assert not lines or max(lines) == 100 or len(lines) == 38, "as large as the terminal, but for the prompt"
