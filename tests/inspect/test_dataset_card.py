"""The dataset card says what is in the folder, in the hub's format, and its code loads the shards."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from huggingface_hub import DatasetCard

from datapipe.inspect.dataset_card import dataset_card
from datapipe.schema import Outcome, Slice
from datapipe.shards import Store, iter_tables, write_shard
from tests.conftest import kept_sample


@pytest.fixture(scope="module")
def text(made) -> str:
    return dataset_card(made.store)


@pytest.fixture(scope="module")
def kept(made) -> int:
    return sum(
        row == Outcome.KEPT for t in iter_tables(made.store, columns=["outcome"]) for row in t["outcome"].to_pylist()
    )


def offline(code: str, folder, cache) -> str:
    """What code prints, in a process that may not reach any hub."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_hub_reads_its_header(text):
    data = DatasetCard(text).data.to_dict()
    assert data["size_categories"] == ["n<1K"]
    assert data["configs"][0]["data_files"] == [{"split": "train", "path": "shard-*.tar"}]


def test_it_tells_counts_models_and_recipe(text, made, kept):
    run = json.loads((made.folder / "run.json").read_text())
    assert f"\n{kept} images" in text
    assert all(model in text for model in run["models"].values())
    assert "\n| select.min_score | 0.88 |\n" in text
    assert "opt-outs were honored: 0 rows" in text
    assert re.search(r"\| select \| too_few_entities \| \d+ \|", text)


SAMPLE = ("print(sample['jpg'].size, sample['json']['entities'][0]['tag'])", r"\(\d+, \d+\) \w+\n")


@pytest.mark.parametrize(
    ("reader", "then", "printed"),
    [
        ("datasets", *SAMPLE),
        ("webdataset", *SAMPLE),
        ("duckdb", "", r"(?s).*http_status.*"),
        ("polars", "print(captions.columns, len(captions))", r"\['key', 'caption'\] {kept}\n"),
    ],
)
def test_the_lines_that_it_shows_read_the_folder(text, made, kept, tmp_path, reader, then, printed):
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (code,) = (block for block in blocks if re.search(rf"^(import|from) {reader}\b", block, re.MULTILINE))
    assert re.fullmatch(printed.format(kept=kept), offline(f"{code}\n{then}", made.folder, tmp_path))


def test_every_line_that_it_shows_is_run_by_a_test(text):
    assert text.count("```python") == 4


def test_datasets_reads_every_kept_sample_and_nothing_of_the_raw_shards(text, copied, kept, tmp_path):
    (copied / "README.md").write_text(text)
    code = "import datasets; d = datasets.load_dataset({}, split='train'); print(len(d), d[0]['json']['caption'])"
    by_builder = offline(code.format("'webdataset', data_files={'train': 'shard-*.tar'}"), copied, tmp_path / "a")
    by_card = offline(code.format(repr(str(copied))), copied, tmp_path / "b")
    assert by_builder.split()[0] == str(kept)
    assert by_card == by_builder


def test_text_of_the_web_is_escaped(tmp_path, provenance):
    store = Store(str(tmp_path))
    hostile = kept_sample(0).replace(licence="x | <script>alert(1)</script> [y](javascript:alert(1))\n# z")
    write_shard(store, "shard", Slice(0, (hostile,)), provenance)
    (line,) = (line for line in dataset_card(store).splitlines() if "script" in line)
    assert line.startswith(r"| x \| &lt;script&gt;alert\(1\)&lt;/script&gt; \[y\]\(javascript:")


def test_the_card_goes_into_the_folder(sdd, refused, copied, tmp_path):
    assert sdd("card", copied)[0] == 0
    assert (copied / "README.md").read_text().startswith("---\n")
    assert "no shards here" in refused("card", tmp_path)
