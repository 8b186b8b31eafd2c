"""Two runs over one input: what each kept that the other lost, and what both kept but labeled otherwise."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from datapipe.inspect.galleries import Gallery, GalleryItem, TopK
from datapipe.inspect.pages import html_page
from datapipe.inspect.picture_cards import by_id, sample_cards
from datapipe.inspect.random_choice import rank
from datapipe.inspect.sidecars import select
from datapipe.plan import read_run
from datapipe.schema import Outcome, printable
from datapipe.shards import Store
from datapipe.stages.select import box_iou
from subject_diffusion.errors import QueryError

SHOWN = 24
"""Images in a gallery of the page, and entities in the terminal."""

_TAGS_LISTED = 12
_SAME_BOX_IOU = 0.5

SAME = "kept by both, the same"
CHANGED = "kept by both, labeled otherwise"
ONLY_A = "kept by A alone"
ONLY_B = "kept by B alone"
NEITHER = "lost by both"

_COLUMNS = "shard, row, key, outcome, stage, reason, detail, caption, candidates, entities"
Row = dict[str, Any]


@dataclass(frozen=True)
class LostEntity:
    """An entity that only one of the two has. `by`: the one that lacks it, "A" or "B"; `score`: in the one that has it;
    `why`: for which the one that lacks it refused its box, or "image lost", or "no such box"."""

    key: str
    by: str
    tag: str
    score: float
    why: str

    def __str__(self) -> str:
        return f"{self.by} lost {self.tag} {self.score:.3f} ({self.why})"


@dataclass(frozen=True)
class _Shown:
    """What page and terminal show of a row that differs."""

    items: tuple[GalleryItem, ...]
    lost: tuple[LostEntity, ...]


@dataclass
class Difference:
    """What tells two runs over one input apart."""

    settings: list[tuple[str, str, str]]
    """(key, in A, in B) of recipe and models."""
    fates: Counter[str] = field(default_factory=Counter)
    """Rows by what became of them in both."""
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Rows that only one run kept, by (fate, why the other did not)."""
    changes: Counter[str] = field(default_factory=Counter)
    """Images that both kept, by what differs; several things may."""
    lost: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Entities that only one of the two has, by (the dataset that lacks them, tag)."""
    shown: dict[str, TopK[_Shown]] = field(
        default_factory=lambda: {ONLY_A: TopK(SHOWN), ONLY_B: TopK(SHOWN), CHANGED: TopK(SHOWN // 2)}
    )
    """Rows chosen at random to be shown, by fate."""

    @property
    def lost_entities(self) -> list[LostEntity]:
        """Those of the shown rows, in the order of the input."""
        found = (entity for best in self.shown.values() for row in best.items for entity in row.lost)
        return sorted(found, key=lambda entity: (entity.key, entity.by))

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": {key: [a, b] for key, a, b in self.settings},
            "fates": dict(self.fates),
            "reasons": {f"{fate}: {reason}": rows for (fate, reason), rows in sorted(self.reasons.items())},
            "changes": dict(self.changes),
            "entities": {f"{by} lost {tag}": count for (by, tag), count in sorted(self.lost.items())},
            "examples": [dataclasses.asdict(entity) for entity in self.lost_entities],
        }

    def __rich__(self) -> Group:
        settings = Table("setting", "A", "B", box=None, title="settings and models that differ", title_justify="left")
        for line in self.settings:
            settings.add_row(*(Text(printable(text)) for text in line))
        fates = _counts("rows", [(fate, self.fates[fate]) for fate in (SAME, CHANGED, ONLY_A, ONLY_B, NEITHER)])
        reasons = _counts("why the other lost them", [(f"{f}: {r}", n) for (f, r), n in sorted(self.reasons.items())])
        changes = _counts("what differs where both kept the image", sorted(self.changes.items()))
        lost = Table(box=None, title_justify="left")
        shown = self.lost_entities[:SHOWN]
        lost.title = f"entities that one of them lost, {len(shown):,} of {self.lost.total():,}"
        for heading in ("key", "lost by", "entity", "score", "why"):
            lost.add_column(heading, justify="right" if heading == "score" else "left")
        for e in shown:
            lost.add_row(e.key, e.by, Text(printable(e.tag)), f"{e.score:.3f}", e.why)
        return Group(settings, "", fates, "", reasons, "", changes, "", lost)


def diff(a: Store, b: Store, seed: int = 0) -> Difference:
    """Reads both once, side by side. Raises SddError, also when they are not of the same input."""
    runs = read_run(a), read_run(b)
    if runs[0].parts != runs[1].parts:
        raise QueryError(f"{a.root} and {b.root} were made from different inputs: their rows cannot be compared")
    told = [run.identity | {f"model of {stage}": model for stage, model in run.models.items()} for run in runs]
    keys = sorted(told[0].keys() | told[1].keys())
    difference = Difference(
        [(k, str(told[0].get(k)), str(told[1].get(k))) for k in keys if told[0].get(k) != told[1].get(k)]
    )
    measures = ["text_score" if run.recipe.select.score == "phrase" else "score" for run in runs]
    for one, other in _side_by_side(a, b):
        _compare(difference, one, other, measures, seed)
    return difference


def diff_page(a: Store, b: Store, difference: Difference) -> str:
    """The difference as a page with pictures: A's beside B's where both kept the image."""
    galleries = [
        Gallery(fate, tuple(item for row in best.items for item in row.items))
        for fate, best in difference.shown.items()
    ]
    items = [item for gallery in galleries for item in gallery.items]
    cards = sample_cards(a, items, "A") | sample_cards(b, items, "B")
    fates = [(fate, difference.fates[fate]) for fate in (SAME, CHANGED, ONLY_A, ONLY_B, NEITHER)]
    return html_page(
        "diff",
        a=a.root,
        b=b.root,
        settings=difference.settings,
        fates=fates,
        reasons=[(f"{f}: {r}", n) for (f, r), n in sorted(difference.reasons.items())],
        changes=sorted(difference.changes.items()),
        lost=[(f"{by} lost {tag}", n) for (by, tag), n in difference.lost.most_common(_TAGS_LISTED)],
        galleries=galleries,
        cards=cards,
        data={"samples": by_id(cards.values())},
    )


def _side_by_side(a: Store, b: Store) -> Iterator[tuple[Row, Row]]:
    """The rows that both have, in order, however each is cut into shards."""
    others = select(b, _COLUMNS)
    other = next(others, None)
    for one in select(a, _COLUMNS):
        while other is not None and other["row"] < one["row"]:
            other = next(others, None)
        if other is not None and other["row"] == one["row"]:
            yield one, other


def _compare(difference: Difference, one: Row, other: Row, measures: Sequence[str], seed: int) -> None:
    """`measures`: the score that counts in A and in B."""
    kept = one["outcome"] == Outcome.KEPT.value, other["outcome"] == Outcome.KEPT.value
    changes = list(_changes(one, other)) if all(kept) else []
    fate = {(True, True): CHANGED if changes else SAME, (True, False): ONLY_A, (False, True): ONLY_B}.get(kept, NEITHER)
    difference.fates[fate] += 1
    difference.changes.update(changes)
    if fate not in difference.shown:
        return
    lost = (*_lost(one, other, "B", measures[0]), *_lost(other, one, "A", measures[1]))
    difference.lost.update((entity.by, entity.tag) for entity in lost)
    told = ", ".join(map(str, lost))
    items: tuple[GalleryItem, ...]
    if fate == CHANGED:
        items = (_item(one, "A", f"A: {told or ', '.join(changes)}"), _item(other, "B", "B"))
    else:
        kept_one, lost_one, dataset = (one, other, "A") if fate == ONLY_A else (other, one, "B")
        reason = f"{lost_one['stage']}/{lost_one['reason']}"
        difference.reasons[fate, reason] += 1
        items = (_item(kept_one, dataset, f"{told}; {reason} {lost_one['detail']}".removeprefix("; ")),)
    order = float(int(rank(one["key"], seed)[:12], 16))
    difference.shown[fate].add(order, one["row"], _Shown(items, lost))


def _lost(one: Row, other: Row, by: str, measure: str) -> Iterator[LostEntity]:
    """The entities of one that the other has not: of a tag that it has less often, those farthest from its boxes."""
    there = _entities(other)
    missing = Counter(e["tag"] for e in _entities(one)) - Counter(e["tag"] for e in there)
    for tag, count in missing.items():
        boxes = [e["box"] for e in there if e["tag"] == tag]
        candidates = [e for e in _entities(one) if e["tag"] == tag]
        candidates.sort(key=lambda e: max((box_iou(e["box"], box) for box in boxes), default=0.0))
        for entity in candidates[:count]:
            yield LostEntity(one["key"], by, tag, entity[measure], _why(entity, other))


def _entities(row: Row) -> list[Row]:
    return row["entities"] if row["outcome"] == Outcome.KEPT.value else []


def _why(entity: Row, other: Row) -> str:
    """What became of its box in the other."""
    same = [c for c in other["candidates"] if c["tag"] == entity["tag"]]
    nearest = max(same, key=lambda c: box_iou(c["box"], entity["box"]), default=None)
    if nearest is None or box_iou(nearest["box"], entity["box"]) < _SAME_BOX_IOU:
        return "no such box"
    return nearest["rejected"] or "image lost"


def _item(row: Row, dataset: str, note: str) -> GalleryItem:
    return GalleryItem(row["shard"], row["row"], note=note, dataset=dataset)


def _changes(one: Row, other: Row) -> Iterator[str]:
    if one["caption"] != other["caption"]:
        yield "caption"
    before, after = (Counter(e["tag"] for e in row["entities"]) for row in (one, other))
    if before - after:
        yield "entities that B lost"
    if after - before:
        yield "entities that B gained"
    if before == after and [_shape(e) for e in one["entities"]] != [_shape(e) for e in other["entities"]]:
        yield "boxes or masks"


def _shape(entity: Row) -> tuple[Any, ...]:
    return entity["tag"], entity["box"], entity["mask"]


def _counts(title: str, lines: list[tuple[str, int]]) -> Table:
    table = Table(box=None, title=title, title_justify="left", show_header=False)
    for what, count in lines:
        table.add_row(Text(printable(what)), f"{count:,}")
    return table
