"""The dataset card: what a stranger must know before using a dataset, in the format of the Hugging Face hub."""

from __future__ import annotations

import yaml

from datapipe.backends.hub import licence_of
from datapipe.inspect.overview import overview
from datapipe.inspect.pages import markdown_page
from datapipe.inspect.statistics import MOST_ROWS, Statistics, choose_shards, statistics_rows
from datapipe.plan import RunRecord, read_run
from datapipe.schema import Outcome, Reason, StageName
from datapipe.shards import RUN_FILE, Manifest, Store

CARD_FILE = "README.md"
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
_LARGER = "n>10M"


def dataset_card(store: Store, tables: str = "") -> str:
    """The card. `tables`: the pattern of the parquet files that the images lie in, where they are in no tars. Raises
    ShardError."""
    run = read_run(store) if store.exists(RUN_FILE) else None
    every, looked_into = choose_shards(store, seed=0, most_rows=MOST_ROWS)
    statistics = Statistics()
    for row in statistics_rows(store, looked_into):
        statistics.add(row)
    numbers = overview(store, every, looked_into, statistics, run)
    kept = sum(m.counts.get(Outcome.KEPT.value, 0) for m in every)
    return markdown_page(
        "card",
        header=_header(numbers["name"], kept, tables),
        tables=tables,
        rows_kept=f"{kept:,}",
        labelers=[(stage, model, licence_of(model)) for stage, model in numbers["models"]],
        opt_out_words=_opt_outs(every, run),
        **numbers,
    )


def _header(name: str, kept: int, tables: str) -> str:
    """The YAML that the hub reads: it names the tars, so that `raw-*` are no part of the dataset, or the tables."""
    size = next((name for limit, name in _SIZES if kept < limit), _LARGER)
    fields = {
        "annotations_creators": ["machine-generated"],
        "license": "other",
        "size_categories": [size],
        "task_categories": ["text-to-image", "image-to-text", "object-detection", "image-segmentation"],
        "pretty_name": name,
        "tags": [*([] if tables else ["webdataset"]), "subject-driven-generation"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": tables or "shard-*.tar"}]}],
    }
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).strip()


def _opt_outs(every: list[Manifest], run: RunRecord | None) -> str:
    found = sum(m.reasons.get(f"{StageName.FETCH.value}/{Reason.OPT_OUT.value}", 0) for m in every)
    if run is None:
        return f"{found:,} rows were left out because their server opts out of such use (`X-Robots-Tag`)."
    if run.recipe.fetch.respect_opt_outs:
        return f"`X-Robots-Tag` opt-outs were honored: {found:,} rows were left out for one."
    return "`X-Robots-Tag` opt-outs were recorded but **not** honored (`fetch.respect_opt_outs` is off)."
