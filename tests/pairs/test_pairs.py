"""`sdd pairs`, whole: from committed shards to what training draws."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datapipe import cluster
from datapipe.inspect.pair_agreement import agreement, named
from datapipe.inspect.pair_audit import PairQuestioning, pair_precision, pair_precisions
from datapipe.inspect.report import report_page
from datapipe.pairs.embed import embeddings_name
from datapipe.pairs.run import find_pairs
from datapipe.pairs.settings import DecideSettings, settings_of
from datapipe.schema import IDENTITIES, SCHEMA_VERSION
from datapipe.schema.pairs import GIVEN_IDENTITIES, PAIRS, PAIRS_SCHEMA
from datapipe.shards import RUN_FILE, Store, kept_samples
from sdd.pairing import TOY_ENCODER_ALONE
from subject_diffusion.errors import QueryError, RecipeError, RunError, SddError
from subject_diffusion.settings import load_settings
from tests.nodes import Nodes
from tests.pairs.conftest import SHARDS, embed_here
from tests.toy import PROJECT
from toyworld.recipe import ToyRecipe
from train.stream.cache import ShardCache
from train.stream.source import Source
from train.trainer.identities import Pairs


@pytest.fixture(scope="module")
def searched(look_alike_dataset: Path, tmp_path_factory) -> Path:
    """With its pairs found, all in this process."""
    folder: Path = tmp_path_factory.mktemp("searched") / "dataset"
    shutil.copytree(look_alike_dataset, folder)
    store = Store(str(folder))
    for shard in range(SHARDS):
        embed_here(store, shard)
    find_pairs(store, settings_of(store, []))
    return folder


@pytest.fixture
def again(searched: Path, tmp_path: Path) -> Store:
    """A copy, in which Ray must not be needed again unless a test says so."""
    return Store(str(shutil.copytree(searched, tmp_path / "dataset")))


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str | None) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster, "connected", refuse)


# A process of its own, because Ray keeps to the authentication that the first cluster of a process has.
IN_PARTS = """
import sys
from datapipe.pairs import run
from datapipe.pairs.settings import settings_of
from datapipe.shards import Store

run.PAIRS_PER_PART = 200
store = Store(sys.argv[1])
run.find_pairs(store, settings_of(store, ["search.part_entities=60"]), sys.argv[2])
"""


def test_two_nodes_that_lose_a_worker_go_on_from_a_killed_search_to_the_same_bytes(
    searched, look_alike_dataset, nodes: Nodes, tmp_path
):
    folder = shutil.copytree(look_alike_dataset, tmp_path / "dataset")
    embed_here(Store(str(folder)), 0)
    before = (folder / "pairs" / embeddings_name(0)).stat().st_mtime_ns
    finding = subprocess.Popen([sys.executable, "-c", IN_PARTS, folder, nodes.address], cwd=PROJECT)
    while len(list(folder.glob("pairs/embeddings-*"))) == 1:
        assert finding.poll() is None
        time.sleep(0.05)
    os.kill(a_worker_of(nodes), signal.SIGKILL)
    assert finding.wait() == 0
    assert (folder / "pairs" / embeddings_name(0)).stat().st_mtime_ns == before, "made again"
    for kind in ("neighbors", "scores"):
        assert len(list(folder.glob(f"pairs/{kind}-*"))) > 1
    names = [PAIRS, IDENTITIES, *(f"pairs/{embeddings_name(shard)}" for shard in range(SHARDS))]
    assert {name: (folder / name).read_bytes() for name in names} == {
        name: (searched / name).read_bytes() for name in names
    }


def a_worker_of(nodes: Nodes) -> int:
    """The process of an actor that has work."""
    every = [process for node in nodes.alive for process in psutil.Process(node.pid).children(recursive=True)]
    found: int = next(process.pid for process in every if "MapWorker" in process.cmdline()[0])
    return found


def test_look_alikes_are_told_apart_from_other_pictures_of_the_same_one(searched):
    found = agreement(Store(str(searched)))
    assert found is not None and found.precision > 0.9 and found.recall > 0.4, str(found)


def test_every_candidate_is_told_with_its_scores_and_its_verdict(searched):
    table = pq.read_table(searched / PAIRS)
    assert table.schema.equals(PAIRS_SCHEMA)
    pairs = table.to_pylist()
    assert len({(p["key_a"], p["entity_a"], p["key_b"], p["entity_b"]) for p in pairs}) == len(pairs)
    assert {"same_picture", "unlike", "ambiguous"} & {p["rejected"] for p in pairs}
    for p in pairs:
        assert (p["rejected"] is None) == (p["identity"] is not None)
        assert -1 <= p["similarity"] <= 1.001 and -1 <= p["patch_similarity"] <= 1.001
        if p["rejected"] is None:
            assert p["key_a"] != p["key_b"] and p["rank_a"] and p["rank_b"]


def test_training_draws_what_was_found(searched, tmp_path):
    pairs = Pairs([Source(str(searched))], ShardCache(tmp_path / "cache", 10**9))
    named = pq.read_table(searched / IDENTITIES).to_pylist()
    assert len(pairs) == len(named) > 0
    tags = {s.key: [e.tag for e in s.entities] for s in kept_samples(Store(str(searched)))}
    identities: dict[str, set[str]] = {}
    for row in named:
        identities.setdefault(row["identity"], set()).add(tags[row["key"]][row["entity"]])
    assert all(len(nouns) == 1 for nouns in identities.values())


def test_other_thresholds_need_neither_model_nor_ray(again, no_ray):
    before = pq.read_table(again.root + "/" + PAIRS).to_pylist()
    strict = find_pairs(again, settings_of(again, ["decide.min_margin=0.9"]))
    lax = find_pairs(again, settings_of(again, ["decide.min_margin=0", "decide.min_similarity=0.6"]))
    assert 0 <= strict.rejected.get(None, 0) < lax.rejected[None]
    defaults = [f"decide.{name}={getattr(DecideSettings(), name)}" for name in ("min_margin", "min_similarity")]
    find_pairs(again, settings_of(again, defaults))
    assert pq.read_table(again.root + "/" + PAIRS).to_pylist() == before


def test_given_identities_are_kept_beside_the_found_ones(searched, look_alike_dataset):
    assert (searched / GIVEN_IDENTITIES).read_bytes() == (look_alike_dataset / IDENTITIES).read_bytes()


def test_images_that_look_like_a_benchmarks_are_kept_out(again, no_ray, tmp_path):
    sample = next(iter(kept_samples(again)))
    benchmark = tmp_path / "benchmark" / "mug"
    benchmark.mkdir(parents=True)
    (benchmark / "0.jpg").write_bytes(sample.image or b"")
    picture = Image.open(benchmark / "0.jpg")
    picture.resize((100, 100)).save(benchmark / "0.jpg", quality=60)
    find_pairs(again, settings_of(again, []), exclude=str(tmp_path / "benchmark"))
    touched = [p for p in pq.read_table(again.root + "/" + PAIRS).to_pylist() if sample.key in (p["key_a"], p["key_b"])]
    assert touched and {p["rejected"] for p in touched} <= {"excluded", "same_picture"}
    assert sample.key not in {row["key"] for row in pq.read_table(again.root + "/" + IDENTITIES).to_pylist()}


@pytest.mark.parametrize(
    ("overrides", "exclude", "kind", "line"),
    [
        (["decide.min_margni=1"], None, RecipeError, "unknown key decide.min_margni; did you mean decide.min_margin"),
        (["embed.model=nowhere"], None, SddError, "embed.model nowhere: no such folder or file"),
        (["embed.model=toyworld/weights/sam"], None, SddError, "a model of type sam, where dinov2 or"),
        ([], "nowhere", RunError, "--exclude nowhere: no such folder"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(again, no_ray, overrides, exclude, kind, line):
    with pytest.raises(kind, match=line):
        find_pairs(again, settings_of(again, overrides), exclude=exclude)


def test_a_folder_without_shards_is_told(tmp_path, no_ray):
    with pytest.raises(SddError, match="no shards here"):
        find_pairs(Store(str(tmp_path)), settings_of(Store(str(tmp_path)), []))


def test_the_report_shows_pairs_side_by_side_on_both_sides_of_a_threshold(searched):
    page = report_page(Store(str(searched)))
    section = page[page.index('<section id="pairs">') :]
    section = section[: section.index('<section id="lost">')]
    assert "decide.min_similarity" in section and "against the given identities: precision" in section
    passed, refused = (
        [float(text) for text in re.findall(r'<span class="note">\w+ (-?[\d.]+)</span>', side)]
        for side in section.partition("decide.min_similarity")[2].partition("<h3>")[0].split("just refused")
    )
    assert min(passed) >= DecideSettings().min_similarity > max(refused) and len(passed) % 2 == len(refused) % 2 == 0
    assert passed[::2] == passed[1::2], "both entities of a candidate, with its value"
    assert section.count('class="card"') == section.count("data-candidate=")


def test_a_dataset_without_pairs_has_a_report_without_them(look_alike_dataset):
    assert '<section id="pairs">' not in report_page(Store(str(look_alike_dataset)))


def test_an_audit_by_someone_who_knows_has_the_true_precision(again):
    questioning = PairQuestioning(again, 60, 0)
    assert 30 < len(questioning.asked) <= 61
    given = named(again, GIVEN_IDENTITIES)
    marks = {}
    for name in questioning.asked:
        _, key_a, a, key_b, b = name.split("/")
        marks[name] = given[key_a, int(a)] == given[key_b, int(b)]
    questioning.receive(marks)
    found = pair_precisions(questioning.audit.marks)
    assert found["pair"].marked == 30 and found["pair"].low < found["pair"].share <= found["pair"].high
    assert found["pair"].share > 0.9
    assert sum(p.marked for p in found.values()) == len(questioning.asked)
    assert PairQuestioning(again, 60, 0).audit.marks == marks, "they are kept"
    assert "By audit: precision" in pair_precision(again)
    with pytest.raises(ValueError, match="not marks"):
        questioning.receive({"pair/0/0/0/0": True})


def test_marks_of_other_pairs_are_refused(again, no_ray):
    questioning = PairQuestioning(again, 10, 0)
    questioning.receive({questioning.asked[0]: True})
    find_pairs(again, settings_of(again, ["decide.min_margin=0.9"]))
    with pytest.raises(QueryError, match="its marks are of other pairs"):
        PairQuestioning(again, 10, 0)


def test_an_audit_needs_pairs(look_alike_dataset, sdd):
    code, _, said = sdd("audit", look_alike_dataset, "--pairs", "--results")
    assert code == 2 and "no pairs.parquet; `sdd pairs" in said and said.count("\n") == 1


def test_the_page_asks_of_two_pictures_whether_they_show_the_same(again, opened):
    questioning = PairQuestioning(again, 10, 0)
    page = opened(questioning.page())
    assert page.locator("#stage .picture").count() == 2
    assert "the very same" in page.locator("#question").inner_text()


def test_images_of_any_kind_stay_kept_out_with_other_thresholds(again, no_ray, tmp_path):
    samples = dict(zip(("0.gif", "1.TIFF"), kept_samples(again), strict=False))
    for name, sample in samples.items():
        Image.open(io.BytesIO(sample.image or b"")).save(tmp_path / name)
    (tmp_path / "._0.gif").write_bytes(b"what macOS leaves")
    find_pairs(again, settings_of(again, []), exclude=str(tmp_path))
    find_pairs(again, settings_of(again, ["decide.min_margin=0"]))
    named = {row["key"] for row in pq.read_table(again.root + "/" + IDENTITIES).to_pylist()}
    assert named and named.isdisjoint(sample.key for sample in samples.values())


def test_an_image_that_cannot_be_kept_out_is_told(again, no_ray, tmp_path):
    (tmp_path / "0.tif").write_bytes(b"no image")
    with pytest.raises(RunError, match=r"0\.tif: cannot be read: .*; an image that is not seen is not kept out"):
        find_pairs(again, settings_of(again, []), exclude=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("pairs/settings.json", "pairs/settings.json: damaged; remove it, and give --set again"),
        ("pairs/excluded.json", "pairs/excluded.json: damaged; remove it, and give --exclude again"),
        (IDENTITIES, "identities.parquet: no parquet file"),
        (GIVEN_IDENTITIES, "identities-given.parquet: no parquet file"),
    ],
)
def test_a_damaged_file_is_told_before_any_work(again, no_ray, name, line):
    pairs = Path(again.root, PAIRS)
    pairs.unlink()
    Path(again.root, name).write_bytes(b"[{")
    with pytest.raises(RunError, match=line):
        find_pairs(again, settings_of(again, []))
    assert not pairs.exists()


def test_the_commit_of_a_model_is_not_asked_of_another(tmp_path):
    store = Store(str(tmp_path))
    kept = {"embed": {"model": "facebook/dinov2-base", "revision": "0" * 40, "grid": 3}}
    Store(f"{store.root}/pairs").put("settings.json", json.dumps(kept).encode())
    same = settings_of(store, ["embed.model=facebook/dinov2-base"]).embed
    assert (same.revision, same.grid) == ("0" * 40, 3)
    other = settings_of(store, ["embed.model=facebook/dinov2-large"]).embed
    assert (other.model, other.revision, other.grid) == ("facebook/dinov2-large", None, 3)
    chosen = settings_of(store, ["embed.model=facebook/dinov2-large", "embed.revision=v1"]).embed
    assert chosen.revision == "v1"


@pytest.mark.parametrize(("recipe", "is_said"), [("toy", False), ("sdd", True)])
def test_the_toy_encoder_says_that_it_knows_no_photographs(again, no_ray, sdd, recipe, is_said):
    identity = load_settings(ToyRecipe, recipe).identity()
    record = {"schema_version": SCHEMA_VERSION, "parts": [], "models": {}, "recipe": identity}
    again.put(RUN_FILE, json.dumps(record).encode())
    code, said, _ = sdd("pairs", again.root)
    assert code == 0 and (TOY_ENCODER_ALONE in said) is is_said
