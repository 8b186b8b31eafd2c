"""Distributions over a dataset, in one pass over as many of its shards as can be looked at in reasonable time."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from datapipe.inspect.sidecars import select
from datapipe.progress import THROUGHPUT_FILE
from datapipe.schema import RLE, Outcome, Reason, StageName
from datapipe.shards import Manifest, Store, manifests
from subject_diffusion.errors import ShardError

MOST_ROWS = 100_000
"""Rows beyond which only some shards, chosen at random, are looked into."""

Row = dict[str, Any]
"""A row of `COLUMNS`, each of its candidates with `area`, `aspect`, `mask_fill` and `mask_area` added."""

COLUMNS = """shard, row, key, url, alt_text, licence, opt_out, original_width, original_height, caption, outcome, stage,
    reason, detail, width, height, candidates, thumbnail IS NOT NULL AS pictured"""


@dataclass
class Histogram:
    """`edges`: ascending; bin i holds values from edges[i] up to below edges[i + 1], the last bin all that is above."""

    title: str
    edges: tuple[float, ...]
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = [0] * len(self.edges)

    def add(self, value: float) -> None:
        self.counts[max(bisect.bisect_right(self.edges, value) - 1, 0)] += 1

    @property
    def total(self) -> int:
        return sum(self.counts)


def _steps(start: float, stop: float, count: int) -> tuple[float, ...]:
    return tuple(start + (stop - start) * i / count for i in range(count))


def _histograms() -> dict[str, Histogram]:
    half_octaves = tuple(2 ** (i / 2) for i in range(-6, 7))
    return {
        "entities": Histogram("entities per image", tuple(range(1, 11))),
        "area": Histogram("box area / image area", _steps(0, 1, 20)),
        "aspect": Histogram("box width / height", half_octaves),
        "mask_fill": Histogram("mask area inside the box / box area", _steps(0, 1, 20)),
        "score": Histogram("score of an entity", _steps(0, 1, 20)),
        "text_score": Histogram("text score of an entity", _steps(0, 1, 20)),
        "predicted_iou": Histogram("mask IoU as SAM predicts it", _steps(0, 1, 20)),
        "words": Histogram("words in a caption", tuple(range(0, 41, 2))),
        "long_side": Histogram("longer side of the original, px", tuple(64 * 2 ** (i / 2) for i in range(15))),
        "image_aspect": Histogram("image width / height", half_octaves),
    }


@dataclass
class Statistics:
    """Counts of the rows that were looked at. `losses`: lost rows by (stage, reason, outcome)."""

    rows: int = 0
    kept: int = 0
    entities: int = 0
    histograms: dict[str, Histogram] = field(default_factory=_histograms)
    losses: Counter[tuple[StageName, Reason, Outcome]] = field(default_factory=Counter)
    tags: Counter[str] = field(default_factory=Counter)
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Images that hold both tags of an (alphabetical) pair."""
    hosts: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    opt_outs: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row) -> None:
        self.rows += 1
        if row["opt_out"]:
            self.opt_outs[row["opt_out"]] += 1
        if row["reason"] is not None:
            self.losses[StageName(row["stage"]), Reason(row["reason"]), Outcome(row["outcome"])] += 1
        if row["outcome"] != Outcome.KEPT.value:
            return
        self.kept += 1
        self.hosts[_host(row["url"])] += 1
        self.licences[row["licence"] or "not stated"] += 1
        entities = [c for c in row["candidates"] if c["rejected"] is None]
        self.entities += len(entities)
        tags = sorted({e["tag"] for e in entities})
        self.tags.update(e["tag"] for e in entities)
        self.pairs.update(itertools.combinations(tags, 2))
        self._add("entities", len(entities))
        self._add("words", len(row["caption"].split()))
        self._add("long_side", max(row["original_width"], row["original_height"]))
        self._add("image_aspect", row["width"] / row["height"])
        for entity in entities:
            for name in ("area", "aspect", "mask_fill", "score", "text_score", "predicted_iou"):
                if entity[name] is not None:
                    self._add(name, entity[name])

    def _add(self, name: str, value: float) -> None:
        self.histograms[name].add(value)


def choose_shards(store: Store, seed: int, most_rows: int) -> tuple[list[Manifest], list[Manifest]]:
    """All manifests; and those of the shards to look into, in order: all, or enough of them for `most_rows`. Raises
    ShardError when there are none."""
    every = list(manifests(store, "shard"))
    if not every:
        raise ShardError(f"{store.root}: no shards here; `sdd dataset --out {store.root}` makes them")
    if sum(m.rows for m in every) <= most_rows:
        return every, every
    shuffled = random.Random(seed).sample(every, len(every))
    ends = list(itertools.accumulate(m.rows for m in shuffled))
    chosen = shuffled[: max(1, bisect.bisect_right(ends, most_rows))]
    return every, sorted(chosen, key=lambda m: m.index)


def statistics_rows(store: Store, chosen: Iterable[Manifest]) -> Iterator[Row]:
    """The rows of some shards, as the statistics take them. Corrupt candidates, of which `verify` tells, are left
    out."""
    for row in select(store, COLUMNS, shards=chosen):
        measured = []
        for candidate in row["candidates"]:
            with contextlib.suppress(ArithmeticError, TypeError, ValueError):
                measured.append(candidate | _measures(candidate, row["width"], row["height"]))
        yield row | {"candidates": measured}


def throughput(store: Store) -> list[tuple[str, int, float]]:
    """(stage, rows, seconds a worker was busy with them), summed over the folder's runs; empty where none told."""
    if not store.exists(THROUGHPUT_FILE):
        return []
    rows: Counter[str] = Counter()
    seconds: dict[str, float] = {}
    for line in store.read(THROUGHPUT_FILE).splitlines():
        for stage, tally in json.loads(line)["stages"].items():
            rows[stage] += tally["rows"]
            seconds[stage] = seconds.get(stage, 0.0) + tally["busy_s"]
    return [(s.value, rows[s.value], seconds[s.value]) for s in StageName if s.value in seconds]


def _measures(candidate: dict[str, Any], width: int, height: int) -> dict[str, float | None]:
    x1, y1, x2, y2 = candidate["box"]
    box = max(x2 - x1, 0) * max(y2 - y1, 0)
    if not math.isfinite(box):
        raise ValueError(f"a box of {box} pixels")
    mask = candidate["mask"]
    fill = mask_area = None
    if mask is not None and box:
        encoded = RLE(tuple(mask["size"]), mask["counts"])
        fill, mask_area = encoded.area_within((x1, y1, x2, y2)) / box, encoded.area / box
    aspect = (x2 - x1) / (y2 - y1) if y2 > y1 else 0.0
    return {"area": box / (width * height), "aspect": aspect, "mask_fill": fill, "mask_area": mask_area}


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or "local file"
    except ValueError:
        return "no valid URL"


def most_common(counts: Counter[str], count: int) -> Sequence[tuple[str, int]]:
    """The largest, alphabetical where they tie."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:count]
