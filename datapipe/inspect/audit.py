"""An audit: a person marks a sample of a dataset right or wrong; the share that is right follows, stage by stage."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from rich.table import Table
from scipy.stats import binomtest

from datapipe.errors import QueryError, ShardError
from datapipe.inspect.browse import samples_at
from datapipe.inspect.cards import card, details_of
from datapipe.inspect.chance import rank_in_sql
from datapipe.inspect.pages import html_page
from datapipe.inspect.sidecars import select
from datapipe.schema import Sample, StageName
from datapipe.shards import Store, manifests

AUDIT_FILE = "audit.json"
MOST_ENTITIES = 4
"""Images are drawn in proportion from strata by their number of entities, this many and more being one."""

What = Literal["caption", "tag", "box", "mask"]
STAGES: dict[What, StageName] = {
    "caption": StageName.CAPTION, "tag": StageName.TAG, "box": StageName.GROUND, "mask": StageName.SEGMENT,
}  # fmt: skip
PICTURE_PX = 640


@dataclass(frozen=True)
class Audit:
    """What is asked of whom. `marks`: True for right, by question; questions that were skipped have none.
    `dataset`: a hash of the shards that were marked."""

    images: int
    seed: int
    dataset: str
    marks: dict[str, bool] = field(default_factory=dict)

    def to_json(self) -> bytes:
        return json.dumps(self.__dict__, indent=1).encode()


def question(sample: Sample, what: What, entity: int | None = None) -> str:
    """Its name among the marks: "0000000012/caption", "0000000012/3/box" (of candidate 3)."""
    return f"{sample.key}/{what}" if entity is None else f"{sample.key}/{entity}/{what}"


def questions(samples: Iterable[Sample]) -> list[str]:
    """In the order in which they are asked: of each image its caption, then of each entity its tag, box and mask."""
    asked = []
    for sample in samples:
        asked.append(question(sample, "caption"))
        for index, candidate in enumerate(sample.candidates):
            if candidate.rejected is None:
                asked += [question(sample, what, index) for what in ("tag", "box")]
                if candidate.mask is not None:
                    asked.append(question(sample, "mask", index))
    return asked


def open_audit(store: Store, images: int, seed: int) -> Audit:
    """The one that was begun beside the dataset, or a new one. Raises QueryError when the one that was begun is of
    other labels, or asks for other images."""
    digest = hashlib.sha256()
    for manifest in manifests(store, "shard"):
        digest.update(manifest.parquet.sha256.encode())
    new = Audit(images, seed, digest.hexdigest())
    if not store.exists(AUDIT_FILE):
        return new
    where = f"{store.root}/{AUDIT_FILE}"
    try:
        begun = Audit(**json.loads(store.read(AUDIT_FILE)))
    except (ValueError, TypeError):
        raise ShardError(f"{where}: holds no marks of `sdd audit`; remove it to start one") from None
    for what in ("dataset", "images", "seed"):
        if getattr(begun, what) != getattr(new, what):
            now = "" if what == "dataset" else f" ({getattr(begun, what)}, now {getattr(new, what)})"
            raise QueryError(f"{where}: its marks are of another {what}{now}; go on with that one, or remove it")
    return begun


def draw(store: Store, images: int, seed: int) -> list[Sample]:
    """Kept images, each stratum by its share of them (largest remainder), at random inside it; in the input's order."""
    rank = rank_in_sql(seed)
    counts: dict[int, int] = defaultdict(int)
    best: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
    columns = f"{rank} AS rank, shard, row, least(len(entities), {MOST_ENTITIES}) AS stratum"
    for row in select(store, columns, "outcome = 'kept'"):
        stratum = row["stratum"]
        counts[stratum] += 1
        best[stratum].append((row["rank"], row["shard"], row["row"]))
        if len(best[stratum]) >= 2 * images:
            best[stratum] = heapq.nsmallest(images, best[stratum])
    total = sum(counts.values())
    if not total:
        raise QueryError(f"{store.root}: no image was kept, so there is nothing to audit")
    exact = {stratum: min(images, total) * count / total for stratum, count in counts.items()}
    share = {stratum: int(value) for stratum, value in exact.items()}
    for stratum in sorted(exact, key=lambda s: share[s] - exact[s])[: min(images, total) - sum(share.values())]:
        share[stratum] += 1
    chosen = [place for stratum, places in best.items() for place in heapq.nsmallest(share[stratum], places)]
    return list(samples_at(store, sorted(place[1:] for place in chosen)))


def audit_page(store: Store, audit: Audit, samples: Sequence[Sample]) -> str:
    """The page that asks, and sends every mark to where it came from."""
    cards = [card(sample, sample.key, PICTURE_PX) for sample in samples]
    return html_page(
        "audit",
        scripts=("picture", "audit"),
        connects=True,
        name=store.root,
        cards=cards,
        details={
            "samples": details_of(cards),
            "questions": questions(samples),
            "marks": audit.marks,
        },
    )


@dataclass(frozen=True)
class Precision:
    """Of one stage: how many marks, how many of them right, and the 95 % interval of the share (Wilson)."""

    marked: int
    right: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.right / self.marked if self.marked else float("nan")


def precisions(marks: Mapping[str, bool]) -> dict[What, Precision]:
    """Entities of one image are counted as if they were independent."""
    found: dict[What, Precision] = {}
    for what in get_args(What):
        given = [right for name, right in marks.items() if name.rpartition("/")[2] == what]
        low = high = float("nan")
        if given:
            interval = binomtest(sum(given), len(given)).proportion_ci(method="wilson")
            low, high = float(interval.low), float(interval.high)
        found[what] = Precision(len(given), sum(given), low, high)
    return found


def precision_table(audit: Audit, asked: int) -> Table:
    title = f"{len(audit.marks):,} of {asked:,} questions answered"
    table = Table(
        "stage", "of its", "marked", "right", "precision", "95 %", box=None, title=title, title_justify="left"
    )
    for what, p in precisions(audit.marks).items():
        shown = (f"{p.share:.3f}", f"{p.low:.3f} to {p.high:.3f}") if p.marked else ("", "")
        table.add_row(STAGES[what].value, what, f"{p.marked:,}", f"{p.right:,}", *shown)
    return table


def accepted(marks: Any, asked: Sequence[str]) -> dict[str, bool]:
    """Marks as a page sent them. Raises ValueError for anything else than answers to these questions."""
    known = set(asked)
    if not isinstance(marks, dict) or any(k not in known or not isinstance(v, bool) for k, v in marks.items()):
        raise ValueError("not marks of these questions")
    return marks
