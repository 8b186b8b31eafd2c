"""`sdd plan` says what a run will take, judged from a run over some rows."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from datapipe.forecast import Machines, Sampled, forecast, read_sample, sampled_rows
from datapipe.ledger import Tally
from datapipe.placing import balanced
from datapipe.progress import THROUGHPUT_FILE, record
from datapipe.recipe import Pool, Recipe, load_recipe
from datapipe.schema import Reason, Sample, Slice, StageName
from datapipe.shards import Provenance, Store, write_shard
from datapipe.sources import InputRows, SourceSettings, open_source
from datapipe.stages.fetch import tail_of
from subject_diffusion.errors import RunError
from tests.conftest import kept_sample
from tests.toy import PROJECT, TOY_RECIPE, write_images

CAPTION, GROUND = StageName.CAPTION, StageName.GROUND
TALLIES = {
    StageName.FETCH: Tally(rows=100, failed=10, busy_s=50.0),
    StageName.SCREEN: Tally(rows=90, dropped=10, busy_s=9.0),
    CAPTION: Tally(rows=80, busy_s=160.0),
    StageName.TAG: Tally(rows=80, dropped=30, busy_s=0.8),
    GROUND: Tally(rows=50, busy_s=200.0),
    StageName.SEGMENT: Tally(rows=50, busy_s=100.0),
    StageName.SELECT: Tally(rows=50, dropped=10, busy_s=0.5),
}
SAMPLE = Sampled(
    100, TALLIES, kept=40, image_bytes=5e4, raw_bytes=4_000_000, tar_bytes=2_400_000, sidecar_bytes=10**5, on_gpu=False
)
HOUR_S = 3600


def recipe(*overrides: str) -> Recipe:
    return load_recipe(TOY_RECIPE, ["toyworld=null", "run.fetch_workers=null", *overrides])


def test_rows_hours_bytes_and_price_follow_from_the_sample():
    found = forecast(recipe(), SAMPLE, 1_000_000, Machines(((4, 0), (4, 0)), price=3.0), {})
    stages = {one.stage: one for one in found.stages}
    assert [round(one.rows.expected) for one in found.stages] == [10**6, 9 * 10**5, *[8 * 10**5] * 2, *[5 * 10**5] * 3]
    caption = stages[CAPTION]
    assert caption.cpu_hours and caption.cpu_hours.expected == pytest.approx(1.6e6 / HOUR_S)
    assert caption.gpu_hours is None
    assert found.workers == {"fetch+screen": 8, "caption+tag+ground+segment+select": 8}
    fetch_s, annotate_s = 590_000 / 8, 4_613_000 / 8
    assert found.hours and found.hours.expected == pytest.approx((fetch_s + annotate_s) / HOUR_S)
    assert found.price and found.price.expected == pytest.approx(found.hours.expected * 2 * 3.0)
    assert found.kept.expected == 400_000 and found.raw_bytes == 4e10
    assert found.download_bytes.expected == pytest.approx(9e5 * 5e4)
    assert found.shard_bytes.expected == pytest.approx(2.4e10 + 1e9)


def test_intervals_are_those_of_shares_and_narrow_with_the_sample():
    few = forecast(recipe(), SAMPLE, 1000, Machines(((4, 0),)), {}).kept
    assert (few.low, few.expected, few.high) == pytest.approx((309.4, 400.0, 497.97), abs=0.1)  # Wilson, 40 of 100
    hours = forecast(recipe(), SAMPLE, 1000, Machines(((4, 0),)), {}).hours
    assert hours and hours.low < hours.expected < hours.high


POOLS = (
    "run.pools=[{stages: [caption, tag], gpus: 0.5}, {stages: [ground, segment, select], gpus: 1}]",
    "caption.model=facebook/sam-vit-huge",
)


def test_a_gpu_that_is_not_here_is_judged_by_what_others_have_measured_or_by_what_the_user_says():
    machines = Machines(((16, 8),) * 2)
    found = forecast(recipe(*POOLS), SAMPLE, 10_000, machines, {GROUND: 20.0})
    stages = {one.stage: one for one in found.stages}
    caption, tag, ground = stages[CAPTION].rate, stages[StageName.TAG].rate, stages[GROUND].rate
    assert caption and caption.row_s == pytest.approx(2 / 21.7) and "2408.00714" in caption.source
    assert tag and tag.row_s == pytest.approx(0.01), "it has no model"
    assert ground and ground.row_s == 0.05 and ground.source == "as you say"
    assert stages[StageName.SEGMENT].rate is None and found.hours is None and found.price is None
    gpu_hours = stages[GROUND].gpu_hours
    assert gpu_hours and gpu_hours.expected == pytest.approx(5000 / 20 / HOUR_S)
    known = forecast(recipe(*POOLS), SAMPLE, 10_000, machines, {GROUND: 20.0, StageName.SEGMENT: 20.0})
    assert known.hours is not None


def test_on_machines_without_gpus_the_sample_counts():
    found = forecast(recipe(*POOLS), SAMPLE, 10_000, Machines(((16, 0),)), {GROUND: 20.0})
    assert {one.rate.source for one in found.stages if one.rate} == {"this sample"}
    assert all(one.gpu_hours is None for one in found.stages)


def test_pools_are_balanced_as_far_as_there_is_room():
    one, other = Pool(stages=(CAPTION,), cpus=1), Pool(stages=(GROUND,), cpus=1)
    assert balanced([one, other], [1.0, 3.0], [(8, 0)], most=100) == [2, 6]
    assert balanced([one, other], [1.0, 3.0], [(4, 0), (4, 0)], most=4) == [4, 4]
    assert balanced([one, other], [0.0, 0.0], [(2, 0)], most=100) == [1, 1]
    fixed = one.model_copy(update={"workers": 5})
    assert balanced([fixed, other], [1.0, 3.0], [(8, 0)], most=100) == [5, 3]
    assert sum(balanced([one, other], [1.0, 3.0], [(96, 8)] * 1000, most=10**6)) == 96_000
    with pytest.raises(RunError, match="not all fit 1 machines of 1 CPU and 0 GPU each at the same time"):
        balanced([one, other], [1.0, 1.0], [(1, 0)], most=100)


def test_there_are_no_more_workers_than_slices():
    found = forecast(recipe("slice_rows=100"), SAMPLE, 250, Machines(((64, 0),)), {})
    assert found.workers == {"fetch+screen": 3, "caption+tag+ground+segment+select": 3}


def test_what_ran_on_a_gpu_says_nothing_of_a_cpu_and_no_row_says_nothing_at_all():
    on_gpu = dataclasses.replace(SAMPLE, on_gpu=True)
    found = forecast(recipe(*POOLS), on_gpu, 10_000, Machines(((16, 0),)), {})
    assert {one.stage for one in found.stages if one.rate is None} == {CAPTION, GROUND, StageName.SEGMENT}
    assert found.hours is None
    none_came = dataclasses.replace(SAMPLE, tallies={k: v for k, v in TALLIES.items() if k is not GROUND})
    assert forecast(recipe(), none_came, 10_000, Machines(((16, 0),)), {}).hours is None


def test_a_sample_is_of_different_rows_of_the_whole_input_with_their_images(tmp_path):
    write_images(tmp_path / "images", 40)
    rows = open_source(SourceSettings(path=str(tmp_path / "images")), str(tmp_path / "whole"))
    some = sampled_rows(rows, 8, str(tmp_path / "some"))
    samples, every = some.read(0, some.rows), {s.url: s.image for s in rows.read(0, rows.rows)}
    assert len({s.url for s in samples}) == some.rows == 8
    assert all(every[s.url] == s.image for s in samples)
    assert max(list(every).index(s.url) for s in samples) > rows.rows // 2
    assert sampled_rows(rows, 1000, str(tmp_path / "some")).rows == rows.rows, "not the sample that is there"


def stopped_and_resumed(folder: Path, provenance: Provenance) -> Store:
    """A sample of two slices, each with a kept row, one that grounding dropped and one that failed to download; the
    second of them was annotated by a later run."""
    store = Store(str(folder))
    for index in range(2):
        kept, dropped, failed = (kept_sample(3 * index + k) for k in range(3))
        dropped = dropped.replace(verdict=None).dropped(GROUND, Reason.TOO_FEW_BOXES)
        failed = Sample(row=failed.row).failed(StageName.FETCH, Reason.TIMEOUT)
        write_shard(store, "shard", Slice(index, (kept, dropped, failed)), provenance)
    record(store, {StageName.FETCH: Tally(6, failed=2, busy_s=12.0, batches=2)}, 12.0, [(2, 0)])
    timed = {stage: Tally(2, busy_s=3.0) for stage in (StageName.SCREEN, CAPTION, StageName.TAG, GROUND)}
    timed |= {stage: Tally(1, busy_s=5.0) for stage in (StageName.SEGMENT, StageName.SELECT)}
    record(store, timed, 20.0, [(4, 1)])
    return store


def test_a_sample_that_was_stopped_and_resumed_counts_whole(tmp_path, provenance):
    sampled, nodes = read_sample(stopped_and_resumed(tmp_path, provenance), recipe())
    assert (sampled.rows, sampled.kept, nodes) == (6, 2, [(4.0, 1.0)])
    assert {stage: tally.rows for stage, tally in sampled.tallies.items()} == {
        **dict.fromkeys([StageName.SCREEN, CAPTION, StageName.TAG, GROUND], 4),
        StageName.FETCH: 6,
        StageName.SEGMENT: 2,
        StageName.SELECT: 2,
    }
    assert [sampled.tallies[stage].busy_s for stage in (StageName.FETCH, CAPTION, StageName.SELECT)] == [12, 6, 10]
    found = forecast(recipe(), sampled, 600, Machines(((4, 0),)), {})
    assert [one.rows.expected for one in found.stages] == pytest.approx([600, *[400] * 4, 200, 200])


@pytest.mark.parametrize(
    ("recorded", "says"),
    [
        (b'{"elapsed_s": 1, "stages": {"fetch": {"rows": 6}}}', "not what this release records"),
        (b'{"elapsed_s": 1, "stages": {"fetch": {"lines": 6}}, "nodes": [[2, 0]]}', "not what this release records"),
        (b'{"elapsed_s": 1, "stages": {"fetch": {"rows": 6}}, "nodes": [[2, 0]]}', "how long screen, caption, tag"),
        (b"", "no run has ended here"),
    ],
)
def test_a_folder_that_does_not_tell_how_long_its_sample_took_is_one_line(tmp_path, provenance, recorded, says):
    store = stopped_and_resumed(tmp_path, provenance)
    store.put(THROUGHPUT_FILE, recorded)
    with pytest.raises(RunError, match=says) as refused:
        read_sample(store, recipe())
    assert "another --out" in str(refused.value)


def test_the_wait_for_the_slowest_hosts_counts_once_for_each_slice():
    """100 rows in 50 seconds, of which 40 went by until the last had come."""
    fetched = Tally(rows=100, failed=10, busy_s=50.0, batches=1, tail_s=40.0)
    tail = dataclasses.replace(SAMPLE, tallies={**TALLIES, StageName.FETCH: fetched})
    found = forecast(recipe("slice_rows=1000"), tail, 100_000, Machines(((4, 0),)), {})
    assert found.stages[0].rate and found.stages[0].rate.row_s == pytest.approx((10 + 4) / 100)
    small = forecast(recipe("slice_rows=50"), tail, 100_000, Machines(((4, 0),)), {})
    assert small.stages[0].rate and small.stages[0].rate.row_s == pytest.approx(50 / 100)


def test_what_is_beyond_the_first_nine_tenths_is_the_tail():
    assert tail_of([]) == tail_of([3.0]) == 0
    assert tail_of([k / 10 for k in range(1, 101)]) == pytest.approx(0)
    assert tail_of([*(k / 10 for k in range(1, 100)), 40.0]) == pytest.approx(30)


def test_plan_runs_the_sample_and_prints_what_the_whole_would_take(tmp_path):
    write_images(tmp_path / "images", 60)
    words = ["plan", TOY_RECIPE, "--input", tmp_path / "images", "--set", "toyworld=null", "--sample", 16]
    words += ["--for", 76_000_000, "--nodes", 4, "--cpus", 64, "--out", tmp_path / "sample", "--json"]

    def planned(*more: str) -> tuple[dict[str, Any], str]:
        every = [sys.executable, "-m", "sdd", *map(str, words), *more]
        done = subprocess.run(every, cwd=PROJECT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    found, said = planned("--price", "2.5")
    assert said.count("starting Ray") == 1
    assert (found["rows"], found["sampled"]) == (76_000_000, 16)
    assert [stage["stage"] for stage in found["stages"]][:2] == ["fetch", "screen"]
    assert found["price"]["expected"] == pytest.approx(found["hours"]["expected"] * 10)
    assert found["machines"]["nodes"] == [[64, 0]] * 4
    dearer, said = planned("--price", "5")
    assert "this sample is there already" in said and "starting Ray" not in said
    assert dearer["price"]["expected"] == pytest.approx(2 * found["price"]["expected"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--rate", "ground"), "--rate ground: not a stage and its images/s, such as ground=20"),
        (("--rate", "draw=3"), "--rate draw=3: not a stage"),
        (("--rate", "ground=0"), "a rate is a number above 0"),
        (("--rate", "ground=inf"), "a rate is a number above 0"),
        (("--rate", "ground=5"), "these have a model on a GPU: none"),
        (("--cpus", "inf"), "--cpus inf: not a number of anything"),
        (("--gpus", "0.5"), "--gpus 0.5: a machine has whole ones"),
        (("--cpus", "0.5"), "run.fetch_cpus asks for 1 CPU on one machine, and they have 0.5"),
        (("--ray-address", "127.0.0.1:1"), "--ray-address needs --out"),
        (("--input", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_planned_is_one_line(refused, words, says):
    assert says in refused("plan", TOY_RECIPE, *words)


def test_of_a_hugging_face_dataset_the_first_rows_are_read_where_it_is_told_how_many_there_are(
    sdd, tmp_path, monkeypatch
):
    def refuse(recipe: Recipe, rows: InputRows, *_: object) -> None:
        raise RunError(f"asked for {rows.rows} rows")

    monkeypatch.setattr("datapipe.run.run", refuse)
    urls = [f"http://a.b/{row}.jpg" for row in range(40)]
    Dataset.from_dict({"url": urls, "caption": ["a mug"] * len(urls)}).save_to_disk(tmp_path / "set")
    words = ("--input", tmp_path / "set", "--set", "toyworld=null", "--set", "source.kind=hf", "--sample", 7)
    for more, read in (
        ((), "40 rows: a Hugging Face dataset"),
        (("--for", 9000), "7 rows: the first of a Hugging Face dataset"),
    ):
        code, _, said = sdd("plan", TOY_RECIPE, *words, *more)
        assert code == 2 and read in said and "asked for 7 rows" in said


def test_a_dataset_is_no_place_for_a_sample(refused, made, tmp_path):
    write_images(tmp_path / "images", 12)
    words = ("--input", tmp_path / "images", "--set", "toyworld=null", "--out", made.folder)
    assert "holds a dataset; name a folder for the sample alone" in refused("plan", TOY_RECIPE, *words)
