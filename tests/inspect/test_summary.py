"""The tables agree with what was written."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType

from datapipe.inspect import count_manifests, summarize
from datapipe.schema import Outcome, Reason, StageName
from datapipe.shards import Store, write_shard
from subject_diffusion.errors import ShardError
from tests.shards.test_commit import mixed_slice


@pytest.fixture
def store(tmp_path, provenance) -> Store:
    """Two shards of three kept, one dropped and one failed row each."""
    store = Store(str(tmp_path))
    for index in range(2):
        write_shard(store, "shard", mixed_slice(index), provenance)
    return store


def printed(what: RenderableType) -> list[list[str]]:
    """Lines as words."""
    console = Console(file=io.StringIO(), width=120)
    console.print(what)
    return [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]  # of StringIO


def test_every_row_is_counted_once(store):
    totals, summary = count_manifests(store), summarize(store)
    assert (totals.shards, totals.rows, summary.rows) == (2, 10, 10)
    assert totals.outcomes == {Outcome.KEPT: 6, Outcome.DROPPED: 2, Outcome.FAILED: 2}
    assert summary.losses == {
        (StageName.SELECT, Reason.TOO_FEW_ENTITIES, Outcome.DROPPED): 2,
        (StageName.FETCH, Reason.TIMEOUT, Outcome.FAILED): 2,
    }
    assert summary.entities_per_image == {1: 6}
    assert summary.tags == {"mug": 6}  # the refused candidates are no entities


def test_one_shard_can_be_summarized_alone(store):
    assert count_manifests(store, 1).rows == summarize(store, 1).rows == 5


def test_the_funnel_runs_from_the_input_to_the_kept_rows_in_the_order_of_the_stages(store):
    lines = [line for line in printed(summarize(store).funnel()) if line]
    assert lines[2:] == [
        ["input", "10"],
        ["fetch", "timeout", "failed", "-2", "8"],
        ["select", "too_few_entities", "dropped", "-2", "6"],
        ["kept", "6"],
    ]


def test_the_tables_name_totals_and_tags(store):
    assert ["2", "10", "6", "2", "2", "0.0", "MB"] in printed(count_manifests(store))
    assert ["mug", "6"] in printed(summarize(store))


def test_a_sidecar_that_cannot_be_read_is_named(store, tmp_path):
    (tmp_path / "shard-000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(ShardError, match=r"shard-000001\.parquet"):
        summarize(store)


@pytest.mark.parametrize(("shard", "what"), [(None, "no shards"), (7, "no shard 7")])
def test_nothing_to_summarize_is_said(tmp_path, shard, what):
    with pytest.raises(ShardError, match=what):
        count_manifests(Store(str(tmp_path)), shard)
