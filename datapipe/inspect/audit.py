"""An audit: a person marks a sample of a dataset right or wrong; the share that is right follows, stage by stage."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import heapq
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, ClassVar, Literal, get_args

from rich.table import Table

from datapipe.inspect.browse import samples_at
from datapipe.inspect.pages import html_page
from datapipe.inspect.picture_cards import Card, sample_card
from datapipe.inspect.random_choice import rank_in_sql
from datapipe.inspect.sidecars import select
from datapipe.schema import Sample, StageName
from datapipe.shards import Store, manifests
from subject_diffusion.errors import QueryError, ShardError

AUDIT_FILE = "audit.json"
MOST_ENTITIES = 4
"""Images are drawn in proportion from strata by their number of entities, this many and more being one."""

Part = Literal["caption", "tag", "box", "mask"]
STAGES: dict[Part, StageName] = {
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


def question(sample: Sample, what: Part, entity: int | None = None) -> str:
    """Its name among the marks: "0000000012/caption", "0000000012/3/box" (of candidate 3)."""
    return f"{sample.key}/{what}" if entity is None else f"{sample.key}/{entity}/{what}"


def questions(samples: Iterable[Sample]) -> list[str]:
    """All questions in the order in which they are asked: an image's caption, then each entity's tag, box and mask."""
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


def choose_samples(store: Store, images: int, seed: int) -> list[Sample]:
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


class Questioning:
    """An audit that is being answered, on any number of pages at once.

    `audit`: what was answered so far; `asked`: all questions.
    """

    file: ClassVar[str] = AUDIT_FILE

    def __init__(self, store: Store, images: int, seed: int) -> None:
        """Raises QueryError, see `open_audit` and `choose_samples`."""
        self._store = store
        self.audit = self._open(images, seed)
        self._samples = choose_samples(store, images, seed)
        self.asked = questions(self._samples)
        self.images = len(self._samples)
        self._known = frozenset(self.asked)

    def _open(self, images: int, seed: int) -> Audit:
        return open_audit(self._store, images, seed)

    @property
    def described(self) -> str:
        """How much there is to answer."""
        return f"{self.images:,} images, {len(self.asked):,} questions"

    def page(self) -> str:
        """The page that asks, with the marks that there are now; it sends every mark as it is given."""
        return html_page(
            "audit",
            scripts=("picture", "audit"),
            connects=True,
            name=self._store.root,
            data={"samples": self._cards, "questions": self.asked, "marks": self.audit.marks},
        )

    def receive(self, changes: Any) -> dict[str, bool]:
        """Saves the marks that a page changed, None for one that it took back, and leaves all others as they are.

        Returns all marks, those of other pages and of other runs of the command included. Raises ValueError for
        anything else than answers to these questions.
        """
        if not isinstance(changes, dict) or not all(
            name in self._known and (mark is None or isinstance(mark, bool)) for name, mark in changes.items()
        ):
            raise ValueError("not marks of these questions")
        begun = self._open(self.audit.images, self.audit.seed)
        marks = {name: mark for name, mark in (begun.marks | changes).items() if mark is not None}
        self.audit = dataclasses.replace(begun, marks=marks)
        if changes:
            self._store.put(self.file, self.audit.to_json())
        return marks

    @functools.cached_property
    def _cards(self) -> dict[str, Card]:
        return {sample.key: sample_card(sample, sample.key, PICTURE_PX) for sample in self._samples}


@dataclass(frozen=True)
class Precision:
    """How often one stage is right: marks, how many of them right, and the share's 95 % interval (Wilson)."""

    marked: int
    right: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.right / self.marked if self.marked else float("nan")


def precisions(marks: Mapping[str, bool]) -> dict[Part, Precision]:
    """Entities of one image are counted as if they were independent."""
    found: dict[Part, Precision] = {}
    for what in get_args(Part):
        given = [right for name, right in marks.items() if name.rpartition("/")[2] == what]
        low = high = float("nan")
        if given:
            low, high = wilson_interval(sum(given), len(given))
        found[what] = Precision(len(given), sum(given), low, high)
    return found


def wilson_interval(right: int, asked: int) -> tuple[float, float]:
    """95 % confidence interval of a share, by Wilson's score."""
    share, z = right / asked, NormalDist().inv_cdf(0.975)
    center = (share + z**2 / (2 * asked)) / (1 + z**2 / asked)
    half = z / (1 + z**2 / asked) * math.sqrt(share * (1 - share) / asked + z**2 / (4 * asked**2))
    # At either end the bound is the end itself, but for rounding.
    return (0.0 if right == 0 else center - half), (1.0 if right == asked else center + half)


def precision_table(audit: Audit, asked: int) -> Table:
    title = f"{len(audit.marks):,} of {asked:,} questions answered"
    table = Table(
        "stage", "of its", "marked", "right", "precision", "95 %", box=None, title=title, title_justify="left"
    )
    for what, p in precisions(audit.marks).items():
        shown = (f"{p.share:.3f}", f"{p.low:.3f} to {p.high:.3f}") if p.marked else ("", "")
        table.add_row(STAGES[what].value, what, f"{p.marked:,}", f"{p.right:,}", *shown)
    return table
